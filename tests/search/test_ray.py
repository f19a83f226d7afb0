"""Trials on a local Ray cluster of two workers."""

from __future__ import annotations

import os
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hypergrad.search import Int, optimize
from hypergrad.search.ray_workers import Cluster
from tests.search.problems import SMALL, SPACE, bowl, deadly_bowl, never, quadratic, reporting_bowl
from tests.search.ray_warnings import QUIET
from tests.search.test_aliases import LR, WD, decayed

pytest.importorskip("ray", reason="ray is not installed: pip install 'ray[tune]'")
pytest.importorskip("optuna")

pytestmark = QUIET
on_ray = partial(optimize, backend="ray", n_jobs=2, progress=False)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_killed_worker_loses_nothing_and_nothing_is_counted_twice(tmp_path: Path) -> None:
    storage = tmp_path / "study.journal"
    study = on_ray(partial(deadly_bowl, tmp_path, 5, 1), SPACE, "random", 20, storage=storage)
    alone = optimize(bowl, SPACE, "random", 20, progress=False)
    assert [(x.number, x.params, x.value) for x in study.trials] == [
        (x.number, x.params, x.value) for x in alone.trials
    ]
    assert [x.retries for x in study.trials] == [int(x.number == 5) for x in study.trials]
    begun = [int(x) for x in (tmp_path / "begun").read_text().split()]
    assert sorted(begun) == sorted([*range(20), 5])
    assert study.spent.trials == 20 and study.spent.epochs == 60
    reported = study.optuna.get_trials(deepcopy=False)[5].intermediate_values
    assert reported == {epoch: bowl(study.trials[5].params) + 1 / epoch for epoch in (1, 2, 3)}
    assert list(study.table()["retries"]) == [x.retries for x in study.trials]


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_trial_whose_worker_always_dies_has_failed_and_the_study_goes_on(tmp_path: Path) -> None:
    objective, storage = partial(deadly_bowl, tmp_path, 1, 9), tmp_path / "study.journal"
    study = on_ray(objective, SPACE, "random", 4, storage=storage, cluster={"retries": 1})
    assert [x.state for x in study.trials] == ["complete", "failed", "complete", "complete"]
    assert "died 2 times" in (study.trials[1].error or "") and study.trials[1].retries == 1
    more = on_ray(objective, SPACE, "random", 6, storage=storage)  # resumed: what failed stays so
    assert len(more.trials) == 6 and more.trials[1].state == "failed"


# strategy -> objective, space, trials
STRATEGIES: dict[str, tuple[Any, Any, int]] = {
    "grid": (bowl, {"x": [1], "lr": [1e-2, 1e-1], "k": [3], "kind": ["a"]}, 2),
    "tpe": (bowl, SPACE, 4),
    "asha": (reporting_bowl, SPACE, 12),
    "hypergradient": (quadratic, SMALL, 2),
    "hybrid": (quadratic, SMALL, 3),
    "hybrid-online": (quadratic, SMALL, 2),
}


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies_are_distributed(strategy: str, tmp_path: Path) -> None:
    objective, space, trials = STRATEGIES[strategy]
    study = on_ray(objective, space, strategy, trials, storage=tmp_path / "s.journal", cluster=Cluster(num_cpus=0.5))
    assert [x.number for x in study.trials] == list(range(trials))
    states = {x.state for x in study.trials}
    assert states == ({"complete", "pruned"} if strategy == "asha" else {"complete"})
    if strategy == "hypergradient":
        here = optimize(objective, space, strategy, trials, progress=False)
        assert [x.value for x in study.trials] == pytest.approx([x.value for x in here.trials], rel=1e-9)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_workers_report_to_a_study_over_a_wider_space(tmp_path: Path) -> None:
    on_ray(reporting_bowl, SPACE, "asha", 4, storage=tmp_path / "s.journal")
    with pytest.warns(UserWarning, match="extended: its 4 trials stay"):
        study = on_ray(reporting_bowl, SPACE | {"k": Int(0, 9)}, "asha", 12, storage=tmp_path / "s.journal")
    reported = [set(x.intermediate_values) for x in study.optuna.get_trials(deepcopy=False)]
    assert [max(each) for each in reported] == [x.cost.epochs for x in study.trials] and len(reported) == 12


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_what_a_worker_says_of_an_entry_that_does_not_move_is_said_here(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no hypergradient moves 'wd'"):
        study = on_ray(decayed, {"lr": LR, "wd": WD}, "hypergradient", 1, storage=tmp_path / "s.journal")
    assert study.best_trial.notes["not differentiated"] == ["wd"]


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_what_is_wrong_with_the_objective_comes_back_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="returned None"):
        on_ray(lambda p: None, SPACE, "random", 2, storage=tmp_path / "s.journal")


def _with(**arguments: Any) -> Any:
    given: dict[str, Any] = {"objective": never, "space": SPACE, "strategy": "random", "budget": 3, "storage": "s"}
    return lambda: on_ray(**given | arguments)


def locked(lock: Any, p: dict[str, Any]) -> float:
    raise AssertionError("a trial was run")


def _in_memory() -> Any:
    import optuna

    return _with(storage=optuna.storages.InMemoryStorage())()


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "no storage": (_with(storage=None), ValueError, "storage='study.journal'"),
    "a storage in memory": (_in_memory, ValueError, "storage='study.journal'"),
    "what cannot be sent": (_with(objective=partial(locked, threading.Lock())), ValueError, "cannot be sent"),
    "an unknown word": (_with(cluster={"gpus": 1}), ValueError, "storage_path, not 'gpus'"),
    "not a dict": (_with(cluster="auto"), TypeError, "a dict"),
    "negative GPUs": (_with(cluster={"num_gpus": -1}), ValueError, "num_gpus"),
    "one and a half GPUs": (_with(cluster={"num_gpus": 1.5}), ValueError, "whole"),
    "half a retry": (_with(cluster={"retries": 0.5}), ValueError, "whole"),
    "nothing at all": (_with(cluster={"num_cpus": 0}), ValueError, "needs some"),
    "a cluster without Ray": (_with(backend="local", cluster={"num_cpus": 1}), ValueError, "backend='ray'"),
    "an unknown backend": (_with(backend="spark"), ValueError, "local, ray"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call, kind, match = BAD[name]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=match):
        call()
    assert os.listdir(tmp_path) == []  # nothing was begun


def test_a_missing_ray_is_named_with_its_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'ray\[tune\]'"):
        _with()()
