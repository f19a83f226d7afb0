"""A tuner's state that is loaded beside other weights, or into a tuner of another length, and loads of which nothing is said."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

import hypergrad
from tests.online.live_loops import data, float64, mse, sgd, two_layers, validation

__all__ = ["float64"]  # the fixture
MIDDLE = 7
OTHER = "weights at the first step after tuner.load_state_dict are not those"


class Run:
    """A user's script; `normalised`: weights are written before every step."""

    def __init__(
        self, mode: str = "forward", normalised: bool = False, optimizer: Any = None, seed: int = 0, **kw: Any
    ):
        self.model = two_layers(seed)
        self.optimizer = (optimizer or sgd(momentum=0.9))(self.model)
        options = {"mode": mode, "loss": mse, "horizon": 5, "every": 3, **kw}
        self.tuner = hypergrad.Tuner(self.model, self.optimizer, validation(self.model), **options)
        self.mode, self.normalised = mode, normalised

    def train(self, first: int, last: int) -> list[str]:
        """What is said."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for t in range(first, last):
                torch.manual_seed(t)
                if self.normalised:
                    normalise(self.model)
                if self.mode == "forward":
                    self.optimizer.zero_grad()
                    self.tuner.backward(mse(self.model, data()[0][t]))
                    self.optimizer.step()
                else:
                    self.tuner.step(data()[0][t])
        return [str(w.message) for w in caught]

    def load(self, other: Run, parts: Sequence[str] = ("model", "optimizer", "tuner")) -> None:
        for part in parts:
            getattr(self, part).load_state_dict(copy.deepcopy(getattr(other, part).state_dict()))


@torch.no_grad()
def normalise(model: nn.Module) -> None:
    for p in model.parameters():
        if p.dim() == 2:
            p.div_(p.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("mode", ["forward", "unrolled"])
def test_a_state_beside_other_weights_is_said_once_at_the_first_step(mode: str, seed: int) -> None:
    """Other weights: the first ones of the same run, and those of another one."""
    half, again = Run(mode), Run(mode, seed=seed)
    half.train(0, MIDDLE)
    again.load(half, ["tuner"])
    said = again.train(MIDDLE, 12)
    assert [OTHER in x for x in said].count(True) == 1


@pytest.mark.parametrize("order", list(itertools.permutations(["model", "optimizer", "tuner"])))
def test_nothing_is_said_whatever_is_loaded_first(order: tuple[str, ...]) -> None:
    half, again = Run(), Run()
    half.train(0, MIDDLE)
    again.load(half, order)
    assert again.train(MIDDLE, 12) == []


@pytest.mark.parametrize("compact", [False, True])
def test_nothing_is_said_of_a_run_that_goes_back_to_a_state_of_its_own(compact: bool) -> None:
    run = Run()
    run.train(0, 4)
    states = [copy.deepcopy(x.state_dict()) for x in (run.model, run.optimizer)]
    state = copy.deepcopy(run.tuner.state_dict(compact=compact))
    run.train(4, MIDDLE)
    for x, old in zip((run.model, run.optimizer), states, strict=True):
        x.load_state_dict(old)
    run.tuner.load_state_dict(state)
    assert run.train(4, 12) == []


def test_nothing_is_said_of_weights_that_the_loop_itself_writes_before_every_step() -> None:
    half, again = Run(normalised=True), Run(normalised=True)
    half.train(0, MIDDLE)
    again.load(half)
    assert not any(OTHER in x for x in again.train(MIDDLE, 12))


class TwoKinds(torch.optim.SGD):
    """As optimizers without a schedule: what is saved is not what is trained."""

    def eval(self) -> None:
        self._scale(1.1)

    def train(self) -> None:
        self._scale(1 / 1.1)

    @torch.no_grad()
    def _scale(self, by: float) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(by)


def test_nothing_is_said_of_optimizers_that_train_other_weights_than_they_save() -> None:
    half, again = (Run(optimizer=lambda m: TwoKinds(m.parameters(), lr=0.05), tune=("lr",)) for _ in range(2))
    half.train(0, MIDDLE)
    half.optimizer.eval()
    again.load(half)
    again.optimizer.train()
    assert not any(OTHER in x for x in again.train(MIDDLE, 12))


@pytest.mark.parametrize(("then", "now"), [(10, 40), (40, None), (None, 40)])
def test_a_state_of_a_run_of_another_length_is_said(then: int | None, now: int | None) -> None:
    half, again = Run(total_steps=then), Run(total_steps=now)
    half.train(0, MIDDLE)
    with pytest.warns(UserWarning, match=rf"total_steps={then}, this tuner has total_steps={now}"):
        again.load(half)
    assert again.train(MIDDLE, 10) == []
