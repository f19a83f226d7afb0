"""`suggest_space` on quadratics whose curvature and noise are known, and on workloads whose best values were measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from experiments import results
from experiments.workloads import WORKLOADS
from hypergrad.search import suggest_space

EXACT = 1e-5  # float32
SAMPLED = 0.1  # nine batches of noise in 4000 dimensions
N = 4000


class Weights(torch.nn.Module):
    """θ alone."""

    def __init__(self, theta: torch.Tensor):
        super().__init__()
        self.theta = torch.nn.Parameter(theta)


def quadratic(h: torch.Tensor) -> Any:
    """½ θᵀ diag(h) θ + εᵀθ, ε the batch."""
    return lambda model, noise: 0.5 * (h * model.theta**2).sum() + (noise * model.theta).sum()


def quiet(n: int) -> list[torch.Tensor]:
    return [torch.zeros(n)] * 4


@pytest.mark.parametrize("h", [0.1, 1.0, 50.0])
def test_one_curvature(h: float) -> None:
    model = Weights(torch.ones(3))
    space = suggest_space(
        model, torch.optim.SGD(model.parameters(), lr=1e-3), quiet(3), quadratic(torch.full((3,), h)), steps=500
    )
    lr, decay = space["lr"], space["weight_decay"]
    assert lr.start == pytest.approx(1 / h, rel=EXACT)
    assert lr.high == pytest.approx(4 * 2 / h, rel=EXACT)
    assert lr.low == pytest.approx(max(1 / h / 500, 1 / h / 1000), rel=EXACT)
    assert decay.low == pytest.approx(0.01 / 3 / (500 / h), rel=EXACT)
    assert decay.high == pytest.approx(3 * 50 / (500 / h), rel=EXACT)


def test_the_curvature_is_that_along_the_update() -> None:
    h, theta = torch.tensor([1.0, 10.0, 100.0]), torch.tensor([1.0, 2.0, 0.1])
    model = Weights(theta.clone())
    g = h * theta
    along = float((g * h * g).sum() / (g * g).sum())
    lr = suggest_space(model, torch.optim.SGD(model.parameters(), lr=0.1), quiet(3), quadratic(h))["lr"]
    assert lr.start == pytest.approx(1 / along, rel=EXACT) and lr.high == pytest.approx(2 * 4 / along, rel=EXACT)


@pytest.mark.parametrize("sigma", [0.5, 2.0])
def test_noise_lowers_the_best_step_and_leaves_the_edge(sigma: float) -> None:
    h = 4.0
    model, draws = Weights(torch.ones(N)), torch.Generator().manual_seed(0)
    batches = [sigma * h * torch.randn(N, generator=draws) for _ in range(9)]
    lr = suggest_space(model, torch.optim.SGD(model.parameters(), lr=0.1), batches, quadratic(torch.full((N,), h)))[
        "lr"
    ]
    assert lr.start == pytest.approx(1 / h / (1 + sigma**2), rel=SAMPLED)  # |g|²/(h (|g|² + tr Σ)), tr Σ = σ² |g|²
    assert lr.high == pytest.approx(4 * 2 / h, rel=SAMPLED)


def test_momentum_counts_for_what_it_adds_up_to() -> None:
    model = Weights(torch.ones(3))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    lr = suggest_space(model, sgd, quiet(3), quadratic(torch.full((3,), 2.0)))["lr"]
    assert lr.start == pytest.approx(0.1 / 2, rel=EXACT) and lr.high == pytest.approx(4 * 2 * 1.9 / 2, rel=EXACT)


STEPS_OF_SIGN = {
    "Adam": (lambda p: torch.optim.Adam(p, lr=0.1), 0.01),
    "AdamW": (lambda p: torch.optim.AdamW(p, lr=0.1), 0.01),
    "RMSprop": (lambda p: torch.optim.RMSprop(p, lr=0.1), 0.1),  # has come to its steady length within a tenth
}


@pytest.mark.parametrize("name", STEPS_OF_SIGN)
def test_a_step_by_the_sign_is_best_as_long_as_the_weights_are_far(name: str) -> None:
    make, tolerance = STEPS_OF_SIGN[name]
    model = Weights(torch.full((3,), 5.0))
    optimizer = make(model.parameters())
    space = suggest_space(model, optimizer, quiet(3), quadratic(torch.full((3,), 7.0)), steps=1000)
    assert space["lr"].start == pytest.approx(5.0, rel=tolerance)
    decay = space["weight_decay"]
    if name != "AdamW":  # decay is divided by √v, with the gradient: ‖g‖/‖θ‖ = 7
        assert (decay.low, decay.high) == pytest.approx((7e-4, 7.0), rel=EXACT)


def test_everything_is_left_as_it_was() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, weight_decay=0.01)
    batches = [torch.randn(16, 4) for _ in range(4)]
    model(batches[0]).sum().backward()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    grads, groups = [p.grad for p in model.parameters()], [dict(group) for group in optimizer.param_groups]
    random = torch.get_rng_state()
    suggest_space(model, optimizer, batches, lambda model, x: (model(x) ** 2).mean())
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(p.grad is g for p, g in zip(model.parameters(), grads))
    assert optimizer.param_groups == groups and not optimizer.state
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("name", ["diabetes", "friedman", "mlp_digits"])
def test_the_winner_of_a_measured_grid_lies_within(name: str) -> None:
    pytest.importorskip("sklearn")
    winner = next(
        row
        for row in results.load("pools.json")["rows"]
        if row["workload"] == name and row["kind"] == "summary"  # type: ignore[index]
    )
    task = (WORKLOADS if isinstance(WORKLOADS, dict) else {w.name: w for w in WORKLOADS})[name].build(0)
    batches = [batch for _, batch in zip(range(9), task.batches())]
    space = suggest_space(task.model, task.make_optimizer(1e-3, 1e-4), batches, task.loss, steps=task.steps)
    assert winner["lr"] in space["lr"] and winner["weight_decay"] in space["weight_decay"]


def _call(batches: Any = None, theta: float = 1.0, lr: float = 0.1, **more: Any) -> Any:
    model = Weights(torch.full((3,), theta))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return lambda: suggest_space(
        model, optimizer, quiet(3) if batches is None else batches, quadratic(torch.ones(3)), **more
    )


BAD = {
    "no batches": (_call([]), "at least 2"),
    "one batch": (_call([torch.zeros(3)]), "at least 2"),
    "at the minimum": (_call(theta=0.0), "minimum"),
    "a loss that is not finite": (_call(theta=float("nan")), "not finite"),
    "no steps": (_call(steps=0), "steps"),
    "lr of 0": (_call(lr=0.0), "any positive"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    call, match = BAD[name]
    with pytest.raises(ValueError, match=match):
        call()
