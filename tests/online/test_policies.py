"""The list of policies: each can be left out or changed, what is wrong with a list is said, and state is kept by name."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import hypergrad
from hypergrad import policies
from hypergrad.policies import DEFAULT, AdamOnPhi, LrWarmStart, Phases, replaced, without

REMOVABLE = [type(policy) for policy in DEFAULT if not isinstance(policy, AdamOnPhi)]
STEPS = 120


def trained(steps: int = STEPS, lr: float = 1e-4, **options: Any) -> hypergrad.Tuner:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    x, w = torch.randn(64, 4), torch.randn(4, 1)
    y = x @ w
    sgd = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.5, weight_decay=1e-4)
    tune = ("lr", "weight_decay", "momentum")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuner = hypergrad.Tuner(
            model, sgd, lambda: mse_loss(model(x[32:]), y[32:]), tune=tune, total_steps=STEPS, **options
        )
        for t in range(steps):
            rows = torch.arange(8) + 8 * (t % 4)
            sgd.zero_grad()
            tuner.backward(mse_loss(model(x[rows]), y[rows]))
            sgd.step()
    return tuner


@pytest.mark.parametrize("kind", REMOVABLE, ids=lambda kind: kind.__name__)
@pytest.mark.slow
def test_each_can_be_left_out(kind: type[policies.Policy]) -> None:
    tuner = trained(policies=without(DEFAULT, kind))
    assert tuner.stats["hyper_steps"] > 0
    for values in tuner.values.values():
        assert bool(torch.isfinite(values).all())
    assert kind.__name__ not in tuner.state_dict()["policies"]


def test_without_a_warm_start_and_phases_lr_goes_on_from_what_was_typed() -> None:
    """At the first hyperparameter step lr has moved by a factor of 2 and a little; the warm start finds it at once."""
    found = trained(10, lr=1e-6).values["lr"]
    typed = trained(10, lr=1e-6, policies=without(DEFAULT, LrWarmStart)).values["lr"]
    assert found > 1e-3 and typed < 2.5e-6
    moving = trained(10, policies=without(DEFAULT, Phases)).state_dict()["vector"]["moving"]
    assert moving == [0, 1, 2]


def test_a_constant_can_be_changed() -> None:
    """Momentum's start, and a pace that falls to nothing at the first disagreement."""
    at_once = replaced(DEFAULT, policies.MomentumStart(momentum=0.8, least_steps=1))
    assert trained(1, policies=at_once).values["momentum"].item() == pytest.approx(0.8)
    assert trained(1).values["momentum"].item() == pytest.approx(0.5)  # as typed: fewer than 400 steps
    slow = replaced(DEFAULT, dataclasses.replace(policies.AgreementPace(), faster=1.0, slower=1e-9, slowest=1e-9))
    assert slow[11].slower == 1e-9  # type: ignore[attr-defined]
    assert not torch.equal(trained(policies=slow).values["momentum"], trained().values["momentum"])


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "a class": ([AdamOnPhi], TypeError, "without"),
    "twice": ([*DEFAULT, Phases()], ValueError, "replaced"),
    "no step": (without(DEFAULT, Phases)[:3], ValueError, "AdamOnPhi"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_with_a_list_is_said(name: str) -> None:
    wrong, error, what = BAD[name]
    with pytest.raises(error, match=what):
        trained(0, policies=wrong)


def test_a_policy_that_is_not_there_cannot_be_left_out_or_changed() -> None:
    with pytest.raises(ValueError, match="Phases"):
        without(without(DEFAULT, Phases), Phases)
    with pytest.raises(ValueError, match="Phases"):
        replaced(without(DEFAULT, Phases), Phases())


def test_a_state_of_another_version_or_of_none_is_refused() -> None:
    tuner = trained(20)
    state = tuner.state_dict()
    before = tuner.values["lr"]
    for other in (state | {"version": 1}, {k: v for k, v in state.items() if k != "version"}):
        with pytest.raises(ValueError, match=r"version 1.*begin anew"):
            tuner.load_state_dict(other)
    assert torch.equal(before, tuner.values["lr"])


def test_a_state_of_other_policies_is_refused() -> None:
    fewer = without(DEFAULT, LrWarmStart, policies.MeanTrustRegion)
    for one, other in ((DEFAULT, fewer), (fewer, DEFAULT)):
        tuner = trained(0, policies=other)
        before = repr(tuner.state_dict())
        with pytest.raises(ValueError, match="the same `policies`"):
            tuner.load_state_dict(trained(5, policies=one).state_dict())
        assert repr(tuner.state_dict()) == before


def test_a_tuner_prints_what_it_has_done() -> None:
    tuner = trained(40)
    values = ", ".join(f"{name}={tuner.values[name].item():.6g}" for name in ("lr", "weight_decay", "momentum"))
    best = f"best validation loss {tuner.best_val_loss:.4g} after step {tuner.best_step}"
    assert repr(tuner) == f"Tuner({values}; 40 of 120 steps; {best})"
    model = nn.Linear(3, 1)
    groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": 0.5}]
    sgd, x, scale = torch.optim.SGD(groups, lr=0.25), torch.randn(8, 3), torch.ones(1, 3)
    tuner = hypergrad.Tuner(model, sgd, lambda: model(scale * x).mean(), "lr", {"scale": scale}, keep_best=False)
    assert repr(tuner) == "Tuner(lr=[0.25, 0.5], scale of shape (1, 3); 0 steps)"


def test_stats_are_a_copy_that_nothing_reads() -> None:
    tuner = trained(0)
    tuner.stats["hyper_steps"] = 10**6
    tuner.stats.clear()
    assert tuner.stats["hyper_steps"] == 0 and set(tuner.stats) == set(trained(5).stats)
