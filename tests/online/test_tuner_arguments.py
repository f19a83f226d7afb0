"""Online tuner: bad input raises before anything changes; tuned values beside schedulers and bounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

import hypergrad
from hypergrad import Hyperparameter
from tests.online.live_loops import FD_RTOL, STEPS, data, float64, mse, sgd, slope, two_layers, validation

__all__ = ["float64"]  # the fixture


class NoScaler:
    """Something else."""


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "every negative": ({"every": -3}, ValueError, "every must be"),
    "every 0": ({"every": 0}, ValueError, "every must be"),
    "every a fraction": ({"every": 2.5}, ValueError, "every must be"),
    "total_steps True": ({"total_steps": True}, ValueError, "total_steps must be"),
    "total_steps 0": ({"total_steps": 0}, ValueError, "total_steps must be"),
    "hyper_lr NaN": ({"hyper_lr": math.nan}, ValueError, "hyper_lr must be"),
    "hyper_lr a string": ({"hyper_lr": "fast"}, ValueError, "hyper_lr must be"),
    "a name twice": ({"tune": ("lr", "lr")}, ValueError, "twice"),
    "a scaler that is a string": ({"scaler": "x"}, TypeError, "GradScaler"),
    "a scaler that is none": ({"scaler": NoScaler()}, TypeError, "GradScaler"),
    "start of wrong shape": ({"tune": {"lr": torch.tensor([0.1, 0.2, 0.3])}}, ValueError, r"shape \(2,\)"),
    "bounds without the present value": (
        {"tune": {"lr": Hyperparameter(bounds=(1.0, 2.0))}}, ValueError, r"lr of param group 0: .*bounds",
    ),
    "bounds without one group's value": (
        {"tune": {"lr": Hyperparameter(bounds=(0.04, 2.0))}}, ValueError, r"lr of param group 1: .*bounds",
    ),
    "a clipping threshold": ({"tune": ("clip_norm",), "clip_norm": 1.0}, NotImplementedError, "hypergradient"),
    "val_loss a number": ({"val_loss": 1.0}, TypeError, "val_loss must be"),
    "model a function": ({"model": mse}, TypeError, "torch.nn.Module"),
    "models in a list": ({"model": [nn.Linear(2, 1)]}, TypeError, r"torch\.nn\.ModuleList"),
    "val_loss of the model": ({"val_loss": lambda model: mse(model, data()[0][0])}, TypeError, r"val_loss\(t\).*without"),
    "optimizer twice": ({"optimizer": "twice"}, ValueError, "two param groups"),
    "seed a string": ({"seed": "x"}, (TypeError, ValueError), "x"),
    "tune a number": ({"tune": 3}, TypeError, "tune must be names"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_argument_raises_before_anything_changes(name: str) -> None:
    changes, error, match = BAD[name]
    model = two_layers()
    opt = sgd()(model)
    before, rng = repr(opt.state_dict()), torch.get_rng_state()
    arguments = {"model": model, "optimizer": opt, "val_loss": validation(model)} | changes
    if changes.get("optimizer") == "twice":
        arguments["optimizer"] = [opt, opt]
    with pytest.raises(error, match=match):
        hypergrad.Tuner(**arguments)
    assert repr(opt.state_dict()) == before
    assert torch.equal(rng, torch.get_rng_state())
    assert not opt._optimizer_step_pre_hooks
    hypergrad.Tuner(model, opt, validation(model))  # nothing stands in the way


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("group", [0, 1])
def test_number_in_a_group_that_is_not_finite(group: int, value: float) -> None:
    model = two_layers()
    opt = sgd()(model)
    opt.param_groups[group]["lr"] = value
    with pytest.raises(ValueError, match=r"lr is (nan|inf) in a param group"):
        hypergrad.Tuner(model, opt, validation(model))


@pytest.mark.parametrize("limit", [0, -1])
def test_check_of_no_elements(limit: int) -> None:
    model = two_layers()
    with pytest.raises(ValueError, match="limit must be"):
        hypergrad.check(model, sgd()(model), mse, data()[0], validation(model), limit=limit)


def test_check_of_one_element() -> None:
    model = nn.Linear(5, 1)
    loss = lambda m, batch, h: mse(m, batch) + (h["c"] * m.weight**2).sum()  # noqa: E731
    report = hypergrad.check(
        model, torch.optim.SGD(model.parameters(), lr=0.1), loss, data()[0][:3], validation(model),
        wrt=("c",), hypers={"c": torch.full((1, 5), 0.1)}, limit=1,
    )  # fmt: skip
    assert report and len(report.rows) == 1


@pytest.mark.parametrize("start", [0.02, torch.tensor([0.02, 0.04])], ids=["one", "two"])
def test_start_for_two_groups_is_used_at_the_first_step(start: Any) -> None:
    model = two_layers()
    opt = sgd()(model)
    tuner = hypergrad.Tuner(model, opt, validation(model), tune={"lr": start}, every=1000)
    used: list[float] = []
    opt.register_step_pre_hook(lambda o, *_: used.extend(g["lr"] for g in o.param_groups))
    opt.zero_grad()
    tuner.backward(mse(model, data()[0][0]))
    opt.step()
    want = torch.as_tensor(start).expand(2).tolist()
    assert used == pytest.approx(want)
    assert tuner.values["lr"].tolist() == pytest.approx(want)


def test_bounds_are_kept() -> None:
    model = two_layers()
    opt = torch.optim.SGD(model.parameters(), lr=0.01)
    spec = {"lr": Hyperparameter(bounds=(0.009, 0.011))}
    tuner = hypergrad.Tuner(model, opt, validation(model), tune=spec, every=1, hyper_lr=0.5)
    for batch in data()[0]:
        opt.zero_grad()
        tuner.backward(mse(model, batch))
        opt.step()
        assert 0.009 <= opt.param_groups[0]["lr"] <= 0.011 + 1e-12


# ---- beside schedulers


def test_one_cycle_with_momentum_tuned_is_refused_at_once() -> None:
    model = two_layers()
    opt = sgd(momentum=0.9)(model)
    OneCycleLR(opt, 0.1, total_steps=20)
    with pytest.raises(ValueError, match="something else writes 'momentum'"):
        hypergrad.Tuner(model, opt, validation(model), tune=("lr", "momentum"))
    adam = torch.optim.AdamW(model.parameters(), lr=0.01)
    OneCycleLR(adam, 0.1, total_steps=20)
    with pytest.raises(ValueError, match="something else writes 'betas'"):
        hypergrad.Tuner(model, adam, validation(model), tune=("lr", "betas"))
    still = sgd(momentum=0.9)(model)
    OneCycleLR(still, 0.1, total_steps=20, cycle_momentum=False)
    hypergrad.Tuner(model, still, validation(model), tune=("lr", "momentum"))


def test_warm_up_from_0_in_one_of_two_groups_is_tuned() -> None:
    """Its scale has the hypergradient of finite differences, though the first learning rate is 0."""

    def make() -> tuple[nn.Sequential, Any, Any]:
        model = two_layers()
        opt = sgd(momentum=0.8)(model)
        return model, opt, LambdaLR(opt, [lambda t: t / STEPS, lambda t: 1.0])

    def train(model: nn.Module, opt: Any, scheduler: Any, backward: Callable[[Tensor], None]) -> None:
        torch.manual_seed(7)
        for batch in data()[0]:
            opt.zero_grad()
            backward(mse(model, batch))
            opt.step()
            scheduler.step()
        torch.manual_seed(11)

    model, opt, scheduler = make()
    validate = validation(model)

    def val_loss() -> Tensor:
        torch.manual_seed(11)
        return validate()

    tuner = hypergrad.Tuner(model, opt, val_loss, tune=("lr",), every=STEPS, average=False, warm_start=False)
    assert tuner.values["lr"].tolist() == [group["initial_lr"] for group in opt.param_groups]
    train(model, opt, scheduler, tuner.backward)
    for i, got in enumerate(tuner.hypergradients["lr"].tolist()):

        def at(x: float, i: int = i) -> float:
            model, opt, scheduler = make()
            scheduler.base_lrs[i] *= 1 + x
            opt.param_groups[i]["lr"] *= 1 + x
            train(model, opt, scheduler, Tensor.backward)
            return validation(model)().item()

        base = opt.param_groups[i]["initial_lr"]
        assert got * base == pytest.approx(slope(at, 1e-4), rel=FD_RTOL), i
        assert tuner.values["lr"][i] != base
