"""Checkpoints and storages are data: a crafted one runs nothing."""

from __future__ import annotations

import math
import os
import pickle
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hypergrad
from hypergrad.search import Float, optimize
from hypergrad.search.objective import WrongType
from hypergrad.search.stored_data import load_state, save_state

SPACE = {name: Float(0.0, 1.0, differentiable=False) for name in ("x", "y")}


class Crafted:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def crafted(tmp_path: Path) -> Crafted:
    """One that would run, as another unpickling of it shows."""
    there = tmp_path / "it ran here"
    pickle.loads(pickle.dumps(Crafted(there)))
    there.rmdir()
    return Crafted(there)


def smooth(p: dict[str, Any]) -> float:
    return p["x"] ** 2 + p["y"]


def test_a_crafted_checkpoint_runs_nothing(crafted: Crafted, tmp_path: Path) -> None:
    torch.save({"state": {"epoch": 3, "model": crafted}, "curve": [(1, 0.5)]}, tmp_path / "trial.pt")
    with pytest.raises(ValueError, match="more than data"):
        load_state(tmp_path / "trial.pt")
    assert not crafted.folder.exists()


def test_a_crafted_checkpoint_of_ray_runs_nothing(
    crafted: Crafted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune = pytest.importorskip("ray.tune", reason="ray is not installed: pip install 'ray[tune]'")
    from hypergrad.search.ray_tune import FILE, TuneTrial

    (tmp_path / "checkpoint").mkdir()
    torch.save({"state": crafted, "curve": [(1, 0.5)]}, tmp_path / "checkpoint" / FILE)
    monkeypatch.setattr(tune, "get_checkpoint", lambda: tune.Checkpoint.from_directory(str(tmp_path / "checkpoint")))
    with pytest.raises(ValueError, match="more than data"):
        TuneTrial(0, {}, 0, True, 1.0)
    assert not crafted.folder.exists()
    torch.save({"state": {"epoch": 3}, "curve": [(1, 0.5)]}, tmp_path / "checkpoint" / FILE)
    assert TuneTrial(0, {}, 0, True, 1.0).restore() == {"epoch": 3}


CMA = [
    ("cma", {}),
    ("cma", {"use_separable_cma": True}),
    ("cma", {"with_margin": True}),
    ("hybrid", {"sampler": "cma"}),
]


@pytest.mark.parametrize(("strategy", "options"), CMA, ids=str)
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_crafted_storage_runs_nothing(
    strategy: str, options: dict[str, Any], crafted: Crafted, tmp_path: Path
) -> None:
    """CMA-ES of Optuna pickles its state into attributes of trials, and unpickles them."""
    optuna = pytest.importorskip("optuna")
    pytest.importorskip("cmaes")
    from hypergrad.search.storage import NAME, open_storage

    run, storage = trained if strategy == "hybrid" else smooth, tmp_path / "s.journal"
    call = partial(optimize, run, SPACE, strategy, options=options, storage=storage, progress=False)
    call(14)
    study = optuna.load_study(study_name=NAME, storage=open_storage(storage))
    keys = [key for trial in study.trials for key in trial.system_attrs if ":optimizer:" in key]
    assert keys  # and what CMA-ES itself has written is read:
    assert len(call(16).trials) == 16
    kind = keys[0].split(":")[0]
    frozen = [x for x in study.trials if any(":optimizer:" in key for key in x.system_attrs)][-1]
    values = {"params": frozen.params, "distributions": frozen.distributions, "value": 0.5}
    attrs = {f"{kind}:optimizer:0": pickle.dumps(crafted).hex(), f"{kind}:generation": 1}
    study.add_trial(optuna.trial.create_trial(**values, system_attrs=attrs))
    with pytest.raises(ValueError, match=r"trial 16 of this storage .* do not use"):
        call(20)
    assert not crafted.folder.exists()


def trained(p: dict[str, Any], trial: Any) -> Any:
    from tests.search.problems import quadratic

    return quadratic({"lr": 0.1 + 0.1 * p["x"], "steps": 2}, trial)


DATA: dict[str, Any] = {
    "tensors": {"w": torch.arange(3.0), "half": torch.ones(2, dtype=torch.bfloat16)},
    "state_dicts": OrderedDict(weight=torch.ones(2, 2)),
    "plain": {"epoch": 3, "name": "x", "flags": [True, None], "pair": (1, 2.5), "far": math.inf},
}
NOT_DATA: dict[str, tuple[Any, str]] = {
    "an array of numpy": ({"x": np.ones(3)}, "numpy"),
    "a number of numpy": ({"x": np.float64(1)}, "numpy"),
    "a module": ({"model": torch.nn.Linear(1, 1)}, "torch.nn.modules.linear.Linear"),
    "a path": ({"path": Path("x")}, "Path"),
}


@pytest.mark.parametrize("name", DATA)
def test_data_come_back_as_they_were(name: str, tmp_path: Path) -> None:
    save_state({"state": DATA[name]}, tmp_path / "s.pt")
    back = load_state(tmp_path / "s.pt")["state"]
    assert type(back) is type(DATA[name]) and back.keys() == DATA[name].keys()
    assert all(torch.equal(x, back[k]) if isinstance(x, torch.Tensor) else x == back[k] for k, x in DATA[name].items())


@pytest.mark.parametrize("name", NOT_DATA)
def test_what_could_not_be_read_back_is_refused_when_it_is_written(name: str, tmp_path: Path) -> None:
    state, named = NOT_DATA[name]
    with pytest.raises(WrongType, match=named):
        save_state(state, tmp_path / "s.pt")


def test_a_tuners_state_is_data(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 1)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    tuner = hypergrad.Tuner(model, sgd, lambda: model(torch.ones(4, 2)).square().mean(), tune=("lr",))
    for _ in range(12):
        sgd.zero_grad()
        tuner.backward(model(torch.ones(4, 2)).square().mean())
        sgd.step()
    save_state({"tuner": tuner.state_dict(), "optimizer": sgd.state_dict()}, tmp_path / "s.pt")
    assert load_state(tmp_path / "s.pt")["tuner"]["stats"]["steps"] == 12
    tuner.close()
