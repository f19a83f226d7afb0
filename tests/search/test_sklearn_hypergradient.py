"""Hypergradients of scikit-learn's estimators and of our MLPs against central differences of their own fits, in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_iris, load_wine, make_regression
from sklearn.linear_model import ElasticNet, Lasso, LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, scale
from sklearn.svm import LinearSVC

from hypergrad.search.sklearn import MODELS, MLPClassifier, MLPRegressor, hypergradient
from hypergrad.search.sklearn import minimum as module

STEP = 1e-4  # of the differences, relative
TOLERANCE = 1e-5  # relative: the differences' own error of order STEP², and the solvers' tolerance over STEP
TIGHT = {"tol": 1e-11, "max_iter": 10**5}
NEWTON = {"solver": "newton-cholesky", "tol": 1e-12}
Arrays = tuple[np.ndarray, np.ndarray]


def diabetes() -> Arrays:
    x, y = load_diabetes(return_X_y=True)
    return scale(x), scale(y)


def two_targets() -> Arrays:
    x, y = make_regression(60, 5, n_targets=2, noise=10.0, random_state=0)  # type: ignore[misc]
    return x, y / 100


def wide() -> Arrays:
    x, y = make_regression(40, 80, n_informative=5, noise=5.0, random_state=0)  # type: ignore[misc]
    return x, y / 10


def wine() -> Arrays:
    x, y = load_wine(return_X_y=True)
    return scale(x), y


def two_classes() -> Arrays:
    x, y = load_iris(return_X_y=True)
    return scale(x[50:]), np.array(["no", "yes"])[y[50:] - 1]


class Case(NamedTuple):
    estimator: Any
    data: Any
    names: tuple[str, ...]
    loss: str | None = None


CASES = {
    "ridge": Case(Ridge(1.0), diabetes, ("alpha",)),
    "ridge without an intercept": Case(Ridge(1.0, fit_intercept=False), diabetes, ("alpha",)),
    "ridge of two targets": Case(Ridge(1.0), two_targets, ("alpha",)),
    "ridge in a pipeline": Case(make_pipeline(StandardScaler(), Ridge(1.0)), two_targets, ("ridge__alpha",)),
    "lasso": Case(Lasso(0.03, **TIGHT), diabetes, ("alpha",)),
    "lasso of more columns than rows": Case(Lasso(0.5, **TIGHT), wide, ("alpha",)),
    "lasso of positive coefficients": Case(Lasso(0.03, positive=True, **TIGHT), diabetes, ("alpha",)),
    "lasso of two targets": Case(Lasso(0.05, **TIGHT), two_targets, ("alpha",)),
    "elastic net": Case(ElasticNet(0.05, l1_ratio=0.6, **TIGHT), diabetes, ("alpha", "l1_ratio")),
    "elastic net of more columns than rows": Case(ElasticNet(0.5, l1_ratio=0.8, **TIGHT), wide, ("alpha", "l1_ratio")),
    "logistic": Case(LogisticRegression(C=0.3, **NEWTON), two_classes, ("C",)),
    "logistic, hinge": Case(LogisticRegression(C=0.3, **NEWTON), two_classes, ("C",), "squared_hinge"),
    "logistic, weights": Case(LogisticRegression(C=0.3, class_weight={"yes": 3.0}, **NEWTON), two_classes, ("C",)),
    "logistic, balanced": Case(LogisticRegression(C=0.3, class_weight="balanced", **NEWTON), wine, ("C",)),
    "multinomial": Case(LogisticRegression(C=0.3, **NEWTON), wine, ("C",)),
    "multinomial, hinge": Case(LogisticRegression(C=0.3, **NEWTON), wine, ("C",), "squared_hinge"),
    "multinomial without intercepts": Case(LogisticRegression(C=0.3, fit_intercept=False, **NEWTON), wine, ("C",)),
    "svm": Case(LinearSVC(C=0.02, dual=False, **TIGHT), two_classes, ("C",)),
    "svm, log loss": Case(
        LinearSVC(C=0.02, dual=False, intercept_scaling=3.0, **TIGHT), two_classes, ("C",), "log_loss"
    ),
    "svm of three classes": Case(LinearSVC(C=0.02, dual=False, **TIGHT), wine, ("C",)),
    "mlp": Case(MLPRegressor((2,), alpha=0.03, tol=1e-11, random_state=0), diabetes, ("alpha",)),
    "mlp of classes": Case(MLPClassifier((3,), tol=1e-11, random_state=0), wine, ("alpha",)),
    "mlp of classes, hinge": Case(
        MLPClassifier((2,), alpha=0.1, tol=1e-11, random_state=0), wine, ("alpha",), "squared_hinge"
    ),
    "mlp by steps": Case(
        MLPClassifier((2, 2), activation="softplus", solver="sgd", max_iter=20, random_state=0),
        two_classes,
        ("alpha", "learning_rate_init", "momentum"),
    ),
    "mlp of numbers by steps": Case(
        MLPRegressor((2,), solver="sgd", max_iter=20, learning_rate_init=0.05, random_state=0), two_targets, ("alpha",)
    ),
}


def halves(data: Any) -> tuple[np.ndarray, ...]:
    x, y = data()
    return x[::2], y[::2], x[1::2], y[1::2]


def weights_of(y: np.ndarray) -> np.ndarray:
    """A weight a sample, one in five 0."""
    draw = np.random.default_rng(len(y))
    return draw.uniform(0.2, 3.0, len(y)) * (draw.random(len(y)) > 0.2)


WEIGHTED = (  # cases that are run with weights too: every objective, and what class_weight is multiplied with
    "ridge",
    "ridge of two targets",
    "ridge in a pipeline",
    "lasso",
    "elastic net",
    "logistic",
    "logistic, weights",
    "logistic, balanced",
    "multinomial",
    "svm, log loss",
    "mlp",
    "mlp of classes",
    "mlp by steps",
    "mlp of numbers by steps",
)


@pytest.mark.parametrize(("name", "weighted"), [(name, False) for name in CASES] + [(name, True) for name in WEIGHTED])
def test_equals_finite_differences(name: str, weighted: bool) -> None:
    estimator, data, names, loss = CASES[name]
    x, y, x_val, y_val = halves(data)
    own = {"sample_weight": weights_of(y)} if weighted else {}
    both = own | ({"sample_weight_val": weights_of(y_val)} if weighted else {})
    prefix = names[0].rpartition("__")[0]
    to_fit = {f"{prefix}__{key}" if prefix else key: value for key, value in own.items()}
    found = hypergradient(clone(estimator).fit(x, y, **to_fit), x, y, x_val, y_val, names, loss, **both)

    def value(**params: float) -> float:
        fitted = clone(estimator).set_params(**params).fit(x, y, **to_fit)
        return hypergradient(fitted, x, y, x_val, y_val, loss=loss, **both).value

    for each in names:
        at = estimator.get_params()[each]
        ends = [value(**{each: at * (1 + sign * STEP)}) for sign in (1, -1)]
        assert found.gradients[each] == pytest.approx((ends[0] - ends[1]) / (2 * STEP * at), rel=TOLERANCE)
    assert abs(found.gap) < 1e-8 * found.value


def test_ridge_in_closed_form() -> None:
    """w = A⁻¹Xᵀy, A = XᵀX + αI, dw/dα = −A⁻¹w; L = ‖Vw − t‖²/m."""
    x, y, v, t = halves(diabetes)
    a = x.T @ x + 2.0 * np.eye(x.shape[1])
    w = np.linalg.solve(a, x.T @ y)
    slope = -2 / len(v) * (v @ w - t) @ v @ np.linalg.solve(a, w)
    fitted = Ridge(2.0, fit_intercept=False).fit(x, y)
    found = hypergradient(fitted, x, y, v, t, "alpha")
    assert found.value == pytest.approx(np.mean((v @ w - t) ** 2), rel=1e-12)
    assert found.gradients["alpha"] == pytest.approx(slope, rel=1e-10)


def test_products_with_the_hessian_give_what_its_factor_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    estimator, data, names, _ = CASES["multinomial"]
    x, y, x_val, y_val = halves(data)
    fitted = clone(estimator).fit(x, y)
    dense = hypergradient(fitted, x, y, x_val, y_val, names)
    monkeypatch.setattr(module, "DENSE", 1)
    assert hypergradient(fitted, x, y, x_val, y_val, names).gradients["C"] == pytest.approx(
        dense.gradients["C"], rel=1e-7
    )


def test_a_lasso_without_coefficients_does_not_move() -> None:
    """From α_max = max |Xᵀy|/n (of centred data) on all coefficients are 0; just below it one is not."""
    x, y, x_val, y_val = halves(diabetes)
    most = np.abs((x - x.mean(0)).T @ (y - y.mean())).max() / len(x)
    slopes = [
        hypergradient(Lasso(alpha, **TIGHT).fit(x, y), x, y, x_val, y_val, "alpha").gradients["alpha"]
        for alpha in (1.01 * most, 0.99 * most)
    ]
    assert slopes[0] == 0 and slopes[1] > 0


def test_dependent_columns_of_an_active_set_leave_the_derivative_of_the_predictions() -> None:
    """A column twice: the minimum is a line, on which predictions are equal; so is their derivative."""
    x, y, x_val, y_val = halves(diabetes)
    twice, twice_val = np.hstack([x, x[:, [2]]]), np.hstack([x_val, x_val[:, [2]]])
    alone = hypergradient(Lasso(0.03, **TIGHT).fit(x, y), x, y, x_val, y_val, "alpha")
    fitted = Lasso(0.03, **TIGHT).fit(twice, y)
    share = fitted.coef_[2] + fitted.coef_[-1]
    fitted.coef_[[2, -1]] = share / 2
    both = hypergradient(fitted, twice, y, twice_val, y_val, "alpha")
    assert both.gradients["alpha"] == pytest.approx(alone.gradients["alpha"], rel=1e-6)


def test_the_gap_is_what_the_tolerance_is_worth() -> None:
    """Two solvers' tolerances: the difference of their losses, to first order in what the rough one leaves over."""
    x, y, x_val, y_val = halves(wine)
    rough, exact = (LogisticRegression(tol=tol).fit(x, y) for tol in (1e-2, 1e-8))
    found = [hypergradient(each, x, y, x_val, y_val, "C") for each in (rough, exact)]
    difference = found[0].value - found[1].value
    assert abs(difference) > 1e-6
    assert found[0].gap == pytest.approx(difference, rel=0.3)


def test_the_loss_is_scikit_learns() -> None:
    from sklearn.metrics import log_loss, mean_squared_error

    x, y, x_val, y_val = halves(wine)
    for data, fitted, theirs in (
        (wine, LogisticRegression(), lambda e, x, y, w: log_loss(y, e.predict_proba(x), sample_weight=w)),
        (two_targets, Ridge(), lambda e, x, y, w: mean_squared_error(y, e.predict(x), sample_weight=w)),
    ):
        x, y, x_val, y_val = halves(data)
        fitted.fit(x, y)
        for weight in (None, weights_of(y_val)):
            found = hypergradient(fitted, x, y, x_val, y_val, sample_weight_val=weight)
            assert found.value == pytest.approx(theirs(fitted, x_val, y_val, weight))


WRONG_WEIGHTS = {
    "another length": (np.ones(3), "sample_weight.shape == "),
    "below 0": (np.full(221, -1.0), "Negative"),
    "all of them 0": (np.zeros(221), "at least one non-zero"),
}


@pytest.mark.parametrize("name", WRONG_WEIGHTS)
def test_weights_that_are_none(name: str) -> None:
    weight, match = WRONG_WEIGHTS[name]
    x, y, x_val, y_val = halves(diabetes)
    fitted = Ridge().fit(x, y)
    for key in ("sample_weight", "sample_weight_val"):
        with pytest.raises(ValueError, match=match):
            hypergradient(fitted, x, y, x_val, y_val, "alpha", **{key: weight})
    with pytest.raises(ValueError, match=match):
        MLPRegressor((2,)).fit(x, y, sample_weight=weight)


def test_every_model_has_a_case() -> None:
    last = [case.estimator[-1] if hasattr(case.estimator, "steps") else case.estimator for case in CASES.values()]
    assert {type(each) for each in last} == set(MODELS)


BAD = {
    "a name": (Ridge(), "C", "no derivative in 'C': Ridge has those in alpha"),
    "a name of another solver": (MLPRegressor((2,), random_state=0), "momentum", "has those in alpha"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    estimator, wrt, match = BAD[name]
    x, y, x_val, y_val = halves(diabetes)
    with pytest.raises(ValueError, match=match):
        hypergradient(clone(estimator).fit(x, y), x, y, x_val, y_val, wrt)


def test_a_class_that_training_has_not_seen() -> None:
    x, y, x_val, y_val = halves(wine)
    fitted = LogisticRegression().fit(x[y < 2], y[y < 2])
    with pytest.raises(ValueError, match=r"no sample of the classes \[2\].*StratifiedKFold"):
        hypergradient(fitted, x[y < 2], y[y < 2], x_val, y_val, "C")
