"""`Tuner(clip_norm=…)`, or clip_value, of a loop that does not clip: said once; and loops of which it must not be said."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

import hypergrad
from hypergrad.online.told_clipping import PATIENCE
from tests.online.live_loops import as_given, data, float64, mse, sgd, two_layers, validation

__all__ = ["float64"]  # the fixture
LOW, HIGH = 1e-3, 1e3  # below the norm, and the largest element, of every gradient; above them
Clip = Callable[[list[Tensor], int], Any]


def nothing(params: list[Tensor], t: int) -> None:
    """What a loop does that clips nothing."""


def train(
    clip: Clip, steps: int = 30, scaled: bool = False, accumulate: int = 1, **options: Any
) -> tuple[hypergrad.Tuner, list[str]]:
    """What is said of a loop that does `clip(params, t)` between backward and step."""
    model = two_layers()
    opt = sgd()(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0) if scaled else None
    tuner = as_given(model, opt, validation(model), tune=("lr",), every=1000, scaler=scaler, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for t in range(steps):
            torch.manual_seed(t)
            x, y = data()[0][t % 12]
            opt.zero_grad()
            for rows in torch.arange(6).chunk(accumulate):
                loss = mse(model, (x[rows], y[rows])) / accumulate
                tuner.backward(loss if scaler is None else scaler.scale(loss))
            if scaler is not None:
                scaler.unscale_(opt)
            clip(list(model.parameters()), t)
            opt.step() if scaler is None else scaler.step(opt)
            if scaler is not None:
                scaler.update()
    return tuner, [str(w.message) for w in caught]


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", ["clip_norm", "clip_value"])
def test_a_loop_that_was_said_to_clip_and_does_not_is_told_at_the_twentieth_step(name: str, scaled: bool) -> None:
    assert train(nothing, PATIENCE - 1, scaled, **{name: LOW})[1] == []
    tuner, said = train(nothing, 30, scaled, **{name: LOW})
    assert (
        len(said) == 1
        and f"{name}=0.001 was given" in said[0]
        and f"utils.{name.replace('clip', 'clip_grad')}_(" in said[0]
    )
    assert tuner.stats["changed_gradients"] == 0 and tuner.stats["steps"] == 30


def by_norm(first: int = 0) -> Clip:
    """From step `first` on."""

    def clip(params: list[Tensor], t: int) -> None:
        if t >= first:
            clip_grad_norm_(params, LOW)

    return clip


def by_value(params: list[Tensor], t: int) -> None:
    clip_grad_value_(params, LOW)


SILENT: dict[str, tuple[Clip, dict[str, Any]]] = {
    "clipped by norm": (by_norm(), {"clip_norm": LOW}),
    "clipped by value": (by_value, {"clip_value": LOW}),
    "clipped by value, scaled": (by_value, {"clip_value": LOW, "scaled": True}),
    "scaled": (by_norm(), {"clip_norm": LOW, "scaled": True}),
    "accumulated": (by_norm(), {"clip_norm": LOW, "accumulate": 3}),
    "from a later step on": (by_norm(first=PATIENCE - 1), {"clip_norm": LOW}),
    "norms below the threshold": (nothing, {"clip_norm": HIGH}),
    "elements below the threshold": (nothing, {"clip_value": HIGH}),
    "norms below the threshold, scaled": (nothing, {"clip_norm": HIGH, "scaled": True}),
}


@pytest.mark.parametrize("case", SILENT)
def test_nothing_is_said_of_loops_that_clip_or_have_nothing_to_clip(case: str) -> None:
    clip, options = SILENT[case]
    assert train(clip, 60, **options)[1] == []


@pytest.mark.parametrize("together", [True, False])
def test_nothing_is_said_of_optimizers_whose_norms_are_below_the_threshold_each_by_itself(together: bool) -> None:
    """The norm of all is above it: clipped together they change, clipped apart they do not."""
    first, second = two_layers(), two_layers(1)
    model = nn.ModuleList([first, second])
    opts = [torch.optim.SGD(x.parameters(), lr=1e-5) for x in (first, second)]
    for x in (first, second):
        x.eval()
        x.requires_grad_(True)

    def loss() -> Tensor:
        return mse(first, data()[0][0]) + mse(second, data()[0][0])

    norms = [
        torch.stack([g.norm() for g in torch.autograd.grad(loss(), list(x.parameters()))]).norm().item()
        for x in (first, second)
    ]
    at = 1.05 * max(norms)
    assert sum(n**2 for n in norms) > at**2
    tuner = as_given(
        model, opts, lambda: mse(first, data()[1]) + mse(second, data()[1]), tune=("lr",), every=1000, clip_norm=at
    )
    for _ in range(60):
        for opt in opts:
            opt.zero_grad()
        tuner.backward(loss())
        for params in [model.parameters()] if together else [x.parameters() for x in (first, second)]:
            clip_grad_norm_(params, at)
        for opt in opts:
            opt.step()
    assert tuner.stats["changed_gradients"] == 0  # warnings are errors
