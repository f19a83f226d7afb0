"""Optuna's own studies: online tuning inside a trial, hypergradient steps between trials, and the dashboard."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hypergrad
from hypergrad.search import (
    Float,
    Int,
    enqueue_hypergradient_step,
    hypergradient_step,
    note_hypergradient,
    optimize,
    suggest,
)
from tests.search.problems import SPACE, quadratic, reporting_bowl

optuna = pytest.importorskip("optuna")

EPOCHS, STEPS = 6, 10  # steps an epoch
ONLINE = {"hidden": Int(2, 16, "log"), "lr": Float(1e-5, 1e-1, "log")}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(before)


def online(trial: Any) -> float:
    """Optuna chooses the width and where lr starts; the tuner moves lr and weight decay while the model trains."""
    p = suggest(ONLINE, trial)
    torch.manual_seed(0)
    x = torch.randn(128, 4)
    y = torch.sin(2 * x[:, :1]) + 0.1 * torch.randn(128, 1)
    model = nn.Sequential(nn.Linear(4, p["hidden"]), nn.Tanh(), nn.Linear(p["hidden"], 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=p["lr"], weight_decay=1e-3)

    def val_loss() -> torch.Tensor:
        return ((model(x[96:]) - y[96:]) ** 2).mean()

    tuner = hypergrad.Tuner(model, optimizer, val_loss)
    for epoch in range(1, EPOCHS + 1):
        for _ in range(STEPS):
            loss = ((model(x[:96]) - y[:96]) ** 2).mean()
            optimizer.zero_grad()
            tuner.backward(loss)
            optimizer.step()
        with torch.no_grad():
            value = float(val_loss())
        trial.report(value, epoch)
        if trial.should_prune():
            tuner.close()
            raise optuna.TrialPruned
    for name, values in tuner.values.items():
        trial.set_user_attr(f"learned {name}", values.tolist())
    tuner.close()
    return value


def test_an_objective_tunes_online_reports_to_the_pruner_and_keeps_what_it_learned(tmp_path: Path) -> None:
    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "online.journal"))
    pruner = optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=1)
    sampler = optuna.samplers.TPESampler(seed=0)
    study = optuna.create_study(storage=optuna.storages.JournalStorage(backend), sampler=sampler, pruner=pruner)
    study.optimize(online, n_trials=10)
    states = [trial.state.name for trial in study.trials]
    assert set(states) == {"COMPLETE", "PRUNED"}
    for trial in study.trials:
        assert len(trial.intermediate_values) == (
            EPOCHS if trial.state.name == "COMPLETE" else max(trial.intermediate_values)
        )
        if trial.state.name == "COMPLETE":
            (lr,) = trial.user_attrs["learned lr"]
            assert lr > 0 and lr != trial.params["lr"] and "learned weight_decay" in trial.user_attrs
    assert study.best_value < study.best_trial.intermediate_values[1]


SPACE_OF_LR = {"lr": Float(1e-3, 1.0, "log"), "momentum": Float(0.01, 0.9, "logit")}


def differentiated(trial: Any) -> float:
    """`hypergrad.hypergradient` of a whole run; its value and gradient are the trial's."""
    run = quadratic(suggest(SPACE_OF_LR, trial), None)  # type: ignore[arg-type]
    result = hypergrad.hypergradient(
        run.model, run.optimizer, run.loss, run.batches, run.val_loss, wrt=("lr", "momentum")
    )
    note_hypergradient(trial, result.gradients)
    return float(result.value)


def test_steps_between_trials_go_down_the_gradient_and_halve_when_they_overshoot() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    assert not enqueue_hypergradient_step(study, SPACE_OF_LR)  # nothing to step from
    study.enqueue_trial({"lr": 0.02, "logit(momentum)": 0.0})
    values = []
    for _ in range(12):
        study.optimize(differentiated, n_trials=1)
        values.append(study.best_value)
        assert enqueue_hypergradient_step(study, SPACE_OF_LR)
    assert values == sorted(values, reverse=True) and values[-1] < 0.01 * values[0]
    parents = [trial.user_attrs.get("hypergradient step from trial") for trial in study.trials[1:12]]
    assert len(set(parents)) < len(parents)  # some overshot, and were followed by half a step from the same trial


def torchs_adam(start: dict[str, float], gradients: list[dict[str, float]], lr: float) -> list[dict[str, float]]:
    """Where torch.optim.Adam takes u, lr being longer by 1.2 after every step: lr over 3 decades, x over 2."""
    u = {"lr": math.log(start["lr"] / 1e-3) / math.log(1e3), "x": start["x"] / 2.0}
    leaves = {name: torch.tensor(x, dtype=torch.float64, requires_grad=True) for name, x in u.items()}
    adam = torch.optim.Adam(leaves.values(), lr=lr, betas=(0.8, 0.95), eps=0.0)
    path = []
    for g in gradients:
        at = 1e-3 * 1e3 ** leaves["lr"].item()
        leaves["lr"].grad = torch.tensor(g["lr"] * at * math.log(1e3), dtype=torch.float64)
        leaves["x"].grad = torch.tensor(g["x"] * 2.0, dtype=torch.float64)
        adam.step()
        adam.param_groups[0]["lr"] *= 1.2
        path.append({"lr": 1e-3 * 1e3 ** leaves["lr"].item(), "x": 2.0 * leaves["x"].item()})
    return path


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_steps_are_those_of_adam_in_each_entry_s_scale(direction: str) -> None:
    """Trials in between, of samplers and worse, are passed over; one that is better begins anew."""
    space = {"lr": Float(1e-3, 1.0, "log"), "x": Float(0.0, 2.0)}
    study = optuna.create_study(direction=direction)
    d = {name: optuna.distributions.FloatDistribution(e.low, e.high, log=e.scale == "log") for name, e in space.items()}
    sign = 1 if direction == "minimize" else -1
    gradients = [{"lr": 4.0, "x": -0.05}, {"lr": 3.0, "x": 0.02}, {"lr": 0.5, "x": 0.01}]

    def ended(params: dict[str, float], loss: float, g: dict[str, float], **attrs: Any) -> None:
        attrs |= {"hypergradient": {name: sign * x for name, x in g.items()}}
        study.add_trial(optuna.create_trial(params=params, distributions=d, value=sign * loss, user_attrs=attrs))

    start = {"lr": 0.1, "x": 1.0}
    ended(start, 9.0, gradients[0])
    for i, wanted in enumerate(torchs_adam(start, gradients, 0.1)):
        assert hypergradient_step(study, space, 0.1) == pytest.approx(wanted, rel=1e-9)
        if i < 2:
            ended(wanted, 8.0 - i, gradients[i + 1], **{"hypergradient step from trial": i})
            ended({"lr": 1e-3, "x": 0.0}, 10.0, gradients[0])
    ended(start, 1.0, gradients[0])
    assert hypergradient_step(study, space, 0.1) == pytest.approx(torchs_adam(start, gradients, 0.1)[0], rel=1e-9)


def test_a_step_without_a_value_is_taken_again_half_as_long() -> None:
    study = optuna.create_study()
    study.enqueue_trial({"lr": 0.02, "logit(momentum)": 0.0})
    study.optimize(differentiated, n_trials=1)
    first: Any = hypergradient_step(study, SPACE_OF_LR, 0.1)
    for halved in (2, 4):
        assert enqueue_hypergradient_step(study, SPACE_OF_LR, 0.1)
        study.tell(study.ask(), state=optuna.trial.TrialState.FAIL)
        values: Any = hypergradient_step(study, SPACE_OF_LR, 0.1)
        assert math.log(values["lr"] / 0.02) == pytest.approx(math.log(first["lr"] / 0.02) / halved)


def test_bad_input_of_steps() -> None:
    study = optuna.create_study()
    trial = study.ask()
    with pytest.raises(TypeError, match="a dict"):
        note_hypergradient(trial, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="chaotic"):
        note_hypergradient(trial, {"lr": math.nan})
    with pytest.raises(ValueError, match="step_size"):
        enqueue_hypergradient_step(study, SPACE_OF_LR, 2.0)
    with pytest.raises(ValueError, match="empty"):
        enqueue_hypergradient_step(study, {})
    suggest(SPACE_OF_LR, trial)
    note_hypergradient(trial, {"eps": 1.0})
    study.tell(trial, 1.0)
    with pytest.raises(ValueError, match="'eps'"):
        enqueue_hypergradient_step(study, SPACE_OF_LR)


def _get(app: Any, path: str) -> tuple[str, bytes]:
    """A GET of a WSGI app, without a server."""
    from wsgiref.util import setup_testing_defaults

    environ: dict[str, Any] = {"PATH_INFO": path, "REQUEST_METHOD": "GET"}
    setup_testing_defaults(environ)
    said: list[str] = []
    parts = app(environ, lambda status, headers, exc_info=None: said.append(status))
    try:
        return said[0], b"".join(parts)
    finally:
        if hasattr(parts, "close"):
            parts.close()


def test_the_dashboard_shows_a_study(tmp_path: Path) -> None:
    dashboard = pytest.importorskip("optuna_dashboard", reason="not installed: pip install optuna-dashboard")
    study = optimize(reporting_bowl, SPACE, "asha", 8, storage=tmp_path / "s.journal", progress=False)
    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "s.journal"))
    app = dashboard.wsgi(optuna.storages.JournalStorage(backend))
    assert _get(app, "/dashboard")[0].startswith("200")
    status, body = _get(app, "/api/studies")
    (summary,) = json.loads(body)["study_summaries"]
    assert status.startswith("200") and summary["study_name"] == "hypergrad.search"
    status, body = _get(app, f"/api/studies/{summary['study_id']}")
    trials = json.loads(body)["trials"]
    assert status.startswith("200") and len(trials) == 8
    assert [trial["state"].lower() for trial in trials] == [
        {"pruned": "pruned", "complete": "complete"}[each.state] for each in study.trials
    ]
    shown = [trial["values"][0] for trial in trials if trial["state"] == "Complete"]
    assert [float(value) for value in shown] == [x.value for x in study.trials if x.state == "complete"]
