"""A warm start that leads nowhere is undone; others are left alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hypergrad
from experiments.gpu_check.models import resnet18
from hypergrad.core.problem import Problem
from hypergrad.online.policies import LrWarmStart
from hypergrad.online.start_watch import StartWatch
from hypergrad.optimizers.transition import Transition
from tests.tiers import slow_but


class Scalar(nn.Module):
    """One number, and a ReLU unit that dies where it is far below 0."""

    def __init__(self, w: float, f: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.w, self.f = nn.Parameter(torch.tensor([w])), f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.w, x)


UNITS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu(wx)": lambda w, x: torch.relu(w * x),
    "relu(x + w)": lambda w, x: torch.relu(x + w),
    "relu(w)": lambda w, x: torch.relu(w) + 0 * x,
}


def ends_at(
    unit: str, w: float, kind: Any, tuned: bool, n: int = 16, steps: int = 150
) -> tuple[float, hypergrad.Tuner]:
    """The loss on fresh data after a run on batches of n, from lr 0.1."""
    model = Scalar(w, UNITS[unit])
    opt, g = kind(model.parameters(), lr=0.1), torch.Generator().manual_seed(0)
    loss = lambda x: ((model(x) - x) ** 2).mean()  # noqa: E731
    held_out = torch.rand(256, generator=g)
    tuner = hypergrad.Tuner(model, opt, lambda: loss(held_out), tune=("lr",))
    if not tuned:
        tuner.close()
    for _ in range(steps):
        opt.zero_grad()
        tuner.backward(loss(torch.rand(n, generator=g)))
        opt.step()
    return loss(held_out).item(), tuner


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize(
    ("unit", "w"),
    slow_but([("relu(wx)", 15.0), ("relu(x + w)", 0.9), ("relu(w)", 3.0), ("relu(wx)", 0.5)], ("relu(wx)", 15.0)),
)
def test_adam_on_one_number_does_not_end_with_a_dead_unit(unit: str, w: float, kind: Any) -> None:
    plain, _ = ends_at(unit, w, kind, tuned=False)
    ours, tuner = ends_at(unit, w, kind, tuned=True)
    assert ours <= 1.2 * plain + 1e-3
    assert float(tuner.values["lr"]) < 2


def test_a_start_that_is_undone_is_said_to_be_rolled_back() -> None:
    assert ends_at("relu(wx)", 15.0, torch.optim.Adam, tuned=True)[1].stats["rollbacks"] > 0
    assert ends_at("relu(wx)", 0.5, torch.optim.Adam, tuned=True)[1].stats["rollbacks"] == 0


def undone(losses: list[float], zero: frozenset[int] = frozenset()) -> int | None:
    """At which of these losses a start is undone whose search ends with the tenth."""
    model = nn.Linear(2, 1)
    transition = Transition([torch.optim.SGD(model.parameters(), lr=0.1)], frozenset({"lr"}))
    watch = StartWatch(LrWarmStart(), Problem(model, transition.params, None), transition, True)
    for t, loss in enumerate(losses):
        if watch.sees(transition.read, loss, t in zero, t < 10):
            assert torch.equal(watch.undo().state.theta, transition.read().theta)
            return t
    return None


def test_start_is_undone_where_losses_stay_above_the_first_ones() -> None:
    down = [1.0, 1.1, 0.9, 1.2, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]
    assert undone([*down, *[1.3] * 20]) == 29
    assert undone([*down, *[1.3] * 19, 1.1]) is None  # not above all of them
    assert undone([*down, *[0.5] * 20, *[9.0] * 20]) is None  # later it is not the start's fault


def test_a_search_is_undone_where_losses_rise_above_the_first_by_more_than_those_spread() -> None:
    first = [1.0, 1.1, 0.9, 1.2, 0.8]  # up to 1.6 is within their spread
    assert undone([*first, *[1.7] * 5]) == 9
    assert undone([*first, *[1.5] * 5, *[0.5] * 30]) is None
    assert undone([*first, 1.7, 1.7, 1.7, 1.7, 1.5, *[0.5] * 30]) is None  # one of them is not


class Patterns:
    """A ResNet-18 of width 2 on noisy patterns: the sign of curvature along its first steps changes, and lr goes on growing."""

    def __init__(self, seed: int, total: int):
        torch.manual_seed(seed)
        self.model, self.draws = resnet18(2, classes=4, channels=1), torch.Generator().manual_seed(seed)
        self.means = torch.randn(4, 1, 8, 8, generator=self.draws)
        val = self.batch(64)
        opt = torch.optim.SGD(self.model.parameters(), lr=1e-6, momentum=0.9, weight_decay=1e-4)
        self.tuner = hypergrad.Tuner(self.model, opt, lambda: self.loss(val), total_steps=total)
        self.losses: list[float] = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # roll-backs
            for _ in range(100):
                loss = self.loss(self.batch(16))
                opt.zero_grad()
                self.tuner.backward(loss)
                opt.step()
                self.losses.append(loss.item())
        self.tuner.close()

    def batch(self, n: int) -> tuple[Tensor, Tensor]:
        y = torch.randint(4, (n,), generator=self.draws)
        return self.means[y] + 1.5 * torch.randn(n, 1, 8, 8, generator=self.draws), y

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(self.model(batch[0]), batch[1])


@pytest.mark.parametrize("total", [200, 20_000])  # without and with a warm-up of 200 steps under way
@pytest.mark.parametrize("seed", [1, 9, 12, 16])
@pytest.mark.slow
def test_a_search_that_runs_away_ends_with_an_lr_that_trains(seed: int, total: int) -> None:
    run = Patterns(seed, total)
    assert 1 <= run.tuner.stats["rollbacks"] <= 2
    assert 1e-3 < float(run.tuner.values["lr"]) < 1
    assert sum(run.losses[-20:]) / 20 < sum(run.losses[:5]) / 5


def test_start_is_undone_where_gradients_are_exactly_zero_and_losses_are_not() -> None:
    assert undone([1.0] * 40, frozenset(range(12, 40))) == 14
    assert undone([1.0] * 40, frozenset({12, 13, 15, 16})) is None
    assert undone([1.0] * 10 + [0.0] * 30, frozenset(range(10, 40))) is None
