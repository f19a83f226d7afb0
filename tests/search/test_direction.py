"""Scores are maximised as losses are minimised; trials and seconds are limited by Optuna's names too."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest

from hypergrad.search import Float, NoTrialCompleted, Run, Trial, hyperopt_objective, optimize
from tests.search.problems import SMALL, SPACE, bowl, quadratic, reporting_bowl
from tests.tiers import slow_but

pytest.importorskip("optuna")
pytest.importorskip("sklearn")

quiet = partial(optimize, progress=False)


class Negative:
    """A trial that negates what is reported to it."""

    def __init__(self, trial: Trial):
        self.trial = trial

    def report(self, value: float, step: int) -> None:
        self.trial.report(-value, step)

    def should_prune(self) -> bool:
        return self.trial.should_prune()


def score(p: dict[str, Any]) -> float:
    return -bowl(p)


def reporting_score(p: dict[str, Any], trial: Trial) -> float:
    return -reporting_bowl(p, Negative(trial))  # type: ignore[arg-type]


def quadratic_score(p: dict[str, Any], trial: Trial) -> Run:
    run = quadratic(p, trial)
    return run._replace(val_loss=lambda: -run.val_loss())


# strategy -> a loss, the score that is minus it, space, trials
STRATEGIES: dict[str, tuple[Any, Any, Any, int | None]] = {
    "grid": (bowl, score, SPACE, None),
    "random": (bowl, score, SPACE, 12),
    "tpe": (bowl, score, SPACE, 25),
    "gp": (bowl, score, SPACE, 12),
    "cma": (bowl, score, SPACE, 25),
    "hyperopt": (bowl, score, SPACE, 30),
    "hyperband": (reporting_bowl, reporting_score, SPACE, 30),
    "asha": (reporting_bowl, reporting_score, SPACE, 30),
    "hypergradient": (quadratic, quadratic_score, SMALL, 2),
    "hybrid": (quadratic, quadratic_score, SMALL, 4),
    "hypergradient-online": (quadratic, quadratic_score, SMALL | {"steps": [40]}, 2),
    "hybrid-online": (quadratic, quadratic_score, SMALL | {"steps": [40]}, 3),
}


FEW = ("random", "grid", "tpe", "asha", "hyperband", "cma", "hypergradient", "hypergradient-online")


@pytest.mark.parametrize("strategy", slow_but(STRATEGIES, *FEW))
def test_maximising_a_score_is_minimising_minus_the_score(strategy: str) -> None:
    """The same trials, with the same values of the other sign."""
    package = {"cma": "cmaes", "hyperopt": "hyperopt"}.get(strategy)
    if package:
        pytest.importorskip(package)
    loss, its_score, space, trials = STRATEGIES[strategy]
    least = quiet(loss, space, strategy, trials)
    most = quiet(its_score, space, strategy, trials, direction="maximize")
    assert (least.direction, most.direction) == ("minimize", "maximize")
    assert [(x.params, x.state, x.value) for x in least.trials] == [
        (x.params, x.state, None if x.value is None else -x.value) for x in most.trials
    ]
    assert most.best_params == least.best_params and most.best_value == -least.best_value
    assert most.best_value == max(x.value for x in most.trials if x.state == "complete")  # type: ignore[type-var]


def test_minus_infinity_is_the_worst_score_and_infinity_a_failure() -> None:
    values = [math.nan, -math.inf, 1.0, math.inf]
    study = quiet(lambda p: values[p["i"]], {"i": [0, 1, 2, 3]}, "grid", direction="maximize")
    assert [each.state for each in study.trials] == ["failed", "complete", "complete", "failed"]
    assert study.best_params == {"i": 2} and study.verify(lambda p: values[p["i"]]).test == [1.0]


def test_fmin_maximises_by_minus_the_score() -> None:
    pytest.importorskip("hyperopt")
    found = hyperopt_objective(score, SPACE, direction="maximize")({"lr": 0.1, "k": 3, "kind": "a"})
    assert found["loss"] == bowl({"lr": 0.1, "k": 3, "kind": "a"}) == 1.0


def test_the_direction_is_part_of_a_stored_study(tmp_path: Any) -> None:
    quiet(score, SPACE, "random", 2, storage=tmp_path / "s.journal", direction="maximize")
    with pytest.raises(ValueError, match="its direction is 'maximize', not 'minimize'"):
        quiet(score, SPACE, "random", 2, storage=tmp_path / "s.journal")


# ---- n_trials and timeout


@pytest.mark.parametrize(
    ("given", "trials"),
    [({"n_trials": 3}, 3), ({"n_trials": 9, "timeout": 0.05}, 1), ({"n_trials": 9, "budget": {"epochs": 2}}, 2)],
)
def test_n_trials_and_timeout_limit_a_study(given: dict[str, Any], trials: int) -> None:
    def objective(p: dict[str, Any], trial: Trial) -> float:
        while "timeout" in given and not trial.exhausted:
            pass
        trial.report(1.0, 1)
        return 1.0

    assert len(quiet(objective, SPACE, "random", **given).trials) == trials


def test_trials_of_earlier_calls_count(tmp_path: Any) -> None:
    for n_trials in (2, 2, 5):
        assert len(quiet(bowl, SPACE, "random", n_trials=n_trials, storage=tmp_path / "s").trials) == n_trials


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "direction": ({"direction": "up"}, ValueError, "'minimize' or 'maximize', got 'up'"),
    "trials twice": ({"n_trials": 3, "budget": 4}, ValueError, "the budget has trials already"),
    "seconds twice": ({"timeout": 3, "budget": {"seconds": 4}}, ValueError, "the budget has seconds already"),
    "no trials": ({"n_trials": 0}, ValueError, "above 0"),
    "half a trial": ({"n_trials": 0.5}, ValueError, "whole"),
    "no time": ({"timeout": -1.0}, ValueError, "above 0"),
    "no limit": ({}, ValueError, "n_trials=64"),
    "a number that is none": ({"n_trials": "3"}, ValueError, "a number above 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    given, error, match = BAD[name]
    with pytest.raises(error, match=match):
        quiet(bowl, SPACE, "random", **given)


def test_infinity_of_the_wrong_sign_in_every_trial_says_so() -> None:
    with pytest.raises(NoTrialCompleted, match="returned inf"):
        quiet(lambda p: math.inf, {"x": Float(0, 1)}, "random", n_trials=1, direction="maximize")
