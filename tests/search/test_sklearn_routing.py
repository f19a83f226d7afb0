"""`fit(X, y, sample_weight=…, groups=…)` of HypergradSearchCV beside GridSearchCV's on the same folds: scores, slopes, errors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import pytest
from joblib import parallel_config
from sklearn import config_context
from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_iris
from sklearn.linear_model import ElasticNet, Lasso, LogisticRegression, Ridge
from sklearn.metrics import get_scorer, mean_squared_error
from sklearn.model_selection import GridSearchCV, GroupKFold, KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from hypergrad.search import Float, HypergradSearchCV
from hypergrad.search.sklearn import MLPRegressor, search_cv
from tests.tiers import slow_but

X, Y = load_diabetes(return_X_y=True)
FLOWERS = load_iris(return_X_y=True)
MSE, LOG_LOSS = "neg_mean_squared_error", "neg_log_loss"
FOLDS = KFold(3, shuffle=True, random_state=0)
STEP = 1e-4  # of differences, relative
SLOPE = 1e-5  # relative: their error of order STEP², and the solvers' tolerance over STEP
SCORE = 1e-10  # relative, of numbers that the same fits give


def weights(n: int) -> np.ndarray:
    """Some are 0."""
    draw = np.random.default_rng(n)
    return draw.uniform(0.1, 4.0, n) * (draw.random(n) > 0.2)


def groups(n: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 7, n)


W, G = weights(len(X)), groups(len(X))
V, H = weights(150), groups(150)


def plain_mse(estimator: Any, x: Any, y: Any) -> float:
    """A scorer that takes no weights."""
    return -mean_squared_error(y, estimator.predict(x))


def weighted_pipeline(*, scale: bool) -> Any:
    return make_pipeline(
        StandardScaler().set_fit_request(sample_weight=scale), Ridge().set_fit_request(sample_weight=True)
    )


class Case(NamedTuple):
    """A search whose loss is minus its scorer's score: the grid's scores are the oracle of the losses too."""

    estimator: Any
    name: str
    low: float
    high: float
    scoring: Any
    params: dict[str, Any]
    cv: Any = FOLDS
    data: Any = (X, Y)
    routing: bool = False
    warns: bool = False  # that the scorer takes no weights


EXACT = {"tol": 1e-11, "max_iter": 10**5}
with config_context(enable_metadata_routing=True):  # in which alone requests can be written down
    CASES = {
        "ridge": Case(Ridge(), "alpha", 1e-3, 1e2, MSE, {"sample_weight": W}),
        "a list of weights": Case(Ridge(), "alpha", 1e-3, 1e2, MSE, {"sample_weight": list(W)}),
        "no weights": Case(Ridge(), "alpha", 1e-3, 1e2, MSE, {"sample_weight": None}),
        "lasso": Case(Lasso(**EXACT), "alpha", 1e-3, 1.0, MSE, {"sample_weight": W}),
        "elastic net": Case(ElasticNet(**EXACT), "alpha", 1e-4, 0.1, MSE, {"sample_weight": W}),
        "mlp": Case(
            MLPRegressor((2,), solver="sgd", learning_rate_init=1e-2, max_iter=20, random_state=0),
            "alpha",
            1e-3,
            1.0,
            MSE,
            {"sample_weight": W},
            data=(X, (Y - 150) / 75),
        ),
        "groups": Case(Ridge(), "alpha", 1e-3, 1e2, MSE, {"groups": G}, GroupKFold(3)),
        "classes, weights and groups": Case(
            LogisticRegression(solver="newton-cholesky", tol=1e-12),
            "C",
            1e-3,
            1e2,
            LOG_LOSS,
            {"sample_weight": V, "groups": H},
            GroupKFold(3),
            FLOWERS,
        ),
        "weights of a step, of which the scorer knows nothing": Case(
            make_pipeline(StandardScaler(), Ridge()), "ridge__alpha", 1e-2, 1e3, MSE, {"ridge__sample_weight": W}
        ),
        "a scorer that takes no weights": Case(
            Ridge(), "alpha", 1e-3, 1e2, plain_mse, {"sample_weight": W}, warns=True
        ),
        "routing": Case(
            weighted_pipeline(scale=True),
            "ridge__alpha",
            1e-2,
            1e3,
            get_scorer(MSE).set_score_request(sample_weight=True),
            {"sample_weight": W, "groups": G},
            GroupKFold(3),
            routing=True,
        ),
        "routing to the fit alone": Case(
            weighted_pipeline(scale=False),
            "ridge__alpha",
            1e-2,
            1e3,
            get_scorer(MSE).set_score_request(sample_weight=False),
            {"sample_weight": W},
            routing=True,
        ),
        "routing to the scorer alone": Case(
            Ridge().set_fit_request(sample_weight=False),
            "alpha",
            1e-3,
            1e2,
            get_scorer(MSE).set_score_request(sample_weight=True),
            {"sample_weight": W},
            routing=True,
        ),
        "routing by another name": Case(
            Ridge().set_fit_request(sample_weight="importance"),
            "alpha",
            1e-3,
            1e2,
            get_scorer(MSE).set_score_request(sample_weight="importance"),
            {"importance": W},
            routing=True,
        ),
    }


FEW = slow_but(CASES, *(name for name in CASES if name not in ("mlp", "classes, weights and groups", "routing")))


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    case = CASES[request.param]
    with config_context(enable_metadata_routing=case.routing):
        yield case


def search(case: Case, **options: Any) -> HypergradSearchCV:
    space = {case.name: Float(case.low, case.high, "log")}
    return HypergradSearchCV(clone(case.estimator), space, scoring=case.scoring, cv=case.cv, n_iter=9, **options)


def grid(case: Case, values: list[float], **options: Any) -> GridSearchCV:
    return GridSearchCV(clone(case.estimator), {case.name: values}, scoring=case.scoring, cv=case.cv, **options)


def said(case: Case) -> Any:
    return pytest.warns(UserWarning, match="does not support sample_weight") if case.warns else nullcontext()


@pytest.mark.parametrize("case", FEW, indirect=True)
def test_scores_losses_and_slopes_are_those_of_gridsearchcv(case: Case) -> None:
    with said(case):
        ours = search(case, return_train_score=True).fit(*case.data, **case.params)
    results = ours.cv_results_
    values = [params[case.name] for params in results["params"]]
    slopes = results[f"slope_{case.name}"]
    at = next(value for value, slope in zip(values, slopes) if np.isfinite(slope))
    ends = [at * (1 - STEP), at * (1 + STEP)]
    with said(case):
        theirs = grid(case, values + ends, return_train_score=True).fit(*case.data, **case.params).cv_results_
    n = len(values)
    for key in theirs:
        if key.endswith(("_test_score", "_train_score")) and "rank" not in key:
            np.testing.assert_allclose(results[key], theirs[key][:n], rtol=SCORE, err_msg=key)
    for i in range(3):
        np.testing.assert_allclose(results[f"split{i}_test_loss"], -theirs[f"split{i}_test_score"][:n], rtol=SCORE)
    low, high = -theirs["mean_test_score"][n:]
    assert slopes[values.index(at)] == pytest.approx((high - low) / (ends[1] - ends[0]), rel=SLOPE)


@pytest.mark.parametrize("case", FEW, indirect=True)
def test_what_is_fitted_on_all_data_is_gridsearchcvs(case: Case) -> None:
    with said(case):
        ours = search(case).fit(*case.data, **case.params)
    with said(case):
        theirs = grid(case, [ours.best_params_[case.name]]).fit(*case.data, **case.params)
    np.testing.assert_array_equal(ours.predict(case.data[0]), theirs.predict(case.data[0]))
    assert ours.n_splits_ == theirs.n_splits_ == 3
    told = {key: value for key, value in case.params.items() if case.routing and "score" in key}
    assert ours.score(*case.data, **told) == theirs.score(*case.data, **told)


def test_the_best_with_weights_is_another_than_without() -> None:
    """Weights of 0 for one half: the best is that of a search over the other half's folds."""
    half = np.arange(len(X)) % 2 == 0
    splits = [(train, test) for train, test in FOLDS.split(X)]
    inside = np.flatnonzero(half)
    of_half = [tuple(np.flatnonzero(np.isin(inside, rows)) for rows in split) for split in splits]
    space = {"alpha": Float(1e-3, 1e2, "log")}
    ours = HypergradSearchCV(Ridge(), space, cv=splits).fit(X, Y, sample_weight=half.astype(float))
    alone = HypergradSearchCV(Ridge(), space, cv=of_half).fit(X[half], Y[half])
    whole = HypergradSearchCV(Ridge(), space, cv=splits).fit(X, Y)
    assert ours.best_params_["alpha"] == pytest.approx(alone.best_params_["alpha"], rel=1e-4)
    assert ours.best_loss_ == pytest.approx(alone.best_loss_, rel=1e-8)
    assert ours.best_params_["alpha"] != pytest.approx(whole.best_params_["alpha"], rel=0.05)


def fails(estimator: Any, x: Any, y: Any) -> float:
    raise RuntimeError("a scorer of the user's")


# what is wrong -> the search's estimator and its parameter, more arguments of it, arguments of fit, metadata routing
WRONG: dict[str, tuple[Any, str, dict[str, Any], dict[str, Any], bool]] = {
    "an argument that fit does not have": (Ridge(), "alpha", {}, {"colour": W}, False),
    "weights of another length": (Ridge(), "alpha", {}, {"sample_weight": W[:5]}, False),
    "one weight for all": (Ridge(), "alpha", {"scoring": MSE}, {"sample_weight": 7.0}, False),
    "weights for a pipeline": (make_pipeline(Ridge()), "ridge__alpha", {}, {"sample_weight": W}, False),
    "weights of a step that is not there": (
        make_pipeline(Ridge()),
        "ridge__alpha",
        {},
        {"scaler__sample_weight": W},
        False,
    ),
    "no groups": (Ridge(), "alpha", {"cv": GroupKFold(3)}, {}, False),
    "groups of another length": (Ridge(), "alpha", {"cv": GroupKFold(3)}, {"groups": G[:5]}, False),
    "fewer groups than folds": (Ridge(), "alpha", {"cv": GroupKFold(9)}, {"groups": G}, False),
    "a fold whose weights are 0": (
        Ridge(),
        "alpha",
        {"cv": KFold(2), "scoring": MSE},
        {"sample_weight": np.arange(len(X)) < len(X) // 2},
        False,
    ),
    "a scorer that fails": (Ridge(), "alpha", {"scoring": fails}, {}, False),
    "routing that nobody set": (Ridge(), "alpha", {}, {"sample_weight": W}, True),
    "routing to nobody": (Ridge(), "alpha", {}, {"colour": W}, True),
}


def error_of(made: Any, params: dict[str, Any]) -> BaseException:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(Exception) as caught:
            made.fit(X, Y, **params)
    return caught.value


@pytest.mark.parametrize("name", WRONG)
def test_errors_are_gridsearchcvs(name: str) -> None:
    estimator, parameter, options, params, routing = WRONG[name]
    with config_context(enable_metadata_routing=routing):
        ours = error_of(HypergradSearchCV(estimator, {parameter: Float(0.1, 10.0)}, **options), params)
        theirs = error_of(GridSearchCV(estimator, {parameter: [0.1, 10.0]}, error_score="raise", **options), params)
    assert type(ours) is type(theirs)
    assert str(ours).replace("HypergradSearchCV", "GridSearchCV") == str(theirs)


def test_a_search_asks_for_metadata_as_gridsearchcv_does() -> None:
    case = CASES["routing"]
    with config_context(enable_metadata_routing=True):
        asked = [made.get_metadata_routing() for made in (search(case), grid(case, [1.0]))]
    assert repr(asked[0]) == repr(asked[1])


def test_no_folds_and_several_scores_are_said() -> None:
    with pytest.raises(ValueError, match="cv gives no folds"):
        HypergradSearchCV(Ridge(), {"alpha": Float(0.1, 1.0)}, cv=[]).fit(X, Y)
    several = HypergradSearchCV(Ridge(), {"alpha": Float(0.1, 1.0)}, scoring=lambda e, x, y: {"a": 1.0, "b": 2.0})
    with pytest.raises(ValueError, match="one number"):
        several.fit(X, Y)


@pytest.mark.parametrize("backend", ["threading", pytest.param("loky", marks=pytest.mark.slow)])
def test_jobs_change_nothing(backend: str) -> None:
    case = CASES["ridge"]
    alone = search(case).fit(*case.data, **case.params)
    with parallel_config(backend):
        both = search(case, n_jobs=2).fit(*case.data, **case.params)
    for key, column in alone.cv_results_.items():
        if "time" not in key and key != "params":
            np.testing.assert_allclose(np.asarray(both.cv_results_[key], float), np.asarray(column, float), rtol=1e-8)


def test_the_scan_is_one_batch_of_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five points on three folds go out together, then the folds of one candidate at a time: as many as can run at once."""
    batches: list[int] = []

    class Counting(search_cv.Parallel):  # type: ignore[misc, name-defined]
        def __call__(self, iterable: Any) -> Any:
            jobs = list(iterable)
            batches.append(len(jobs))
            return super().__call__(jobs)

    monkeypatch.setattr(search_cv, "Parallel", Counting)
    found = HypergradSearchCV(Ridge(), {"alpha": Float(1e-3, 1e2, "log")}, cv=3).fit(X, Y)
    assert batches == [15] + [3] * (len(found.cv_results_["params"]) - 5)


def test_a_linear_svm_of_weights() -> None:
    """LinearSVC has no scorer that is minus its loss: the loss is computed here."""
    x, y = FLOWERS[0][50:], FLOWERS[1][50:]
    weight = weights(100)
    space = {"C": Float(1e-3, 1.0, "log")}
    svm = LinearSVC(dual=False, tol=1e-10, max_iter=10**5)
    found = HypergradSearchCV(svm, space, cv=FOLDS, n_iter=7).fit(x, y, sample_weight=weight)
    losses = []
    for train, test in FOLDS.split(x):
        fitted = clone(svm).set_params(**found.best_params_).fit(x[train], y[train], sample_weight=weight[train])
        sign = np.where(y[test] == 2, 1.0, -1.0)
        hinge = np.maximum(0, 1 - sign * fitted.decision_function(x[test])) ** 2
        losses.append(np.average(hinge, weights=weight[test]))
    assert found.best_loss_ == pytest.approx(np.mean(losses), rel=1e-8)
