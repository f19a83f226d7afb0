"""A tuner of several optimizers in users' loops: hypergradients against finite differences of those very loops."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR

import hypergrad
from tests.online.live_loops import FD_RTOL, STEPS, as_given, data, float64, groups, mse, slope, two_layers, validation
from tests.tiers import slow_but

__all__ = ["float64"]  # the fixture
Loop = Callable[[nn.Sequential, list[Any], Callable[[Tensor], None], Any], None]
CLIP = 0.5


def make() -> tuple[nn.Sequential, list[torch.optim.SGD]]:
    model = two_layers()
    return model, [torch.optim.SGD([part], lr=0.05, weight_decay=0.01, momentum=0.8) for part in groups(model)]


def clip(model: nn.Sequential) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), CLIP)


def together(
    order: int = 1, clipped: bool = False, schedule: Callable[[Any], Any] | None = None, accumulate: int = 1
) -> Loop:
    """One backward for all, then every optimizer steps."""

    def loop(model: nn.Sequential, opts: list[Any], backward: Callable[[Tensor], None], scaler: Any) -> None:
        schedulers = [schedule(opt) for opt in opts] if schedule else []
        for x, y in data()[0]:
            for opt in opts:
                opt.zero_grad()
            for rows in torch.arange(6).chunk(accumulate):
                loss = mse(model, (x[rows], y[rows])) / accumulate
                backward(loss if scaler is None else scaler.scale(loss))
            if clipped:
                for opt in opts if scaler is not None else ():
                    scaler.unscale_(opt)
                clip(model)
            for opt in opts[::order]:
                opt.step() if scaler is None else scaler.step(opt)
            if scaler is not None:
                scaler.update()
            for s in schedulers:
                s.step()

    return loop


def in_turn(model: nn.Sequential, opts: list[Any], backward: Callable[[Tensor], None], scaler: Any) -> None:
    """A backward and a step for each."""
    for batch in data()[0]:
        for opt in opts:
            opt.zero_grad()
            loss = mse(model, batch)
            backward(loss if scaler is None else scaler.scale(loss))
            opt.step() if scaler is None else scaler.step(opt)
            if scaler is not None:
                scaler.update()


def all_zeroed_in_turn(model: nn.Sequential, opts: list[Any], backward: Callable[[Tensor], None], scaler: Any) -> None:
    """The same with every gradient zeroed before each backward, and clipped over all."""
    for batch in data()[0]:
        for opt in opts:
            model.zero_grad()
            backward(mse(model, batch))
            clip(model)
            opt.step()


def second_twice(model: nn.Sequential, opts: list[Any], backward: Callable[[Tensor], None], scaler: Any) -> None:
    """The second steps twice as often, as a critic does."""
    for i, batch in enumerate(data()[0]):
        for opt in (opts[1], opts[1], opts[0]) if i < STEPS - 1 else opts:
            opt.zero_grad()
            backward(mse(model, batch))
            opt.step()


def halving(opt: Any) -> Any:
    return LambdaLR(opt, lambda t: 0.5 ** (t / 4))


LOOPS: dict[str, tuple[Loop, dict[str, Any]]] = {
    "plain": (together(), {}),
    "clipped": (together(clipped=True), {"clip_norm": CLIP}),
    "scaled": (together(), {"scaler": True}),
    "scaled and clipped": (together(clipped=True), {"scaler": True, "clip_norm": CLIP}),
    "accumulated, clipped": (together(accumulate=2, clipped=True), {"clip_norm": CLIP}),
    "reversed": (together(order=-1), {}),
    "reversed, clipped": (together(order=-1, clipped=True), {"clip_norm": CLIP}),
    "in turn": (in_turn, {}),
    "in turn, scaled": (in_turn, {"scaler": True}),
    "in turn, all zeroed, clipped": (all_zeroed_in_turn, {"clip_norm": CLIP}),
    "second twice": (second_twice, {"every": 2 * STEPS - 1}),
}


def run(loop: Loop, change: Callable[[list[Any]], None] | None = None, scaled: bool = False) -> float:
    """The validation loss after the user's own loop."""
    model, opts = make()
    if change:
        change(opts)
    torch.manual_seed(7)
    loop(model, opts, Tensor.backward, torch.amp.GradScaler("cpu", init_scale=64.0) if scaled else None)
    torch.manual_seed(11)
    return validation(model)().item()


def tuned(loop: Loop, wrt: tuple[str, ...] = ("lr", "weight_decay"), **options: Any) -> hypergrad.Tuner:
    model, opts = make()
    validate = validation(model)

    def val_loss() -> Tensor:
        torch.manual_seed(11)
        return validate()

    scaler = torch.amp.GradScaler("cpu", init_scale=64.0) if options.pop("scaler", False) else None
    options = {"every": STEPS, "average": False} | options
    tuner = as_given(model, opts, val_loss, tune=wrt, scaler=scaler, **options)
    torch.manual_seed(7)
    loop(model, opts, tuner.backward, scaler)
    assert tuner.stats["hyper_steps"] == 1
    return tuner


@pytest.mark.parametrize("name", slow_but(LOOPS, "plain", "in turn", "accumulated, clipped", "scaled and clipped"))
def test_several_optimizers_have_the_hypergradients_of_finite_differences(name: str) -> None:
    loop, options = LOOPS[name]
    tuner = tuned(loop, **options)
    assert tuner.stats["plain_steps"] == tuner.stats["changed_gradients"] == tuner.stats["capped"] == 0
    assert tuner.val_loss == pytest.approx(run(loop, scaled="scaler" in options), rel=1e-12)
    for hyper, gradient in tuner.hypergradients.items():
        for i, got in enumerate(gradient.tolist()):

            def at(x: float, hyper: str = hyper, i: int = i) -> float:
                def change(opts: list[Any]) -> None:
                    opts[i].param_groups[0][hyper] += x

                return run(loop, change, "scaler" in options)

            assert got == pytest.approx(slope(at), rel=FD_RTOL), (hyper, i)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("schedule", [halving, lambda opt: ExponentialLR(opt, 0.9)])
def test_several_optimizers_each_with_a_scheduler(schedule: Callable[[Any], Any], order: int) -> None:
    loop = together(order, schedule=schedule)
    tuner = tuned(loop, ("lr",))
    assert tuner.stats["plain_steps"] == tuner.stats["changed_gradients"] == 0
    for i, got in enumerate(tuner.hypergradients["lr"].tolist()):

        def at(x: float, i: int = i) -> float:
            def change(opts: list[Any]) -> None:
                opts[i].param_groups[0]["lr"] += x

            return run(loop, change)

        assert got == pytest.approx(slope(at), rel=FD_RTOL), i


def test_several_optimizers_in_turn_clipped_over_what_is_left_of_the_others_is_never_silent() -> None:
    """The norm is also over gradients that the other optimizer has used and not zeroed: counted, or right."""

    def loop(model: nn.Sequential, opts: list[Any], backward: Callable[[Tensor], None], scaler: Any) -> None:
        for batch in data()[0]:
            for opt in opts:
                opt.zero_grad()
                backward(mse(model, batch))
                clip(model)
                opt.step()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuner = tuned(loop, ("lr",), clip_norm=CLIP)
    if tuner.stats["changed_gradients"]:
        return
    for i, got in enumerate(tuner.hypergradients["lr"].tolist()):

        def at(x: float, i: int = i) -> float:
            def change(opts: list[Any]) -> None:
                opts[i].param_groups[0]["lr"] += x

            return run(loop, change)

        assert got == pytest.approx(slope(at), rel=FD_RTOL), i


def test_several_optimizers_clipped_each_by_itself_is_counted() -> None:
    def loop(model: nn.Sequential, opts: list[Any], backward: Callable[[Tensor], None], scaler: Any) -> None:
        for batch in data()[0]:
            model.zero_grad()
            backward(mse(model, batch))
            for opt in opts:
                nn.utils.clip_grad_norm_(opt.param_groups[0]["params"], CLIP / 4)
                opt.step()

    with pytest.warns(UserWarning, match="in a way hypergrad does not know"):
        tuner = tuned(loop, clip_norm=CLIP / 4)
    assert tuner.stats["changed_gradients"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("scaled", [False, True])
def test_several_optimizers_survive_a_blow_up(scaled: bool) -> None:
    """Gradients are taken from all of them; a scaler that comes to the next one is not upset."""
    model, opts = make()
    opts[1].param_groups[0]["lr"] = 100.0
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0) if scaled else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuner = as_given(model, opts, validation(model), tune=("lr",), every=5, scaler=scaler)
        for _ in range(20):
            together()(model, opts, tuner.backward, scaler)
    assert tuner.stats["rollbacks"] > 0
    assert float(tuner.values["lr"][1]) < 30
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_several_optimizers_frozen_train_bit_identically() -> None:
    for loop, options in LOOPS.values():
        results = []
        for watched in (False, True):
            model, opts = make()
            scaler = torch.amp.GradScaler("cpu", init_scale=64.0) if "scaler" in options else None
            backward: Callable[[Tensor], None] = Tensor.backward
            if watched:
                arguments = {"clip_norm": options.get("clip_norm"), "scaler": scaler}
                tuner = as_given(model, opts, validation(model), every=2, **arguments)
                tuner.freeze()
                backward = tuner.backward
            torch.manual_seed(7)
            loop(model, opts, backward, scaler)
            results.append([*model.parameters(), torch.get_rng_state()])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_several_optimizers_where_a_scaler_skips_one_alone() -> None:
    """An overflow in one optimizer's gradients only: the other one steps, hypergradients are those of what was done."""

    def loop(model: nn.Sequential, opts: list[Any], backward: Callable[[Tensor], None], scaler: Any) -> None:
        for i, batch in enumerate(data()[0]):
            model.zero_grad()
            backward(scaler.scale(mse(model, batch)))
            if i == 4:
                model[0].weight.grad.fill_(math.inf)  # type: ignore[union-attr]
            for opt in opts:
                scaler.step(opt)
            scaler.update()

    tuner = tuned(loop, ("lr",), scaler=True, every=STEPS - 1)
    assert tuner.stats["changed_gradients"] == tuner.stats["plain_steps"] == 0
