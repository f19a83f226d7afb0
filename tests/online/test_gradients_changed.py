"""Gradients that the loop changes between backward and step: clipped by value, or in a way that is not known, at every step."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

import hypergrad
from tests.online.live_loops import (
    FD_RTOL,
    Backward,
    as_given,
    data,
    float64,
    matches_differences,
    mse,
    sgd,
    slope,
    two_layers,
    validation,
)
from tests.tiers import slow_but

__all__ = ["float64"]  # the fixture
VALUE = 0.1  # some elements of a gradient are larger, some are smaller


def by_value(accumulate: int, scaled: bool, model: nn.Module, opt: Any, backward: Backward, scaler: Any = None) -> None:
    """The user's loop; elements that were clipped and others are both met."""
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0) if scaled and scaler is None else scaler
    for x, y in data()[0]:
        opt.zero_grad()
        for rows in torch.arange(6).chunk(accumulate):
            loss = mse(model, (x[rows], y[rows])) / accumulate
            backward(loss if scaler is None else scaler.scale(loss))
        if scaler is not None:
            scaler.unscale_(opt)
        clip_grad_value_(model.parameters(), VALUE)
        opt.step() if scaler is None else scaler.step(opt)
        if scaler is not None:
            scaler.update()


OPTIMIZERS = {
    "sgd": sgd(momentum=0.9),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, eps=1e-4, weight_decay=0.1),
}


@pytest.mark.parametrize(("accumulate", "scaled"), slow_but([(1, False), (1, True), (2, False), (2, True)], (2, True)))
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_clipping_by_value_is_differentiated(name: str, scaled: bool, accumulate: int) -> None:
    def make() -> tuple[Any, Any]:
        model = two_layers()
        return model, OPTIMIZERS[name](model)

    scaler = torch.amp.GradScaler("cpu", init_scale=64.0) if scaled else None

    def train(model: nn.Module, opt: Any, backward: Backward) -> None:
        ours = backward is not Tensor.backward
        by_value(accumulate, scaled, model, opt, backward, scaler if ours else None)

    matches_differences(make, train, clip_value=VALUE, scaler=scaler)


@pytest.mark.parametrize("mode", ["forward", "unrolled"])
def test_whole_step_clips_by_value(mode: str) -> None:
    def ends_at(change: Callable[[Any], None], tuned: bool = False) -> Any:
        model = two_layers()
        opt = sgd(momentum=0.9)(model)
        change(opt)
        validate = validation(model)

        def val_loss() -> Tensor:
            torch.manual_seed(11)
            return validate()

        options = {"every": 12, "horizon": 12, "average": False, "loss": mse, "mode": mode, "clip_value": VALUE}
        tuner = as_given(model, opt, val_loss, **options) if tuned else None
        torch.manual_seed(7)
        if tuner is None:
            by_value(1, False, model, opt, Tensor.backward)
            return val_loss().item()
        for batch in data()[0]:
            tuner.step(batch)
        return tuner

    found = ends_at(lambda _: None, tuned=True).hypergradients
    for name in ("lr", "weight_decay"):
        for i in range(2):

            def at(x: float, name: str = name, i: int = i) -> float:
                return ends_at(lambda opt: opt.param_groups[i].update({name: opt.param_groups[i][name] + x}))

            assert float(found[name][i]) == pytest.approx(slope(at), rel=FD_RTOL), (name, i)


def test_both_clippings_are_refused_before_anything_is_done() -> None:
    model = two_layers()
    with pytest.raises(ValueError, match="clip_norm or clip_value, not both"):
        as_given(model, sgd()(model), validation(model), clip_norm=1.0, clip_value=1.0)
    with pytest.raises(ValueError, match="clip_value must be a positive number"):
        as_given(model, sgd()(model), validation(model), clip_value=-1.0)


# ---- at every step, in a way that is not known: what the loop does, and what the error must say

extra = nn.Parameter(torch.ones(3, dtype=torch.float64))
noise = torch.Generator().manual_seed(3)


def multiplied(model: nn.Module) -> None:
    for p in model.parameters():
        if p.grad is not None:
            p.grad.mul_(0.25)


def noisy(model: nn.Module) -> None:
    for p in model.parameters():
        if p.grad is not None:
            p.grad.add_(1e-3 * torch.randn(p.shape, generator=noise))


def centred(model: nn.Module) -> None:
    for p in model.parameters():
        if p.grad is not None and p.dim() > 1:
            p.grad.sub_(p.grad.mean(1, keepdim=True))


def with_others(model: nn.Module) -> None:
    extra.grad = torch.rand(3, generator=noise)
    clip_grad_norm_([*model.parameters(), extra], 0.01)


CHANGES: dict[str, tuple[Callable[[nn.Module], Any], dict[str, Any], str]] = {
    "clipped by norm": (lambda m: clip_grad_norm_(m.parameters(), 0.01), {}, r"Pass clip_norm=0\.01\."),
    "another threshold": (
        lambda m: clip_grad_norm_(m.parameters(), 0.01), {"clip_norm": 0.02}, r"Pass clip_norm=0\.01\."),
    "clipped by value": (lambda m: clip_grad_value_(m.parameters(), 1e-3), {}, r"Pass clip_value=0\.001\."),
    "another value": (lambda m: clip_grad_value_(m.parameters(), 1e-3), {"clip_value": 1.0}, r"Pass clip_value=0\.001\."),
    "multiplied": (multiplied, {}, r"multiplied by 0\.25.*scaler="),
    "over others too": (with_others, {"clip_norm": 0.01}, "optimizer's parameters alone"),
    "some parameters": (lambda m: clip_grad_norm_(m[3].parameters(), 1e-3), {}, "all parameters at once"),
    "noise": (noisy, {}, "p.register_hook"),
    "centred": (centred, {}, "p.register_hook"),
}  # fmt: skip


def run(change: Callable[[nn.Module], Any], steps: int, freeze: bool = False, every: int = 1, **kw: Any) -> Any:
    model = two_layers()
    opt = sgd()(model)
    tuner = as_given(model, opt, validation(model), tune=("lr",), every=1000, **kw)
    if freeze:
        tuner.freeze()
    batches, before = data()[0] * 3, list[Tensor]()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for t in range(steps):
                opt.zero_grad()
                tuner.backward(mse(model, batches[t]))
                if t % every == 0:
                    change(model)
                before = [p.detach().clone() for p in model.parameters()]
                opt.step()
    except ValueError as error:
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        return tuner, str(error)
    return tuner, None


@pytest.mark.parametrize("name", CHANGES)
def test_gradients_changed_at_twenty_steps_in_a_row_are_an_error_that_names_the_cause(name: str) -> None:
    change, options, cause = CHANGES[name]
    tuner, said = run(change, 30, **options)
    assert tuner.stats["steps"] == 19
    assert said is not None and re.search(cause, said), said


def test_what_the_error_says_to_do_works() -> None:
    for options in ({"clip_norm": 0.01}, {"clip_value": 1e-3}):
        change = partial(lambda m, options: (clip_grad_norm_ if "clip_norm" in options else clip_grad_value_)(
            m.parameters(), *options.values()), options=options)  # fmt: skip
        tuner, said = run(change, 30, **options)
        assert said is None and tuner.stats["changed_gradients"] == 0
    model = two_layers()
    handle = model[3].weight.register_hook(lambda g: g - g.mean(1, keepdim=True))
    assert handle is not None
    opt = sgd()(model)
    tuner = as_given(model, opt, validation(model), tune=("lr",), every=1000)
    for batch in data()[0] * 2:
        opt.zero_grad()
        tuner.backward(mse(model, batch))
        opt.step()
    assert tuner.stats["changed_gradients"] == 0


@pytest.mark.parametrize("case", ["frozen", "now and then"])
def test_gradients_changed_where_nothing_is_lost_by_it_are_no_error(case: str) -> None:
    tuner, said = run(noisy, 30, freeze=case == "frozen", every=2 if case == "now and then" else 1)
    assert said is None and tuner.stats["steps"] == 30 and isinstance(tuner, hypergrad.Tuner)


def plainly(model: nn.Module, opt: Any, tuner: hypergrad.Tuner, by_tuner: Callable[[int], bool]) -> None:
    """30 steps; at some of them, or none, gradients come from the tuner."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for t, batch in enumerate((data()[0] * 5)[:30]):
            opt.zero_grad()
            torch.manual_seed(t)
            loss = mse(model, batch)
            tuner.backward(loss) if by_tuner(t) else loss.backward()
            opt.step()


def test_a_backward_that_was_never_replaced_is_an_error_at_the_twentieth_step() -> None:
    """lr and weight decay would move by tangents of one step, and the run with them."""
    model, same = two_layers(), two_layers()
    opt = sgd()(model)
    tuner = as_given(model, opt, validation(model), tune=("lr",), every=1000)
    with pytest.raises(ValueError, match=r"none .* of the first 20 .*accelerate.*freeze\(\)"):
        plainly(model, opt, tuner, lambda t: False)
    assert tuner.stats["steps"] == tuner.stats["plain_steps"] - 1 == 19
    stock = sgd()(same)
    for t, batch in enumerate((data()[0] * 5)[:19]):
        stock.zero_grad()
        torch.manual_seed(t)
        mse(same, batch).backward()
        stock.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), same.parameters(), strict=True))


@pytest.mark.parametrize("case", ["frozen", "once"])
def test_steps_of_plain_backward_are_no_error(case: str) -> None:
    model = two_layers()
    opt = sgd()(model)
    tuner = as_given(model, opt, validation(model), tune=("lr",), every=1000)
    if case == "frozen":
        tuner.freeze()
    plainly(model, opt, tuner, lambda t: case == "once" and t == 5)
    assert tuner.stats["steps"] == 30 and tuner.stats["plain_steps"] == 30 - (case == "once")


def test_clipping_between_two_backward_calls_is_said_with_when_to_clip() -> None:
    model = two_layers()
    opt = sgd()(model)
    tuner = as_given(model, opt, validation(model), tune=("lr",), clip_norm=0.01)
    x, y = data()[0][0]
    with pytest.warns(
        UserWarning,
        match="not clipped as clip_norm=0.01 says: clip at that threshold, once a step, after its last backward",
    ):
        for rows in torch.arange(6).chunk(2):
            tuner.backward(mse(model, (x[rows], y[rows])) / 2)
            clip_grad_norm_(model.parameters(), 0.01)
        opt.step()


# ---- many weights, in float32


def clip_by_exact_norm(parameters: list[Tensor], most: float) -> None:
    """A loop's own clipping, of the norm in float64."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = sum(g.double().square().sum() for g in grads).sqrt().item()  # type: ignore[union-attr]
    for g in grads:
        g.mul_(most / (norm + 1e-6))


@pytest.mark.slow
@pytest.mark.parametrize("clip", [clip_grad_norm_, clip_by_exact_norm])
def test_clipping_is_known_where_sums_over_all_weights_are_inexact(clip: Callable[..., Any]) -> None:
    """25 million weights, two SGD steps: dL/dlr by differences of the same steps written out in float64."""
    width, most, lr = 5000, 0.5, 0.1
    torch.manual_seed(0)
    first = nn.Linear(width, width, bias=False)
    x = torch.randn(3, 2, width) / width**0.5
    start, y = first.weight.detach().clone(), torch.full((3, 2, width), 0.3)

    def loss_of(weight: Tensor, t: int) -> Tensor:
        return (torch.tanh(x[t].to(weight) @ weight.T) - y[t].to(weight)).square().sum()

    def by_hand(lr: float) -> float:
        theta = start.double()
        for t in range(2):
            theta.requires_grad_()
            (g,) = torch.autograd.grad(loss_of(theta, t), theta)
            theta = theta.detach() - lr * g * min(1.0, most / (g.norm().item() + 1e-6))
        return loss_of(theta, 2).item()

    true = (by_hand(lr + 1e-4) - by_hand(lr - 1e-4)) / 2e-4
    opt = torch.optim.SGD(first.parameters(), lr=lr)
    tuner = hypergrad.Tuner(
        first,
        opt,
        lambda: loss_of(first.weight, 2),
        ("lr",),
        every=2,
        clip_norm=most,
        cost=None,
        average=False,
        warm_start=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for t in range(2):
            opt.zero_grad()
            tuner.backward(loss_of(first.weight, t))
            clip(list(first.parameters()), most)
            opt.step()
    assert tuner.stats["changed_gradients"] == 0
    assert tuner.hypergradients["lr"].item() == pytest.approx(true, rel=1e-3)
