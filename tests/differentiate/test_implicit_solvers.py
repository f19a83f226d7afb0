"""Implicit mode's solvers on softmax regression at its minimum, against the dense Hessian: answers, statistics, warm starts."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.nn.functional import cross_entropy, one_hot

import hypergrad
from hypergrad.solvers import Matvec, WarmStart, cg, neumann, nystrom, nystrom_inverse
from tests.problems import DEVICE, randint, randn

CLOSED_FORM = 1e-8  # relative: the solvers' residual times a condition number below 100
N, FEATURES, CLASSES = 60, 6, 4
DECAY = (0.02, 0.05)  # of weight and bias
WRT = ("weight_decay", "c")


class Softmax:
    """F(θ) = Σ cᵢ CE(Wxᵢ + b, yᵢ) + Σ_groups w/2 ‖θ_group‖² at its minimum; features of sizes 1 to 1/100."""

    def __init__(self) -> None:
        sizes = torch.logspace(0, -2, FEATURES, dtype=torch.float64, device=DEVICE)
        self.x, self.y = randn(N, FEATURES, seed=1) * sizes, randint(CLASSES, N, seed=2)
        self.x_val, self.y_val = randn(N, FEATURES, seed=3) * sizes, randint(CLASSES, N, seed=4)
        self.c = (1 + 0.5 * torch.rand(N, generator=torch.Generator().manual_seed(5)).double()).to(DEVICE) / N
        self.decay = torch.tensor(DECAY, dtype=torch.float64, device=DEVICE).repeat_interleave(
            torch.tensor([CLASSES * FEATURES, CLASSES], device=DEVICE)
        )
        self.model = nn.Linear(FEATURES, CLASSES).double().to(DEVICE)
        self.train()

    def logits(self, theta: Tensor, x: Tensor) -> Tensor:
        return x @ theta[:-CLASSES].view(CLASSES, FEATURES).T + theta[-CLASSES:]

    def objective(self, theta: Tensor, c: Tensor, decay: Tensor) -> Tensor:
        fit = (c * cross_entropy(self.logits(theta, self.x), self.y, reduction="none")).sum()
        return fit + (decay * theta.square()).sum() / 2

    def gradient(self, theta: Tensor, c: Tensor, decay: Tensor) -> Tensor:
        """∂F/∂θ, by hand: pᵢ − 1_{yᵢ} times xᵢ."""
        off = c[:, None] * (self.logits(theta, self.x).softmax(1) - one_hot(self.y, CLASSES))
        return torch.cat([(off.T @ self.x).flatten(), off.sum(0)]) + decay * theta

    def train(self) -> None:
        """To the minimum, from where it stands, for the present c."""
        theta = torch.cat([p.detach().flatten() for p in self.model.parameters()])
        for _ in range(30):
            self.hessian = hessian(lambda th: self.objective(th, self.c, self.decay), theta)
            step = torch.linalg.solve(self.hessian, self.gradient(theta, self.c, self.decay))
            theta = theta - step
            if torch.linalg.vector_norm(step) < 1e-15:
                break
        self.theta = theta
        with torch.no_grad():
            self.model.weight.copy_(theta[:-CLASSES].view(CLASSES, FEATURES))
            self.model.bias.copy_(theta[-CLASSES:])

    def closed_form(self) -> dict[str, Tensor]:
        v = jacobian(lambda th: cross_entropy(self.logits(th, self.x_val), self.y_val), self.theta)
        u = torch.linalg.solve(self.hessian, v)
        of_c = jacobian(lambda c: self.gradient(self.theta, c, self.decay), self.c)
        each = u * self.theta
        decay = -torch.stack([each[:-CLASSES].sum(), each[-CLASSES:].sum()])
        return {"weight_decay": decay, "c": -(u @ of_c)}

    def hypergradient(self, **options: Any) -> hypergrad.Result:
        groups = [{"params": [p], "weight_decay": w} for p, w in zip(self.model.parameters(), DECAY, strict=True)]

        def loss(model: nn.Module, batch: None, hypers: dict[str, Tensor]) -> Tensor:
            return (hypers["c"] * cross_entropy(model(self.x), self.y, reduction="none")).sum()

        return hypergrad.hypergradient(
            self.model, torch.optim.SGD(groups, lr=0.1), loss, [None], lambda: cross_entropy(self.model(self.x_val), self.y_val),
            mode="implicit", hypers={"c": self.c}, **({"wrt": WRT} | options),
        )  # fmt: skip


def worst(result: hypergrad.Result, want: dict[str, Tensor]) -> float:
    """The largest error, relative to the largest element of its array."""
    assert result.gradients.keys() == want.keys()
    return max(float((result.gradients[n] - x).abs().max() / x.abs().max()) for n, x in want.items())


SIZE = CLASSES * (FEATURES + 1)
AGREE: dict[str, tuple[Any, float, int]] = {  # solver, bound of the relative error, products
    "cg": (cg, CLOSED_FORM, 25),
    "cg after nystrom": (partial(cg, preconditioner=partial(nystrom_inverse, rank=8, shift=DECAY[0])), CLOSED_FORM, 27),
    "neumann": (partial(neumann, terms=800), CLOSED_FORM, 809),
    "nystrom, full rank": (partial(nystrom, rank=SIZE, rho=1e-12), CLOSED_FORM, 28),
    "nystrom, rank 12": (partial(nystrom, rank=12, rho=0.0, shift=DECAY[0]), 0.3, 12),
    "nystrom, rank 16": (partial(nystrom, rank=16, rho=0.0, shift=DECAY[0]), 0.1, 16),
    "nystrom, rank 20": (partial(nystrom, rank=20, rho=0.0, shift=DECAY[0]), 0.01, 20),
    "a function of the user's": (lambda matvec, b: solved_densely(matvec, b), CLOSED_FORM, 28),
}


def solved_densely(matvec: Matvec, b: Tensor) -> Tensor:
    return torch.linalg.solve(torch.stack([matvec(e) for e in torch.eye(len(b)).to(b)], dim=1), b)


@pytest.mark.parametrize("name", AGREE)
def test_softmax_regression_in_closed_form(name: str) -> None:
    solver, tolerance, products = AGREE[name]
    softmax = Softmax()
    result = softmax.hypergradient(solver=solver)
    assert worst(result, softmax.closed_form()) < tolerance
    assert result.stats["gradient_norm"] < 1e-12
    assert result.stats["solver_residual"] < tolerance
    if name.startswith("cg"):  # stopped by its tolerance
        assert result.stats["solver_iterations"] <= products
    else:
        assert result.stats["solver_iterations"] == products
    assert result.stats["hessian_products"] == result.stats["solver_iterations"] + 1  # one for the residual


def test_nystrom_without_the_decay_as_its_shift_is_far_off() -> None:
    """What `shift` is for: a decay in every eigenvalue hides their fall, and 1/rho in the place of the rest is too much."""
    softmax = Softmax()
    result = softmax.hypergradient(solver=partial(nystrom, rank=16, rho=DECAY[0]))
    assert worst(result, softmax.closed_form()) > 0.5


def old_residual_cg(matvec: Matvec, b: Tensor, iterations: int) -> Tensor:
    """CG as two published libraries have it: the next direction is built from the residual BEFORE the update."""
    x, r = torch.zeros_like(b), b.clone()
    d = r.clone()
    for _ in range(iterations):
        ad = matvec(d)
        a = (r @ r) / (d @ ad)
        new = r - a * ad
        x, d = x + a * d, r + (new @ new) / (r @ r) * d
        r = new
    return x


@pytest.mark.parametrize("iterations", [5, SIZE, 200])
def test_trap_cg_of_published_libraries_is_off(iterations: int) -> None:
    softmax = Softmax()
    theirs, ours = (
        worst(softmax.hypergradient(solver=solver), softmax.closed_form())
        for solver in (partial(old_residual_cg, iterations=iterations), partial(cg, max_iter=iterations))
    )
    assert theirs > 0.2  # 5 times the answer after 200
    assert ours < (CLOSED_FORM if iterations >= SIZE else theirs)


# The same products from the second solve on: the start takes one.
PAIRS: dict[str, tuple[Any, WarmStart]] = {
    "cg": (partial(cg, max_iter=7), WarmStart(cg, max_iter=7)),
    "neumann": (partial(neumann, terms=21), WarmStart(neumann, terms=20)),
    "nystrom": (partial(nystrom, rank=13, shift=DECAY[0]), WarmStart(nystrom, rank=12, shift=DECAY[0])),
}


@pytest.mark.parametrize("name", PAIRS)
def test_warm_started_solves_along_a_run(name: str) -> None:
    """The weights of the examples follow their hypergradient, training goes to the new minimum, and so on."""
    softmax = Softmax()
    cold, warm = PAIRS[name]
    closed = []
    for step in range(6):
        results = [softmax.hypergradient(solver=solver) for solver in (cold, warm)]
        residuals, products = ([r.stats[f"solver_{key}"] for r in results] for key in ("residual", "iterations"))
        closed.append([worst(r, softmax.closed_form()) for r in results])
        if step > 0:
            assert products[0] == products[1]
            assert residuals[1] < residuals[0]
        softmax.c = softmax.c * (-0.1 * softmax.closed_form()["c"]).exp()
        softmax.train()
    assert residuals[1] < residuals[0] / 2
    assert closed[-1][1] < closed[-1][0] / 2


def test_a_warm_start_goes_on_from_its_state_dict() -> None:
    softmax = Softmax()
    one, other = WarmStart(cg, max_iter=4), WarmStart(cg, max_iter=4)
    softmax.hypergradient(solver=one)
    other.load_state_dict(one.state_dict())
    softmax.c = softmax.c * 1.01
    softmax.train()
    a, b = softmax.hypergradient(solver=one), softmax.hypergradient(solver=other)
    assert a.stats["solver_residual"] == b.stats["solver_residual"]
    assert all(torch.equal(x, b.gradients[name]) for name, x in a.gradients.items())
