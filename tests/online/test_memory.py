"""Memory of a tuned loop beyond that of a plain one, in vectors as long as the weights; who sees what is written in place."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils._pytree import tree_leaves

import hypergrad
import hypergrad.optimizers.transition as steps
from experiments.price import Alive, net, stepper
from hypergrad.optimizers.binding import State


def counted(optimizer: str, **options: Any) -> tuple[float, float]:
    """The most bytes alive in the first 25 steps, and those alive after them, over 4 n."""
    with warnings.catch_warnings(), Alive() as alive:
        warnings.simplefilter("ignore")
        model, loss = net(8, 2)
        step = stepper(model, loss, optimizer, **options)
        for _ in range(25):
            step()
        size = 4 * sum(p.numel() for p in model.parameters())
        return alive.peak / size, alive.now / size


@pytest.mark.parametrize(
    ("optimizer", "kept"),
    [
        # tangents, averages, two good states (slots in half as much), the start, the record, the weights as a step left them,
        # and the last gradient with its tangent, which may be added to
        pytest.param("AdamW", 3 + 2 + 4 + 1 + 1 + 1 + 2, marks=pytest.mark.slow),
        ("SGD with momentum", 2 + 2 + 3 + 1 + 1 + 1 + 2),
    ],
)
def test_what_is_kept_between_steps_and_at_the_peak(optimizer: str, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "CHUNK", 8000)  # as long weights are worked on: a piece at a time
    plain = counted(optimizer)
    tuned = counted(optimizer, total_steps=1000)
    assert tuned[1] - plain[1] < kept + 0.1
    assert tuned[0] - plain[0] < kept + 1.6  # and what a product takes in torch


class Loop:
    """A small net on fixed data."""

    def __init__(self, steps: int, **options: Any):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.x = torch.randn(96, 5)
        self.y = self.x[:, :1].sin() + 0.3 * torch.randn(96, 1)
        self.tuner = hypergrad.Tuner(
            self.model, self.optimizer, lambda: self.loss(slice(64, 96)), total_steps=steps, **options
        )

    def loss(self, rows: slice) -> Tensor:
        return mse_loss(self.model(self.x[rows]), self.y[rows])

    def train(self, steps: int) -> None:
        for t in range(steps):
            self.optimizer.zero_grad()
            self.tuner.backward(self.loss(slice(8 * (t % 8), 8 * (t % 8) + 8)))
            self.optimizer.step()


@pytest.mark.parametrize("done", [4, 40, 150])
def test_a_state_in_memory_is_not_written_to(done: int) -> None:
    """Neither by the tuner that gave it nor by one that took it over."""

    def values(state: Any) -> list[Tensor]:
        return [x.clone() for x in tree_leaves(state) if isinstance(x, Tensor)]

    loop, other = Loop(200), Loop(200)
    loop.train(done)
    for x, y in ((loop.model, other.model), (loop.optimizer, other.optimizer)):
        y.load_state_dict(copy.deepcopy(x.state_dict()))
    state = loop.tuner.state_dict()
    before = values(state)
    assert len(before) > 8
    loop.train(30)
    other.tuner.load_state_dict(state)
    other.train(30)
    assert all(torch.equal(x, y) for x, y in zip(values(state), before, strict=True))


def test_a_roll_back_to_rounded_moments_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments of good states are kept in bfloat16: the run goes on from there as with exact ones, but for rounding."""

    def end() -> float:
        loop = Loop(200)
        loop.train(100)
        with torch.no_grad():
            for p in loop.model.parameters():
                p.mul_(30)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loop.train(100)
        assert loop.tuner.stats["rollbacks"] == 1
        return loop.loss(slice(64, 96)).item()

    rounded, copied = end(), State.copied
    monkeypatch.setattr(State, "copied", lambda self, dtype=None: copied(self))
    exact = end()
    assert rounded != exact and rounded == pytest.approx(exact, rel=5e-3)
