"""HypergradSearchCV: scikit-learn's protocol, agreement with a grid, bad input; our estimators inside scikit-learn's searches."""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
from scipy.stats import loguniform, norm
from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_iris, load_wine
from sklearn.ensemble import RandomForestRegressor
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.linear_model import ElasticNet, Lasso, LogisticRegression, Ridge
from sklearn.model_selection import (
    GridSearchCV,
    GroupKFold,
    HalvingGridSearchCV,
    KFold,
    RandomizedSearchCV,
    cross_val_score,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from sklearn.utils.estimator_checks import check_estimator

from hypergrad.search import Float, HypergradSearchCV, Int
from hypergrad.search.sklearn import MLPClassifier, MLPRegressor
from hypergrad.search.sklearn.gradient_descent import descend, starts

NUMBERS = load_diabetes(return_X_y=True)
CLASSES = load_iris(return_X_y=True)
ALPHA = {"alpha": Float(1e-4, 1e2, "log")}
AGREES = 1.001  # the loss, over that of a grid
SKIPPED = "check_array_api_"  # begins the names of checks that need SCIPY_ARRAY_API in the environment


def ridge(**options: Any) -> HypergradSearchCV:
    return HypergradSearchCV(Ridge(), ALPHA, **options)


# a search, its data, a grid of values, and the scorer that is minus its loss
AGREEMENT: dict[str, tuple[Any, Any, Any, int, str]] = {
    "ridge": (Ridge(), NUMBERS, ALPHA, 30, "neg_mean_squared_error"),
    "lasso": (Lasso(), NUMBERS, {"alpha": Float(1e-3, 1e1, "log")}, 30, "neg_mean_squared_error"),
    "elastic net": (
        ElasticNet(),
        NUMBERS,
        {"alpha": Float(1e-4, 1.0, "log"), "l1_ratio": Float(0.1, 1.0)},
        8,
        "neg_mean_squared_error",
    ),
    "logistic": (
        LogisticRegression(solver="newton-cholesky", tol=1e-8),
        CLASSES,
        {"C": Float(1e-3, 1e4, "log")},
        20,
        "neg_log_loss",
    ),
    "mlp": (
        MLPClassifier((2,), solver="sgd", max_iter=10, random_state=0),
        CLASSES,
        {"learning_rate_init": Float(1e-3, 1.0, "log")},
        20,
        "neg_log_loss",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", AGREEMENT)
def test_agrees_with_a_grid(name: str) -> None:
    estimator, (x, y), space, points, scoring = AGREEMENT[name]
    folds = KFold(3, shuffle=True, random_state=0)
    found = HypergradSearchCV(estimator, space, cv=folds, scoring=scoring, random_state=0).fit(x, y)
    grid = {key: [entry.from_unit(u) for u in np.linspace(0, 1, points)] for key, entry in space.items()}
    theirs = GridSearchCV(estimator, grid, cv=folds, scoring=scoring).fit(x, y)
    assert found.best_loss_ <= -AGREES * theirs.best_score_
    assert found.best_score_ == pytest.approx(-found.best_loss_)
    assert len(found.cv_results_["params"]) < len(theirs.cv_results_["params"])


def test_the_results_are_those_of_a_grid_at_its_candidates() -> None:
    """GridSearchCV over the values that were tried has the same scores, the same columns and the same ranks."""
    ours = ridge(cv=3, return_train_score=True).fit(*NUMBERS)
    results = ours.cv_results_
    values = [params["alpha"] for params in results["params"]]
    theirs = GridSearchCV(Ridge(), {"alpha": values}, cv=3, return_train_score=True).fit(*NUMBERS).cv_results_
    assert set(theirs) <= set(results)
    for key in set(theirs) - {"params"}:
        if "time" not in key:
            np.testing.assert_allclose(np.asarray(results[key], float), np.asarray(theirs[key], float), rtol=1e-10)
    assert results["params"] == theirs["params"]
    assert ours.best_index_ == np.argmin(results["mean_test_loss"])
    assert results["rank_test_loss"][ours.best_index_] == 1
    assert ours.best_params_ == results["params"][ours.best_index_]
    assert ours.best_score_ == results["mean_test_score"][ours.best_index_]
    assert ours.n_splits_ == 3


def test_a_slope_is_the_difference_of_the_mean_losses() -> None:
    ours = ridge(cv=3).fit(*NUMBERS)
    slopes = ours.cv_results_["slope_alpha"]
    i = int(np.flatnonzero(~np.isnan(slopes))[0])
    at = ours.cv_results_["params"][i]["alpha"]

    def loss(alpha: float) -> float:
        return -float(cross_val_score(Ridge(alpha), *NUMBERS, cv=3, scoring="neg_mean_squared_error").mean())

    difference = (loss(at * (1 + 1e-4)) - loss(at * (1 - 1e-4))) / (2e-4 * at)
    assert slopes[i] == pytest.approx(difference, rel=1e-5)


def test_protocol_of_a_regressor() -> None:
    search = clone(ridge(cv=3))
    assert search.get_params()["estimator__alpha"] == 1.0
    search.set_params(estimator__fit_intercept=False, cv=4)
    with pytest.raises(NotFittedError):
        search.predict(NUMBERS[0])
    search.fit(*NUMBERS)
    alone = Ridge(**search.best_params_, fit_intercept=False).fit(*NUMBERS)
    np.testing.assert_array_equal(search.predict(NUMBERS[0]), alone.predict(NUMBERS[0]))
    assert search.score(*NUMBERS) == alone.score(*NUMBERS)
    assert search.n_features_in_ == 10 and search.n_splits_ == 4
    assert not hasattr(search, "predict_proba")


def test_protocol_of_a_classifier_in_a_pipeline_of_names() -> None:
    x, y = CLASSES
    names = np.array(["a", "b", "c"])[y]
    estimator = make_pipeline(StandardScaler(), LogisticRegression())
    space = {"logisticregression__C": loguniform(1e-2, 1e2)}
    search = HypergradSearchCV(estimator, space, cv=3, scoring="neg_log_loss").fit(x, names)
    assert list(search.classes_) == ["a", "b", "c"]
    assert search.predict_proba(x).shape == (150, 3)
    assert search.score(x, names) > -0.2  # the scorer's
    assert set(search.predict(x)) == {"a", "b", "c"}
    assert search.best_params_["logisticregression__C"] == search.best_estimator_[-1].C


def test_nested_cross_validation_and_a_search_around_it() -> None:
    assert cross_val_score(ridge(cv=2, n_iter=7), *NUMBERS, cv=3).mean() > 0.3
    outer = GridSearchCV(ridge(cv=2, n_iter=7), {"estimator__fit_intercept": [True, False]}, cv=2).fit(*NUMBERS)
    assert outer.best_params_ == {"estimator__fit_intercept": True}


def test_groups_frames_and_no_refit() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(NUMBERS[0], columns=[f"c{i}" for i in range(10)])
    groups = np.arange(len(frame)) // 50
    search = ridge(cv=GroupKFold(3), n_iter=7).fit(frame, NUMBERS[1], groups=groups)
    assert list(search.feature_names_in_) == list(frame.columns)
    alone = ridge(cv=3, n_iter=7, refit=False).fit(*NUMBERS)
    assert alone.best_params_ and not hasattr(alone, "best_estimator_")


def test_the_same_seed_finds_the_same_and_n_iter_is_kept() -> None:
    space = {"alpha": Float(1e-4, 1.0, "log"), "l1_ratio": Float(0.1, 1.0)}
    found = [HypergradSearchCV(ElasticNet(), space, cv=2, n_iter=9, random_state=3).fit(*NUMBERS) for _ in range(2)]
    assert found[0].cv_results_["params"] == found[1].cv_results_["params"]
    assert len(found[0].cv_results_["params"]) <= 9


def test_a_start_is_where_the_scan_begins() -> None:
    space = {"alpha": Float(1e-4, 1e2, "log", start=0.03)}
    found = HypergradSearchCV(Ridge(), space, cv=2, n_initial=1).fit(*NUMBERS)
    assert found.cv_results_["params"][0]["alpha"] == pytest.approx(0.03)
    assert found.cv_results_["slope_alpha"][0] != 0  # the descent begins there too


def test_a_loss_of_the_users_choice() -> None:
    svm = LinearSVC(dual=False, tol=1e-8)
    search = HypergradSearchCV(svm, {"C": Float(1e-3, 1e2, "log")}, loss="log_loss", cv=2, n_iter=8)
    best = search.fit(*CLASSES)
    assert 0 < best.best_loss_ < np.log(3) and best.best_score_ > 0.9


def test_a_plateau_is_said() -> None:
    search = HypergradSearchCV(Lasso(), {"alpha": Float(1e4, 1e6, "log")}, cv=2)
    with pytest.warns(ConvergenceWarning, match="does not change with alpha"):
        search.fit(*NUMBERS)


def test_fits_that_end_short_of_a_minimum_are_said() -> None:
    x, y = load_wine(return_X_y=True)
    estimator = make_pipeline(StandardScaler(), LogisticRegression(tol=1.0))
    search = HypergradSearchCV(estimator, {"logisticregression__C": Float(1.0, 1e4, "log")}, cv=3)
    with pytest.warns(ConvergenceWarning, match="short of their minimum"):
        search.fit(x, y)


BAD: dict[str, tuple[Any, str]] = {
    "a name that is not there": (lambda: HypergradSearchCV(Ridge(), {"C": Float(0.1, 1)}), "has no parameter 'C'"),
    "a name without a derivative": (
        lambda: HypergradSearchCV(Ridge(), {"tol": Float(0.1, 1)}),
        "no derivative in 'tol'",
    ),
    "a whole number": (lambda: HypergradSearchCV(Ridge(), {"max_iter": Int(1, 9)}), "a gradient moves continuous"),
    "choices": (lambda: HypergradSearchCV(Ridge(), {"alpha": [0.1, 1.0]}), "GridSearchCV with this search as its"),
    "steps": (lambda: HypergradSearchCV(Ridge(), {"alpha": Float(0, 1, step=0.5)}), "without a step"),
    "nothing": (lambda: HypergradSearchCV(Ridge(), {}), "the space is empty"),
    "bounds reversed": (lambda: HypergradSearchCV(Ridge(), {"alpha": Float(1, 0.1)}), "reversed"),
    "a log range from 0": (lambda: HypergradSearchCV(Ridge(), {"alpha": Float(0, 1, "log")}), "cannot touch 0"),
    "no bounds": (lambda: HypergradSearchCV(Ridge(), {"alpha": norm(0, 1)}), "has no bounds"),
    "a forest": (
        lambda: HypergradSearchCV(RandomForestRegressor(), {"ccp_alpha": Float(0.1, 1)}),
        "RandomForestRegressor cannot be .*ElasticNet, Lasso",
    ),
    "the hinge": (lambda: HypergradSearchCV(LinearSVC(loss="hinge"), {"C": Float(0.1, 1)}), "loss='squared_hinge'"),
    "liblinear": (
        lambda: HypergradSearchCV(LogisticRegression(solver="liblinear"), {"C": Float(0.1, 1)}),
        "liblinear penalises the intercept",
    ),
    "l1": (
        lambda: HypergradSearchCV(LogisticRegression(l1_ratio=1.0, solver="saga"), {"C": Float(0.1, 1)}),
        "the L2 penalty",
    ),
    "one alpha a target": (
        lambda: HypergradSearchCV(Ridge(alpha=[1.0, 2.0]), {"tol": Float(0.1, 1)}),  # type: ignore[arg-type]
        "one alpha",
    ),
    "an MLP's momentum at a minimum": (
        lambda: HypergradSearchCV(MLPRegressor(random_state=0), {"momentum": Float(0.1, 0.9)}),
        "has those in alpha, as it is set",
    ),
    "an MLP without a seed": (lambda: HypergradSearchCV(MLPRegressor(), ALPHA), "a whole number for random_state"),
    "an entry that is not to be differentiated": (
        lambda: HypergradSearchCV(Ridge(), {"alpha": Float(0.1, 1, differentiable=False)}),
        "leave it out of the space",
    ),
    "a loss that is not there": (lambda: ridge(loss="hinge"), "loss must be one of squared_error"),
    "an unknown scorer": (lambda: ridge(scoring="accurate"), "scoring"),
    "two scorers": (lambda: ridge(scoring=["r2", "neg_mean_squared_error"]), "the name of one scorer"),
    "refit by a name": (lambda: ridge(refit="r2"), "refit must be True or False"),
    "no candidates left": (lambda: ridge(n_iter=5), "n_iter must be above n_initial"),
    "n_initial": (lambda: ridge(n_initial=0), "n_initial must be a whole number from 1"),
    "tol": (lambda: ridge(tol=-1.0), "tol must be a number from 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_before_any_fit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, match = BAD[name]
    module = importlib.import_module("hypergrad.search.sklearn.folds")
    monkeypatch.setattr(module, "_fit_and_score", lambda *_, **__: pytest.fail("something was fitted"))
    with pytest.raises(ValueError, match=match):
        make().fit(*NUMBERS)


def test_nan_is_scikit_learns_to_refuse() -> None:
    x = NUMBERS[0].copy()
    x[0, 0] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        ridge().fit(x, NUMBERS[1])


def test_descent_of_a_known_function() -> None:
    """f(u) = Σ (u − a)², a outside the cube in one coordinate."""
    a, seen = np.array([0.3, 1.2]), []

    def f(u: np.ndarray) -> tuple[float, np.ndarray]:
        seen.append((float(((u - a) ** 2).sum()), *u))
        return seen[-1][0], 2 * (u - a)

    descend(f, np.array([0.5, 0.5]), 20, 1e-12)
    np.testing.assert_allclose(min(seen)[1:], [0.3, 1.0], atol=1e-6)
    seen.clear()
    assert descend(f, np.array([0.5, 0.5]), 2, 0.0) == "all evaluations are spent" and len(seen) == 2


def test_starts_are_spread_inside_the_cube() -> None:
    assert [float(u[0]) for u in starts(1, 2, 0)] == [0.25, 0.75]
    assert all(((u > 0) & (u < 1)).all() for u in starts(3, 8, 0))


SEARCHES: dict[str, Any] = {
    "grid": lambda e, values: GridSearchCV(e, {"alpha": values}, cv=2),
    "randomized": lambda e, values: RandomizedSearchCV(
        e, {"alpha": loguniform(1e-4, 1e2)}, n_iter=5, cv=2, random_state=0
    ),
    "halving": lambda e, values: HalvingGridSearchCV(e, {"alpha": values}, cv=2, random_state=0, min_resources=60),
}
OURS: dict[str, tuple[Any, Any]] = {
    "classifier": (MLPClassifier((2,), random_state=0), CLASSES),
    "classifier by steps": (MLPClassifier((2,), solver="sgd", max_iter=20, random_state=0), CLASSES),
    "regressor": (MLPRegressor((2,), random_state=0), (NUMBERS[0], (NUMBERS[1] - 150) / 75)),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("name", SEARCHES)
def test_our_estimators_inside_scikit_learns_searches(name: str, kind: str) -> None:
    """An alpha of 1000 leaves nothing of the weights: none of the searches takes it."""
    estimator, data = OURS[kind]
    search = SEARCHES[name](estimator, [1e-2, 1e3]).fit(*data)
    assert search.best_params_["alpha"] < 10
    assert search.score(*data) > (0.3 if kind == "regressor" else 0.8)


def failures(made: Any) -> dict[str, Any]:
    """What of scikit-learn's contract an estimator does not keep, by the name of the check."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the checks' data are not made for an MLP, and it says so
        checks = check_estimator(made, on_skip=None, on_fail=None)
    assert len(checks) > 40
    skipped = [each["check_name"] for each in checks if each["status"] == "skipped"]
    assert all(name.startswith(SKIPPED) for name in skipped), skipped
    return {each["check_name"]: each["exception"] for each in checks if each["status"] not in ("passed", "skipped")}


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"max_iter": 50}, {"solver": "sgd", "max_iter": 200}], ids=["lbfgs", "sgd"])
@pytest.mark.parametrize("kind", [MLPClassifier, MLPRegressor])
def test_estimators_keep_scikit_learns_contract(kind: type, options: dict[str, Any]) -> None:
    assert failures(kind((2,), random_state=0, **options)) == {}


# estimator -> its entry, and the checks that GridSearchCV of this estimator does not pass either
CONTRACT: dict[str, tuple[Any, str, set[str]]] = {
    "ridge": (Ridge(), "alpha", {"check_supervised_y_2d"}),
    "logistic": (LogisticRegression(), "C", set()),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTRACT)
def test_the_search_keeps_the_contract_that_gridsearchcv_keeps(name: str) -> None:
    estimator, entry, allowed = CONTRACT[name]
    theirs = failures(GridSearchCV(estimator, {entry: [0.1, 1.0]}, cv=2, error_score="raise"))
    assert set(theirs) == allowed
    ours = failures(HypergradSearchCV(estimator, {entry: Float(1e-2, 1e2, "log")}, cv=2))
    assert set(ours) <= allowed, ours


@pytest.mark.slow
def test_the_public_name_comes_when_asked_for() -> None:
    code = (
        "import sys, hypergrad.search as s\n"
        "print('sklearn' in sys.modules, s.HypergradSearchCV.__name__, 'sklearn' in sys.modules)\n"
        "import importlib; real = importlib.import_module\n"
        "def gone(name, *more):\n"
        "    if name == 'sklearn': raise ModuleNotFoundError(name='sklearn')\n"
        "    return real(name, *more)\n"
        "importlib.import_module = gone\n"
        "try: s.HypergradSearchCV\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    first, second = done.stdout.splitlines()
    assert first == "False HypergradSearchCV True"
    assert second.endswith("pip install scikit-learn")
