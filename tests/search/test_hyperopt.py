"""Hyperopt, in both directions: `fmin` minimises our objective over our space, and its TPE is a strategy of ours."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from hypergrad.search import Float, Space, hyperopt_objective, optimize, to_hyperopt
from hypergrad.search.convert.hyperopt_spaces import flat, labels_of
from hypergrad.search.objective import Trial, seed_of
from hypergrad.search.strategies import make
from tests.search.problems import CONDITIONAL, ENTRIES, SPACE, bowl, noisy_bowl, quadratic

hyperopt = pytest.importorskip("hyperopt")
pytest.importorskip("optuna")


def fmin(objective: Any, space: Any, evaluations: int) -> tuple[Any, Any]:
    trials, rng = hyperopt.Trials(), np.random.default_rng(0)
    quietly = {"show_progressbar": False, "verbose": False}
    best = hyperopt.fmin(
        objective, to_hyperopt(space), hyperopt.tpe.suggest, evaluations, trials=trials, rstate=rng, **quietly
    )
    return flat(hyperopt.space_eval(to_hyperopt(space), best)), trials


def test_fmin_minimises_the_same_objective_over_the_same_space() -> None:
    best, trials = fmin(hyperopt_objective(bowl, SPACE), SPACE, 60)
    assert trials.best_trial["result"]["params"] == best
    assert trials.best_trial["result"]["loss"] == bowl(best) <= 0.3
    assert best["kind"] == "a"


def test_conditions_seeds_and_failures_pass_through_fmin() -> None:
    def objective(p: dict[str, Any], trial: Trial) -> float:
        assert set(p) == set(CONDITIONAL.active(p)) and trial.seed == seed_of(7, trial.number)
        if p["optimizer"] == "Adam":
            raise RuntimeError("Adam is not there")
        return abs(math.log10(p["lr"]) + 2)

    best, trials = fmin(hyperopt_objective(objective, CONDITIONAL, seed=7), CONDITIONAL, 25)
    assert best["optimizer"] == "SGD"
    for result in trials.results:
        failed = result["params"]["optimizer"] == "Adam"
        assert result["status"] == ("fail" if failed else "ok")
        assert ("Adam is not there" in result.get("error", "")) == failed
    assert {result["status"] for result in trials.results} == {"fail", "ok"}


def test_a_run_is_trained() -> None:
    space = {"lr": Float(1e-2, 0.5, "log")}
    result = hyperopt_objective(quadratic, space)({"lr": 0.1})
    assert result["loss"] == pytest.approx(2 * 0.9**10)
    assert result["cost"]["gradient_evaluations"] == 5


@pytest.mark.parametrize("space", [Space(ENTRIES), CONDITIONAL], ids=["entries", "conditional"])
def test_values_go_to_hyperopt_s_labels_and_back(space: Space) -> None:
    """A trial of ours becomes the document that Hyperopt would have made for it."""
    strategy = make("hyperopt", space, 0, {})
    values: Any = [strategy.next([], seed) for seed in range(20)]  # type: ignore[attr-defined]
    for each in values:
        assert space.check(each) == each
        again = flat(hyperopt.space_eval(to_hyperopt(space), labels_of(space, each)))
        again = {name: again[name] for name in space.active(again)}
        assert set(again) == set(each)
        for name, value in each.items():
            assert again[name] == (pytest.approx(value, rel=1e-9) if isinstance(value, float) else value)
    after: Any = strategy.next([(each, float(i)) for i, each in enumerate(values + values)], 0)  # type: ignore[attr-defined]
    assert space.check(after) == after  # TPE itself: after its 20 random trials


def test_the_strategy_proposes_what_fmin_s_own_tpe_proposes_after_the_same_trials() -> None:
    space = Space({"lr": SPACE["lr"], "kind": SPACE["kind"]})

    def loss(p: dict[str, Any]) -> float:
        return abs(math.log10(p["lr"]) + 2) + {"a": 0.0, "b": 1.0}[p["kind"]]

    _, trials = fmin(hyperopt_objective(loss, space), space, 30)
    domain = hyperopt.base.Domain(None, to_hyperopt(space))
    (theirs,) = hyperopt.tpe.suggest([30], domain, trials, 5, verbose=False)
    finished = [(result["params"], result["loss"]) for result in trials.results]
    ours: Any = make("hyperopt", space, 0, {}).next(finished, 5)  # type: ignore[attr-defined]
    assert labels_of(space, ours) == pytest.approx({k: v[0] for k, v in theirs["misc"]["vals"].items()}, rel=1e-9)


def test_a_study_of_hyperopt_is_the_same_for_the_same_seed_and_conditional() -> None:
    def objective(p: dict[str, Any]) -> float:
        return abs(math.log10(p["lr"]) + 2) + p.get("momentum", 1.0)

    studies = [optimize(objective, CONDITIONAL, "hyperopt", 30, seed=seed, progress=False) for seed in (1, 1, 2)]
    first, again, other = ([x.params for x in study.trials] for study in studies)
    assert first == again != other
    assert all(set(x) == set(CONDITIONAL.active(x)) for x in first)


def test_bad_input() -> None:
    with pytest.raises(TypeError, match="function"):
        hyperopt_objective(3, SPACE)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="empty"):
        hyperopt_objective(bowl, {})
    with pytest.raises(ValueError, match="n_EI_candidates"):
        optimize(noisy_bowl, SPACE, "hyperopt", 3, options={"x": 1})
    with pytest.raises(ValueError, match="one Categorical parent"):
        optimize(noisy_bowl, {"a": [1, 2], "b": [1, 2], "c": Float(0, 1, when={"a": 1, "b": 2})}, "hyperopt", 3)
