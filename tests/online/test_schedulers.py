"""A tuner beside a scheduler: the scheduler's shape is the shape; hypergradients, warm start and phases as without one."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import lr_scheduler as torchs
from torch.optim.swa_utils import SWALR

import hypergrad
from tests.online.live_loops import (  # noqa: F401
    FD_RTOL,
    STEPS,
    Bowl,
    as_given,
    data,
    float64,
    mse,
    sgd,
    slope,
    two_layers,
    validation,
)
from tests.tiers import slow_but

WARM_UP = 4


def warm_up(t: int) -> float:
    return min(t / WARM_UP, 1.0)


def warm_up_and_cosine(opt: Any) -> Any:
    parts = [torchs.LinearLR(opt, 0.1, total_iters=WARM_UP), torchs.CosineAnnealingLR(opt, STEPS - WARM_UP)]
    return torchs.SequentialLR(opt, parts, milestones=[WARM_UP])


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda opt: torchs.StepLR(opt, 3, 0.5),
    "MultiStepLR": lambda opt: torchs.MultiStepLR(opt, [4, 8], 0.3),
    "ExponentialLR": lambda opt: torchs.ExponentialLR(opt, 0.9),
    "CosineAnnealingLR": lambda opt: torchs.CosineAnnealingLR(opt, STEPS),
    "CosineAnnealingWarmRestarts": lambda opt: torchs.CosineAnnealingWarmRestarts(opt, 5),
    "OneCycleLR": lambda opt: torchs.OneCycleLR(opt, 0.1, total_steps=STEPS + 1, cycle_momentum=False),
    "LambdaLR from 0": lambda opt: torchs.LambdaLR(opt, warm_up),
    "SequentialLR": warm_up_and_cosine,
    "PolynomialLR": lambda opt: torchs.PolynomialLR(opt, STEPS, 2.0),
    "CyclicLR": lambda opt: torchs.CyclicLR(opt, 0.01, 0.1, step_size_up=3, cycle_momentum=False),
    "ReduceLROnPlateau": lambda opt: torchs.ReduceLROnPlateau(opt, factor=0.3, patience=2, mode="max"),
}


def step(scheduler: Any) -> None:
    scheduler.step(*([0.0] if isinstance(scheduler, torchs.ReduceLROnPlateau) else []))


def written_by(make: Callable[[Any], Any]) -> list[list[float]]:
    """What a scheduler writes at every step, each group's."""
    opt = sgd(momentum=0.8)(two_layers())
    scheduler, seen = make(opt), []
    for _ in range(STEPS):
        seen.append([group["lr"] for group in opt.param_groups])
        opt.step()
        step(scheduler)
    return seen


@pytest.mark.parametrize("first", slow_but(["tuner", "scheduler"], "scheduler"))
@pytest.mark.parametrize("name", SCHEDULERS)
def test_hypergradient_is_that_of_scaling_all_that_is_written(name: str, first: str) -> None:
    """The oracle has no scheduler: it repeats the recorded learning rates, times a factor."""
    rates = written_by(SCHEDULERS[name])

    def ends_at(x: float, i: int) -> float:
        model = two_layers()
        opt = sgd(momentum=0.8)(model)
        torch.manual_seed(7)
        for batch, lrs in zip(data()[0], rates, strict=True):
            for j, (group, lr) in enumerate(zip(opt.param_groups, lrs, strict=True)):
                group["lr"] = lr * (1 + x) if i == j else lr
            opt.zero_grad()
            mse(model, batch).backward()
            opt.step()
        torch.manual_seed(11)
        return validation(model)().item()

    model = two_layers()
    opt = sgd(momentum=0.8)(model)
    validate = validation(model)

    def val_loss() -> Tensor:
        torch.manual_seed(11)
        return validate()

    scheduler = SCHEDULERS[name](opt) if first == "scheduler" else None
    tuner = as_given(model, opt, val_loss, tune="lr", every=STEPS, average=False)
    scheduler = scheduler or SCHEDULERS[name](opt)
    bases = (
        tuner.values["lr"].tolist()
        if first == "scheduler"
        else [g.get("initial_lr", g["lr"]) for g in opt.param_groups]
    )
    torch.manual_seed(7)
    for batch, lrs in zip(data()[0], rates, strict=True):
        assert [group["lr"] for group in opt.param_groups] == lrs  # the scheduler's own, never compounded with ours
        opt.zero_grad()
        tuner.backward(mse(model, batch))
        opt.step()
        step(scheduler)
    assert tuner.val_loss == pytest.approx(ends_at(0.0, 0), rel=1e-12)
    for i, got in enumerate(tuner.hypergradients["lr"].tolist()):
        assert got * bases[i] == pytest.approx(slope(lambda x, i=i: ends_at(x, i), 1e-4), rel=FD_RTOL), i


# ---- warm start and phases


def bowl_run(lr: float, steps: int, schedule: Callable[[Any], Any] | None, **options: Any) -> tuple[list[float], Any]:
    """The learning rates used, and the tuner."""
    model = Bowl()
    opt = torch.optim.SGD(model.parameters(), lr=lr)
    scheduler = schedule(opt) if schedule is not None else None
    tuner, used = hypergrad.Tuner(model, opt, model, tune="lr", **options), []
    opt.register_step_pre_hook(lambda o, *_: used.append(o.param_groups[0]["lr"]))
    for _ in range(steps):
        opt.zero_grad()
        tuner.backward(model())
        opt.step()
        assert tuner.applied["lr"].tolist() == used[-1:]
        if scheduler is not None:
            step(scheduler)
    return used, tuner


def test_a_constant_schedule_changes_nothing() -> None:
    plain, _ = bowl_run(1e-6, 60, None)
    scheduled, tuner = bowl_run(1e-6, 60, lambda opt: torchs.LambdaLR(opt, lambda t: 1.0))
    assert scheduled == pytest.approx(plain, rel=1e-9) and plain[-1] > 0.1
    assert tuner.values["lr"].item() == pytest.approx(plain[-1], rel=0.2)


def test_the_shape_of_total_steps_by_a_scheduler_gives_the_same_run() -> None:
    plain, _ = bowl_run(1e-6, 60, None, total_steps=60)
    scheduled, _ = bowl_run(1e-6, 60, lambda opt: torchs.LambdaLR(opt, lambda t: (60 - t) / 60), total_steps=60)
    assert scheduled == pytest.approx(plain, rel=1e-9)


@pytest.mark.parametrize("total", [None, 120])
@pytest.mark.parametrize("lr", [1e-6, 1e-1])
@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "ReduceLROnPlateau"])
@pytest.mark.slow
def test_the_warm_start_finds_lr_beside_a_scheduler(name: str, lr: float, total: int | None) -> None:
    """The best lr of the bowl along its first steps lies between 1/1 and 2/1, its largest curvature being 1."""
    longer: dict[str, Callable[[Any], Any]] = {
        "StepLR": lambda opt: torchs.StepLR(opt, 40, 0.5),
        "MultiStepLR": lambda opt: torchs.MultiStepLR(opt, [60, 90], 0.1),
        "ExponentialLR": lambda opt: torchs.ExponentialLR(opt, 0.99),
        "CosineAnnealingLR": lambda opt: torchs.CosineAnnealingLR(opt, 120),
        "CosineAnnealingWarmRestarts": lambda opt: torchs.CosineAnnealingWarmRestarts(opt, 40),
        "OneCycleLR": lambda opt: torchs.OneCycleLR(opt, 25 * lr, total_steps=121, cycle_momentum=False),
        "LambdaLR from 0": lambda opt: torchs.LambdaLR(opt, lambda t: min(t / 20, 1.0)),
        "SequentialLR": lambda opt: torchs.SequentialLR(
            opt, [torchs.LinearLR(opt, 0.01, total_iters=12), torchs.CosineAnnealingLR(opt, 108)], [12]
        ),
        "PolynomialLR": lambda opt: torchs.PolynomialLR(opt, 121, 2.0),
        "CyclicLR": lambda opt: torchs.CyclicLR(opt, lr, 5 * lr, step_size_up=20, cycle_momentum=False),
    }
    used, tuner = bowl_run(lr, 120, longer[name], total_steps=total)
    peak = max(used[30:])
    assert 0.3 < peak < 4, peak
    assert tuner.val_loss < 1e-3 and all(map(math.isfinite, used))


def test_a_given_start_and_bounds_hold_for_the_scale() -> None:
    tune = {"lr": hypergrad.Hyperparameter(0.05, bounds=(0.04, 0.06))}
    model = two_layers()
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    scheduler = torchs.ExponentialLR(opt, 0.5)
    tuner, used = hypergrad.Tuner(model, opt, validation(model), tune=tune, every=2), []
    opt.register_step_pre_hook(lambda o, *_: used.append(o.param_groups[0]["lr"]))
    for batch in data()[0]:
        opt.zero_grad()
        tuner.backward(mse(model, batch))
        opt.step()
        scheduler.step()
        assert 0.04 - 1e-12 <= tuner.values["lr"].item() <= 0.06 + 1e-12
    assert used[:2] == pytest.approx([0.05, 0.025], rel=1e-12)


# ---- what is made in mid-run, or has no `initial_lr`


def in_mid_run(change: Callable[[Any, int], None], lr: float = 0.01) -> tuple[list[float], Any]:
    """The learning rates used where `change` may write lr before every step, and the value climbs by itself."""
    model = two_layers()
    opt = torch.optim.SGD(model.parameters(), lr=lr)
    tuner, used = as_given(model, opt, validation(model), tune="lr", every=1000), []
    opt.register_step_pre_hook(lambda o, *_: used.append(o.param_groups[0]["lr"]))
    for t, batch in enumerate(data()[0]):
        change(opt, t)
        if t == 3:
            tuner._vector.multiply_number(0, 7.0)
        opt.zero_grad()
        tuner.backward(mse(model, batch))
        opt.step()
    return used, tuner


def test_a_loop_that_cuts_lr_cuts_what_it_finds_there() -> None:
    def cut(opt: Any, t: int) -> None:
        if t in (6, 8):
            opt.param_groups[0]["lr"] *= 0.1

    used, _ = in_mid_run(cut)
    assert used == pytest.approx([0.01] * 3 + [0.07] * 3 + [0.007] * 2 + [0.0007] * 4, rel=1e-12)


def test_a_loop_with_a_schedule_of_its_own_is_scaled() -> None:
    def own(opt: Any, t: int) -> None:
        opt.param_groups[0]["lr"] = 0.01 * math.cos(t / 10)

    used, _ = in_mid_run(own)
    assert used == pytest.approx([0.01 * math.cos(t / 10) * (7 if t >= 3 else 1) for t in range(STEPS)], rel=1e-12)


def test_a_scheduler_made_in_mid_run_goes_on_from_the_present_lr() -> None:
    made: list[Any] = []

    def make(opt: Any, t: int) -> None:
        if t == 6:
            made.append(torchs.ExponentialLR(opt, 0.5))
        elif t > 6:
            made[0].step()

    used, tuner = in_mid_run(make)
    assert used == pytest.approx([0.01] * 3 + [0.07] * 3 + [0.07 * 0.5**t for t in range(6)], rel=1e-12)
    assert tuner.values["lr"].item() == pytest.approx(0.07)


@pytest.mark.parametrize("strategy", ["cos", "linear"])
@pytest.mark.filterwarnings("ignore:SWALR has swa_lr")
def test_swalr_made_in_mid_run_as_lightning_makes_it_goes_on_from_the_present_lr(strategy: Any) -> None:
    """Lightning's StochasticWeightAveraging writes swa_lr as `initial_lr`. From there on lr is what torch alone makes of it."""

    def averaging(opt: Any) -> SWALR:
        opt.param_groups[0]["initial_lr"] = 0.02
        return SWALR(opt, 0.02, 4, strategy, last_epoch=STEPS if strategy == "cos" else -1)

    made: list[Any] = []

    def make(opt: Any, t: int) -> None:
        if t == 6:
            made.append(averaging(opt))
        elif t > 6:
            made[0].step()

    alone = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.07)
    scheduler, written = averaging(alone), []
    for _ in range(6):
        written.append(alone.param_groups[0]["lr"])
        alone.step()
        scheduler.step()
    used, _ = in_mid_run(make)
    assert used == pytest.approx([0.01] * 3 + [0.07] * 3 + written, rel=1e-9)


def test_plateau_with_total_steps_is_the_shape() -> None:
    used, tuner = bowl_run(
        1e-3, 40, lambda opt: torchs.ReduceLROnPlateau(opt, factor=0.5, patience=9, mode="max"), total_steps=40
    )
    scale = tuner.values["lr"].item()
    assert used[-1] == pytest.approx(scale / 8, rel=1e-9)  # cut at step 11, 21 and 31


# ---- what is refused, and what is said


@pytest.mark.parametrize("first", ["tuner", "scheduler"])
def test_one_cycle_that_cycles_tuned_momentum_is_refused_before_weights_change(first: str) -> None:
    model = two_layers()
    opt = sgd(momentum=0.9)(model)
    before = [p.clone() for p in model.parameters()]

    def train() -> None:
        tuner = None if first == "scheduler" else as_given(model, opt, validation(model), tune=("lr", "momentum"))
        torchs.OneCycleLR(opt, 0.1, total_steps=20)
        tuner = tuner or as_given(model, opt, validation(model), tune=("lr", "momentum"))
        tuner.backward(mse(model, data()[0][0]))
        opt.step()

    with pytest.raises(ValueError, match="cycle_momentum=False"):
        train()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


ABSOLUTE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "cosine": (lambda opt: torchs.CosineAnnealingLR(opt, 10, eta_min=1e-4), r"eta_min=0.0001.*eta_min=0.01 \* lr"),
    "restarts": (lambda opt: torchs.CosineAnnealingWarmRestarts(opt, 10, eta_min=1e-4), r"eta_min=0.01 \* lr"),
    "within": (
        lambda opt: torchs.SequentialLR(
            opt, [torchs.ConstantLR(opt), torchs.CosineAnnealingLR(opt, 10, eta_min=1e-4)], [3]
        ),
        r"eta_min=0.01 \* lr",
    ),
    "SWALR": (lambda opt: SWALR(opt, 0.005), r"swa_lr=0.5 \* lr"),
}


@pytest.mark.parametrize("first", ["tuner", "scheduler"])
@pytest.mark.parametrize("name", ABSOLUTE)
def test_absolute_learning_rates_are_said_once_with_the_relative_form(name: str, first: str) -> None:
    make, said = ABSOLUTE[name]
    model = two_layers()
    opt = torch.optim.SGD(model.parameters(), lr=0.01)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tuner = as_given(model, opt, validation(model), tune="lr") if first == "tuner" else None
        scheduler = make(opt)
        tuner = tuner or as_given(model, opt, validation(model), tune="lr")
        for batch in data()[0][:3]:
            opt.zero_grad()
            tuner.backward(mse(model, batch))
            opt.step()
            scheduler.step()
    found = [str(x.message) for x in caught if "relative to that" in str(x.message)]
    assert len(found) == 1
    with pytest.warns(UserWarning, match=said):
        warnings.warn(found[0], stacklevel=1)


def test_swa_lr_far_from_the_initial_lr_is_refused_before_weights_change() -> None:
    model = two_layers()
    opt = torch.optim.SGD(model.parameters(), lr=1e-6)
    tuner = as_given(model, opt, validation(model), tune="lr")
    scheduler = torchs.CosineAnnealingLR(opt, 10)
    tuner.backward(mse(model, data()[0][0]))
    opt.step()
    scheduler.step()
    before = [p.clone() for p in model.parameters()]
    SWALR(opt, 0.05)
    tuner.backward(mse(model, data()[0][1]))
    with pytest.raises(ValueError, match=r"swa_lr=0.05, 5e\+04 times"):
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_schedule_that_starts_from_0_is_refused() -> None:
    model = two_layers()
    opt = torch.optim.SGD(model.parameters(), lr=0.0)
    torchs.CosineAnnealingLR(opt, 10)
    with pytest.raises(ValueError, match="start"):
        hypergrad.Tuner(model, opt, validation(model), tune="lr")
