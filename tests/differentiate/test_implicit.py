"""Implicit mode: closed forms at a minimum, unrolled to convergence, and the look-back series."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hypergrad
from hypergrad.solvers import neumann, nystrom
from tests.cases import OPTIMIZERS, Case, case_of
from tests.problems import DEVICE, Vector, randint, randn

CLOSED_FORM = 1e-8  # relative: the solvers' residual times a condition number below 100
CONVERGED = 1e-6  # relative: what is left of 0.9^K after K steps
SERIES = 1e-9

SOLVERS: dict[str, Any] = {
    "cg": None,
    "neumann": partial(neumann, terms=3000),
    "nystrom": partial(nystrom, rank=8, rho=1e-12),
}
N = 20


class Ridge:
    """F(θ) = Σ cᵢ (xᵢᵀθ − yᵢ)²/2 + r/2 ‖θ‖² + Σ_groups w/2 ‖θ_group‖², with its minimum and dL/dh in closed form."""

    def __init__(self, decay: tuple[float, float], sign: float = 1.0):
        self.x, self.y, self.c = randn(N, 8, seed=1), randn(N, seed=2), torch.full((N,), 1 / N).double().to(DEVICE)
        self.r, self.sign = torch.tensor(0.03, dtype=torch.float64, device=DEVICE), sign
        self.w = torch.tensor(decay, dtype=torch.float64, device=DEVICE).repeat_interleave(4)
        self.hessian = self.x.T @ (self.c[:, None] * self.x) + torch.diag(self.w + self.r)
        self.minimum = torch.linalg.solve(self.hessian, self.x.T @ (self.c * self.y))
        self.model = Vector().double().to(DEVICE)
        with torch.no_grad():
            self.model.a.copy_(self.minimum[:4])
            self.model.b.copy_(self.minimum[4:])

    def loss(self, model: nn.Module, batch: Any, hypers: dict[str, Tensor]) -> Tensor:
        theta = model()
        fit = (hypers["c"] * (self.x @ theta - self.y).square()).sum() / 2
        return self.sign * (fit + hypers["r"] * theta @ theta / 2)

    def val_loss(self) -> Tensor:
        return (self.model() - 1).square().sum() / 2

    def gradients(self) -> dict[str, Tensor]:
        u = torch.linalg.solve(self.hessian, self.minimum - 1)  # (∂²F/∂θ²)⁻¹ ∂L/∂θ
        decay = -(u * self.minimum).view(2, 4).sum(1)
        return {"weight_decay": decay, "r": decay.sum(), "c": -(self.x @ u) * (self.x @ self.minimum - self.y)}

    def hypergradient(self, optimizer: torch.optim.Optimizer, **options: Any) -> hypergrad.Result:
        return hypergrad.hypergradient(
            self.model, optimizer, self.loss, [None] * 2, self.val_loss, mode="implicit",
            hypers={"c": self.c, "r": self.r}, **options,
        )  # fmt: skip


def close(got: Tensor, want: Tensor, tolerance: float) -> bool:
    return bool((got - want).abs().max() <= tolerance * want.abs().max())


OPTIMIZERS_AT_A_MINIMUM: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "maximize": partial(torch.optim.SGD, lr=0.1, maximize=True),
    "adam": partial(torch.optim.Adam, lr=0.0, eps=1e-2),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.0, eps=1e-2),
    "adagrad": partial(torch.optim.Adagrad, lr=0.0, eps=1e-2),
    "adamax": partial(torch.optim.Adamax, lr=0.0, eps=1e-2),
    "nadam": partial(torch.optim.NAdam, lr=0.0, eps=1e-2),
    "radam": partial(torch.optim.RAdam, lr=0.0, eps=1e-2),
    "adadelta": partial(torch.optim.Adadelta, lr=0.0),
}


@pytest.mark.parametrize("decay", [(0.1, 0.2), (0.0, 0.0)], ids=str)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", OPTIMIZERS_AT_A_MINIMUM)
@pytest.mark.slow
def test_ridge_regression_in_closed_form(name: str, solver: str, decay: tuple[float, float]) -> None:
    ridge = Ridge(decay, sign=-1.0 if name == "maximize" else 1.0)
    groups = [{"params": [p], "weight_decay": w} for p, w in zip(ridge.model.parameters(), decay, strict=True)]
    result = ridge.hypergradient(
        OPTIMIZERS_AT_A_MINIMUM[name](groups), wrt=("weight_decay", "c", "r"), solver=SOLVERS[solver]
    )
    for hyper, want in ridge.gradients().items():
        assert close(result.gradients[hyper], want, CLOSED_FORM), hyper
    assert result.stats["solver_residual"] < 1e-9
    assert result.stats["gradient_norm"] < 1e-12


def test_mini_batches_count_once_each_and_are_averaged() -> None:
    """Two halves of the data, seen three times: F is their mean."""
    ridge = Ridge((0.1, 0.2))
    groups = [{"params": [p], "weight_decay": w} for p, w in zip(ridge.model.parameters(), (0.1, 0.2), strict=True)]
    halves = [slice(0, N // 2), slice(N // 2, N)]

    def loss(model: nn.Module, half: slice) -> Tensor:
        theta = model()
        return (ridge.x[half] @ theta - ridge.y[half]).square().mean() / 2 + ridge.r * theta @ theta / 2

    result = hypergrad.hypergradient(
        ridge.model, torch.optim.SGD(groups, lr=0.0), loss, halves * 3, ridge.val_loss, "weight_decay", "implicit"
    )
    assert close(result.gradients["weight_decay"], ridge.gradients()["weight_decay"], CLOSED_FORM)


def test_logistic_regression_unrolled_to_convergence() -> None:
    x, y, x_val, y_val = randn(40, 4, seed=1), randint(3, 40, seed=2), randn(20, 4, seed=3), randint(3, 20, seed=4)
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double().to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.8, momentum=0.7, weight_decay=0.1)
    strength = {"l1": torch.tensor(0.05, dtype=torch.float64, device=DEVICE)}

    def loss(model: nn.Module, batch: None, hypers: dict[str, Tensor]) -> Tensor:
        smooth = (model.weight.square() + 0.1).sqrt().sum()
        return cross_entropy(model(x), y) + hypers["l1"] * smooth

    implicit, unrolled = (
        hypergrad.hypergradient(
            model, optimizer, loss, [None] * 300, lambda: cross_entropy(model(x_val), y_val),
            wrt=("weight_decay", "l1"), mode=mode, hypers=strength,
        )
        for mode in ("implicit", "unrolled")
    )  # fmt: skip
    assert implicit.stats["gradient_norm"] < 1e-10
    for name, want in unrolled.gradients.items():
        assert close(implicit.gradients[name], want, CONVERGED), name


REFUSED = [("momentum", name) for name in ("lr", "momentum", "dampening")] + [
    ("adam", "lr"),
    ("adam", "betas"),
    ("adam", "eps"),
    ("adamw", "weight_decay"),
    ("rmsprop", "alpha"),
]


@pytest.mark.parametrize(("optimizer", "name"), REFUSED)
def test_what_does_not_move_a_minimum_raises(optimizer: str, name: str) -> None:
    setup = Case("ridge", optimizer).build()
    with pytest.raises(NotImplementedError, match=r"unrolled.*look_back"):
        hypergrad.hypergradient(
            setup.model, setup.optimizer, setup.loss, setup.batches, setup.val_loss, name, "implicit"
        )


@pytest.mark.parametrize("options", [{"per_step": True}, {"val_steps": (1, 2)}])
def test_implicit_has_no_steps(options: dict[str, Any]) -> None:
    setup = Case("ridge", "momentum").build()
    with pytest.raises(NotImplementedError, match="unrolled"):
        hypergrad.hypergradient(
            setup.model,
            setup.optimizer,
            setup.loss,
            setup.batches,
            setup.val_loss,
            "weight_decay",
            "implicit",
            **options,
        )


class HeavyBall:
    """Momentum SGD on θᵀAθ/2 − cᵀθ, written out, with its truncated series by the dense Jacobian."""

    def __init__(self) -> None:
        factor = randn(8, 8, seed=1)
        self.a, self.c = factor @ factor.T / 8, randn(8, seed=2)
        torch.manual_seed(0)
        self.model = Vector().double().to(DEVICE)

    def step(self, s: Tensor, h: Tensor) -> Tensor:
        theta, b = s.split(8)
        lr, wd, momentum = h.repeat_interleave(4, dim=1)
        b = momentum * b + self.a @ theta - self.c + wd * theta
        return torch.cat([theta - lr * b, b])

    def at_the_end(self, h: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
        """∂L/∂s after the last step, of L = ‖θ − 1‖²/2; ∂Φ/∂s, ∂Φ/∂h before it."""
        theta = self.model().detach()
        s = torch.cat([theta, torch.zeros_like(theta)])
        for _ in range(steps - 1):
            s = self.step(s, h)
        lam = torch.cat([self.step(s, h)[:8] - 1, torch.zeros_like(theta)])
        return lam, *torch.autograd.functional.jacobian(self.step, (s, h))

    def residual(self, h: Tensor, steps: int, terms: int) -> float:
        """‖λ − (I − Jᵀ) Σ_{j<i} (Jᵀ)ʲ λ‖ / ‖λ‖, its part in θ."""
        lam, by_s, _ = self.at_the_end(h, steps)
        x = sum(torch.linalg.matrix_power(by_s.T, j) @ lam for j in range(terms))
        left = lam - x + by_s.T @ x
        return float(torch.linalg.vector_norm(left[:8]) / torch.linalg.vector_norm(lam[:8]))

    def series(self, h: Tensor, steps: int, terms: int) -> Tensor:
        lam, by_s, by_h = self.at_the_end(h, steps)
        total = torch.zeros_like(h)
        for _ in range(terms):
            total, lam = total + torch.einsum("i,ijk->jk", lam, by_h), lam @ by_s
        return total


@pytest.mark.parametrize("terms", [1, 2, 5, 40])
@pytest.mark.parametrize("steps", [2, 5])
def test_look_back_is_its_truncated_series(steps: int, terms: int) -> None:
    ball = HeavyBall()
    h = torch.tensor([[0.1, 0.2], [0.05, 0.0], [0.9, 0.5]], dtype=torch.float64, device=DEVICE)
    groups = [
        dict(zip(("params", "lr", "weight_decay", "momentum"), ([p], *h[:, i].tolist()), strict=True))
        for i, p in enumerate(ball.model.parameters())
    ]

    def loss(model: nn.Module, batch: None) -> Tensor:
        return model() @ ball.a @ model() / 2 - ball.c @ model()

    result = hypergrad.hypergradient(
        ball.model,
        torch.optim.SGD(groups, lr=0.1),
        loss,
        [None] * steps,
        lambda: (ball.model() - 1).square().sum() / 2,
        wrt=("lr", "weight_decay", "momentum"),
        mode="implicit",
        look_back=terms,
    )
    for got, want in zip(result.gradients.values(), ball.series(h, steps, terms), strict=True):
        assert close(got, want, SERIES)
    assert result.stats["gradient_evaluations"] == steps + 1  # the last step's graph serves every term
    assert result.stats["hessian_products"] == result.stats["solver_iterations"] == terms
    assert result.stats["solver_residual"] == pytest.approx(ball.residual(h, steps, terms), rel=SERIES)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_looking_back_one_step_is_the_last_step_of_per_step(optimizer: str) -> None:
    case = case_of(optimizer)
    setup = case.build()
    call = partial(
        hypergrad.hypergradient, setup.model, setup.optimizer, setup.loss, setup.batches, setup.val_loss, case.names
    )
    one, per_step = call(mode="implicit", look_back=1), call(mode="unrolled", per_step=True)
    for name, got in one.gradients.items():
        assert close(got, per_step.gradients[name][-1], SERIES), name
