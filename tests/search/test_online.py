"""Strategies in which a tuner moves a trial's values while it trains."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch

import hypergrad
from hypergrad.online.progress import gradient_evaluations
from hypergrad.schedules import decay_to_zero
from hypergrad.search import Categorical, Float, NoTrialCompleted, Run, Trial, optimize
from hypergrad.search.objective import seed_of
from hypergrad.search.strategies import online
from hypergrad.search.training import train
from tests.search.problems import quadratic

pytest.importorskip("optuna")

quiet = partial(optimize, progress=False)
STEPS = 40
SPACE = {"lr": Float(1e-3, 1.0, "log", start=0.05), "momentum": Float(0.01, 0.9, "logit", start=0.5)}


def long(p: dict[str, Any], trial: Trial) -> Run:
    return quadratic(p | {"steps": p.get("steps", STEPS)}, trial)


@pytest.mark.parametrize(("strategy", "trials"), [("hypergradient-online", 1), ("hybrid-online", 3)])
def test_a_trial_is_tuned_while_it_trains(strategy: str, trials: int) -> None:
    study = quiet(long, SPACE | {"steps": Categorical([STEPS, 2 * STEPS])}, strategy, trials)
    best = study.best_trial
    assert set(best.notes["learned"]) == {"lr", "momentum"}
    assert best.notes["learned"].items() <= study.best_params.items()
    assert all(best.params[name] in SPACE[name] for name in SPACE)
    start = {"lr": 0.05, "momentum": 0.5, "steps": STEPS}
    assert study.best_value < train(long(start, Trial(0, start, 0)), Trial(0, start, 0))
    assert best.cost.gradient_evaluations > best.params["steps"]


def test_its_values_value_and_cost_are_those_of_a_tuner_in_a_loop_of_ones_own() -> None:
    study = quiet(long, SPACE, "hypergradient-online", 1, options={"every": 5})
    run = long({"lr": 0.05, "momentum": 0.5}, Trial(0, {}, 0))
    tuner = hypergrad.Tuner(
        run.model,
        run.optimizer,
        run.val_loss,
        tune={name: hypergrad.Hyperparameter(bounds=(x.low, x.high)) for name, x in SPACE.items()},
        every=5,
        total_steps=STEPS,
        seed=seed_of(0, 0),
    )
    for batch in run.batches:
        run.optimizer.zero_grad()  # type: ignore[union-attr]
        tuner.backward(run.loss(run.model, batch))
        run.optimizer.step()  # type: ignore[union-attr]
    assert study.best_params == {name: pytest.approx(float(x[0])) for name, x in tuner.values.items()}
    assert study.best_value == run.val_loss().item()
    assert study.spent.gradient_evaluations == gradient_evaluations(tuner.stats)


@pytest.mark.parametrize(("options", "cost"), [({}, 1.5), ({"cost": 3.0}, 3.0), ({"cost": None}, None)])
def test_a_trial_of_the_hybrid_costs_one_and_a_half_plain_runs(
    options: dict[str, Any], cost: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = []

    class Tuner(hypergrad.Tuner):
        def __init__(self, *args: Any, **given: Any):
            costs.append(given.get("cost", "its own"))
            super().__init__(*args, **given)

    monkeypatch.setattr(online, "Tuner", Tuner)
    quiet(long, SPACE, "hybrid-online", 1, options=options)
    quiet(long, SPACE, "hypergradient-online", 1, options=options)
    assert costs == [cost, options.get("cost", "its own")]


def test_verify_trains_learned_values_with_the_decay_that_they_were_learned_with() -> None:
    """θ²/2 from θ = 2 by gradient descent: 2 Π (1 − lr s_t)²."""
    study = quiet(long, {"lr": Float(1e-3, 0.1, "log")}, "hypergradient-online", 1)
    lr = study.best_params["lr"]
    theta = math.prod(1 - lr * decay_to_zero(t, STEPS) for t in range(STEPS))
    assert study.verify(long).test == pytest.approx([2 * theta**2])


def test_several_groups_and_parts_of_betas() -> None:
    def net(p: dict[str, Any], trial: Trial) -> Run:
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        x = torch.linspace(-1, 1, 24).view(8, 3)
        groups = [{"params": model[0].parameters(), "lr": p["lr"] / 10}, {"params": model[2].parameters()}]
        adam = torch.optim.Adam(groups, lr=p["lr"], betas=(p["beta1"], p.get("beta2", 0.99)))
        return Run(model, adam, [x] * STEPS, lambda m, x: (m(x) - x[:, :1]).square().mean(), lambda: model(x).var())

    first = {"lr": Float(1e-4, 1.0, "log"), "beta1": Float(0.5, 0.99)}
    with pytest.warns(UserWarning, match="moves 'beta1'.* beta1 and beta2 move together"):
        study = quiet(net, first, "hypergradient-online", 1)
    assert set(study.best_trial.notes["learned"]) == {"lr"}, "beta2 is no entry: betas are left alone"
    study = quiet(net, first | {"beta2": Float(0.9, 0.9999)}, "hypergradient-online", 1)
    assert set(study.best_trial.notes["learned"]) == {"lr", "beta1", "beta2"}
    assert 1e-4 <= study.best_params["lr"] <= 1.0 and 0.9 <= study.best_params["beta2"] <= 0.9999


def test_what_the_loss_reads_is_tuned_online() -> None:
    """A target of the training loss that is tuned towards that of the validation loss, 1, from −1."""

    def pulled_run(p: dict[str, Any], trial: Trial) -> Run:
        model = torch.nn.Linear(1, 1, bias=False).double()
        torch.nn.init.zeros_(model.weight)

        def loss(model: torch.nn.Module, batch: Any, hypers: dict[str, torch.Tensor]) -> torch.Tensor:
            return ((model.weight - hypers["target"]) ** 2).sum() + 0 * hypers["other"]  # type: ignore[operator]

        sgd = torch.optim.SGD(model.parameters(), lr=0.05)
        return Run(model, sgd, [None] * 400, loss, lambda: ((model.weight - 1) ** 2).sum())

    space = {"target": Float(-2.0, 3.0, start=-1.0), "other": Float(0.0, 1.0, differentiable=False)}
    study = quiet(pulled_run, space, "hypergradient-online", 1)
    assert set(study.best_trial.notes["learned"]) == {"target"}
    assert study.best_params["target"] > 0 and study.best_params["other"] == 0.5
    assert study.best_value < 1


def test_hybrid_online_trains_what_has_nothing_to_tune() -> None:
    study = quiet(long, {"lr": [0.1, 0.2], "steps": [5, 10]}, "hybrid-online", 3)
    assert all("learned" not in each.notes for each in study.trials)
    assert study.best_value < 2


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "nothing to tune": ({"space": {"k": [1, 2]}}, ValueError, "without a step"),
    "an unknown option": ({"options": {"steps": 3}}, ValueError, "hyper_lr"),
    "a sampler": ({"options": {"sampler": "tpe"}}, ValueError, "does not take 'sampler'"),
    "hybrid's sampler": ({"strategy": "hybrid-online", "options": {"sampler": "x"}}, ValueError, "tpe, gp, cma"),
    "every": ({"options": {"every": 0}}, ValueError, "every"),
    "cost": ({"options": {"cost": 1}}, ValueError, "cost must be a number above 1"),
    "no run": ({"objective": lambda p: p["lr"]}, TypeError, "hypergrad.Run"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input(name: str) -> None:
    given, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        quiet(**{"objective": long, "space": SPACE, "strategy": "hypergradient-online", "budget": 1} | given)


def test_schedules_are_refused() -> None:
    def decaying(p: dict[str, Any], trial: Trial) -> Run:
        return long({"lr": 0.1}, trial)._replace(schedules={"lr": lambda t, h: h["lr"] * 0.9**t})

    with pytest.raises(NoTrialCompleted, match="schedules of a run"):
        quiet(decaying, {"lr": Float(0.01, 0.1)}, "hypergradient-online", 1)
