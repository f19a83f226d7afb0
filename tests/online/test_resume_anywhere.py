"""A run killed after any of its steps and gone on with ends as one that was not, bit for bit, whatever happens in it.

The runs are eventful on purpose: bad batches, spikes, roll-backs, backtracks, changes of phase, clipping, a scheduler,
several optimizers that do not step equally often.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hypergrad
from hypergrad.policies import DEFAULT, AdamOnPhi, DivergenceGuard, LrWarmStart, Phases, without
from tests.online.live_loops import float64

__all__ = ["float64"]  # the fixture
SPIKE, NOT_A_NUMBER = 1e4, math.nan
PLAN = {"cost": 3.0, "product": 2.0, "validation": 2.0, "every": 4, "resting": 8, "stride": 2}


def net() -> nn.Sequential:
    """BatchNorm, so that buffers matter."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1))


def batch(t: int, n: int = 8) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(t)
    x = torch.randn(n, 5, generator=g)
    return x, x.sum(1, keepdim=True).sin() + 0.5 * torch.randn(n, 1, generator=g)


def one(lr: float = 0.05, **kw: Any) -> Callable[[nn.Sequential], list[Any]]:
    return lambda m: [torch.optim.SGD(m.parameters(), lr=lr, momentum=0.9, **kw)]


def adamw(m: nn.Sequential) -> list[Any]:
    return [torch.optim.AdamW(m.parameters(), lr=0.02, weight_decay=0.1)]


class Own(torch.optim.Optimizer):
    """Momentum, with a step counter, a flag, a history and a function that no update rule knows."""

    def __init__(self, params: Any, lr: float):
        super().__init__(params, {"lr": lr, "decay": 0.9, "form": (1, "heavy")})
        self.shape, self.last = math.sqrt, (None, [0, True])

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state["n"] = state.get("n", 0) + 1
                    state["m"] = group["decay"] * state.get("m", torch.zeros_like(p)) + p.grad
                    p.sub_(group["lr"] * state["m"])


def own(m: nn.Sequential) -> list[Any]:
    return [Own(m.parameters(), lr=0.05)]


def two(m: nn.Sequential) -> list[Any]:
    return [
        torch.optim.SGD(m[:2].parameters(), lr=0.05, momentum=0.9),
        torch.optim.AdamW(m[2:].parameters(), lr=0.02, weight_decay=0.1),
    ]


@dataclass
class Eventful:
    """A loop. `disturbed`: step → the factor on its loss; `happens`: the counts that must not be 0 at the end."""

    optimizers: Callable[[nn.Sequential], list[Any]] = adamw
    steps: int = 40
    disturbed: dict[int, float] = field(default_factory=dict)
    happens: tuple[str, ...] = ()
    clip: dict[str, float] = field(default_factory=dict)
    scheduler: Callable[[Any], Any] | None = None
    turns: Callable[[int], Iterable[int]] | None = None  # the optimizer whose turn it is at a step; None: all of them
    tuner: dict[str, Any] = field(default_factory=dict)


THREE_BAD = {25: NOT_A_NUMBER, 26: NOT_A_NUMBER, 27: NOT_A_NUMBER}
EVENTFUL = {
    "quiet": Eventful(),
    "warm start, phases": Eventful(tuner={"total_steps": 40}),
    "bad batches": Eventful(disturbed={5: NOT_A_NUMBER, 30: NOT_A_NUMBER}, happens=("nonfinite_steps",)),
    "bad batch before any good state": Eventful(disturbed={0: NOT_A_NUMBER}, happens=("nonfinite_steps",)),
    "spikes": Eventful(disturbed={20: SPIKE, 28: SPIKE}, happens=("spikes",)),
    "roll-back": Eventful(one(), disturbed=THREE_BAD, happens=("rollbacks",)),
    "two roll-backs": Eventful(one(), disturbed=THREE_BAD | {t + 8: SPIKE for t in THREE_BAD}, happens=("rollbacks",)),
    "blow-up": Eventful(one(3.0), tuner={"warm_start": False}, happens=("rollbacks",)),
    "clipped": Eventful(one(), clip={"clip_norm": 0.5}, disturbed=THREE_BAD, happens=("rollbacks",)),
    "cheap": Eventful(tuner={"plan": PLAN, "every": 4}, disturbed=THREE_BAD, happens=("rollbacks",)),
    "scheduler": Eventful(
        one(),
        scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 40),
        disturbed=THREE_BAD,
        happens=("rollbacks",),
    ),
    "backtrack": Eventful(
        lambda m: [torch.optim.SGD(m.parameters(), lr=1.0)],
        tuner={"warm_start": False, "every": 2, "policies": without(DEFAULT, DivergenceGuard)},
        happens=("backtracks",),
    ),
    "start undone": Eventful(
        lambda m: [torch.optim.Adam(m.parameters(), lr=0.1)],
        steps=60,
        disturbed=dict.fromkeys(range(12, 60), 30.0),
        tuner={"policies": [Phases(), LrWarmStart(), AdamOnPhi()]},
        happens=("rollbacks",),
    ),
    "an optimizer of one's own": Eventful(own, tuner={"tune": "lr"}, disturbed=THREE_BAD, happens=("rollbacks",)),
    "one's own, total known": Eventful(own, tuner={"tune": "lr", "total_steps": 40}, disturbed={5: NOT_A_NUMBER}),
    "two optimizers": Eventful(two, disturbed=THREE_BAD, happens=("rollbacks",)),
    "in turn": Eventful(two, turns=lambda t: [t % 2], disturbed=THREE_BAD | {30: SPIKE}),
    "three to one": Eventful(two, turns=lambda t: [int(t % 4 == 3)], disturbed={14: NOT_A_NUMBER}),
}  # fmt: skip


class Run:
    """A user's script, made anew each time."""

    def __init__(self, case: Eventful):
        self.case, self.model = case, net()
        self.optimizers = case.optimizers(self.model)
        x, y = batch(10**6, 64)
        self.tuner = hypergrad.Tuner(
            self.model,
            self.optimizers,
            lambda: ((self.model(x) - y) ** 2).mean(),
            **{"every": 3, **case.clip, **case.tuner},
        )
        self.schedulers = [case.scheduler(o) for o in self.optimizers] if case.scheduler else []

    @property
    def parts(self) -> list[Any]:
        return [self.model, *self.optimizers, *self.schedulers, self.tuner]

    def train(self, first: int, last: int) -> None:
        for t in range(first, last):
            torch.manual_seed(t)
            mine = range(len(self.optimizers)) if self.case.turns is None else self.case.turns(t)
            x, y = batch(t)
            factor = self.case.disturbed.get(t, 1.0)
            self.model.zero_grad()
            loss = ((self.model(x * math.nan if math.isnan(factor) else x) - y) ** 2).mean() * max(1.0, factor)
            self.tuner.backward(loss)
            if self.case.clip:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.case.clip["clip_norm"])
            for i in mine:
                self.optimizers[i].step()
            for scheduler in self.schedulers:
                scheduler.step()

    def saved(self) -> bytes:
        file = io.BytesIO()
        torch.save([x.state_dict() for x in self.parts], file)
        return file.getvalue()

    def load(self, saved: bytes) -> None:
        for x, state in zip(self.parts, torch.load(io.BytesIO(saved), weights_only=True), strict=True):
            x.load_state_dict(state)

    def ends_with(self) -> dict[str, Any]:
        return {
            **{f"weights {name}": x.clone() for name, x in self.model.state_dict().items()},
            **{f"values {name}": x for name, x in self.tuner.values.items()},
            "stats": self.tuner.stats,
            "best": (self.tuner.best_step, self.tuner.best_val_loss),
        }


def same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else repr(a) == repr(b)


def resumed(case: Eventful, stops: Iterable[int]) -> list[tuple[int, str]]:
    """Where runs killed after so many steps and gone on with differ from the run that was not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole, states = Run(case), dict[int, bytes]()
        for t in range(case.steps):
            states[t] = whole.saved()
            whole.train(t, t + 1)
        end, out = whole.ends_with(), list[tuple[int, str]]()
        assert all(whole.tuner.stats[name] > 0 for name in case.happens), whole.tuner.stats
        for t in stops:
            again = Run(case)
            again.load(states[t])
            again.train(t, case.steps)
            out += [(t, name) for name, x in again.ends_with().items() if not same(x, end[name])]
        return out


@pytest.mark.parametrize("name", EVENTFUL)
@pytest.mark.slow
def test_run_killed_now_and_then_ends_bit_equal(name: str) -> None:
    assert not resumed(EVENTFUL[name], (1, 26, 31))


@pytest.mark.slow
@pytest.mark.parametrize("name", EVENTFUL)
def test_run_killed_after_any_step_ends_bit_equal(name: str) -> None:
    assert not resumed(EVENTFUL[name], range(EVENTFUL[name].steps))
