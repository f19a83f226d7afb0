"""Which estimators can be differentiated, in which hyperparameters: one row of MODELS each.

>>> from sklearn.linear_model import Ridge
>>> ridge = Ridge(alpha=1.0, fit_intercept=False).fit([[1.0]], [1.0])  # w = 1/(1 + α)
>>> hypergradient(ridge, [[1.0]], [1.0], [[1.0]], [0.0], wrt="alpha")  # L = w², dL/dα = −2/(1 + α)³
HeldOut(value=0.25, gradients={'alpha': -0.25}, gap=0.0)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.sparse import issparse
from sklearn import get_config
from sklearn.base import clone, is_classifier
from sklearn.linear_model import ElasticNet, Lasso, LogisticRegression, Ridge
from sklearn.pipeline import Pipeline
from sklearn.svm import LinearSVC
from sklearn.utils.metadata_routing import process_routing
from sklearn.utils.validation import check_is_fitted, column_or_1d

from hypergrad.search.sklearn import linear, mlp
from hypergrad.search.sklearn.losses import LOSSES, Data, Loss, weights
from hypergrad.search.sklearn.minimum import HeldOut, Minimum, at_minimum

Refusal = tuple[Callable[[Any], bool], str]


class Model(NamedTuple):
    """One kind of estimator.

    Args:
        names: of an estimator, its hyperparameters that have a derivative.
        losses: held-out losses that make sense for it, the usual one first.
        differentiate: (fitted, training data, held-out data, loss, names) ↦ HeldOut.
        refused: settings under which the formula does not hold, and what to pass instead.
    """

    names: Callable[[Any], tuple[str, ...]]
    losses: tuple[str, ...]
    differentiate: Callable[[Any, Data, Data, Loss, Sequence[str]], HeldOut]
    refused: tuple[Refusal, ...] = ()


def _implicit(
    build: Callable[[Any, Data], Minimum],
    names: Sequence[str],
    fitted: Any,
    train: Data,
    held_out: Data,
    loss: Loss,
    wrt: Sequence[str],
) -> HeldOut:
    """Of a model that was trained to a minimum."""
    hypers = {name: float(getattr(fitted, name)) for name in names}
    return at_minimum(build(fitted, train), lambda s: held_out.mean(loss(s, held_out.y)), held_out.x, hypers, wrt)


def _model(
    build: Callable[[Any, Data], Minimum], names: tuple[str, ...], losses: tuple[str, ...], *refused: Refusal
) -> Model:
    return Model(lambda _: names, losses, partial(_implicit, build, names), refused)


UNSEEDED: Refusal = (
    lambda e: not isinstance(e.random_state, Integral),
    "a whole number for random_state: otherwise every fit starts elsewhere, and its loss is no function of the hyperparameters",
)
MODELS: dict[type, Model] = {
    Ridge: _model(
        linear.ridge, ("alpha",), ("squared_error",), (lambda e: np.ndim(e.alpha) > 0, "one alpha, not one a target")
    ),
    Lasso: _model(linear.elastic_net, ("alpha",), ("squared_error",)),
    ElasticNet: _model(linear.elastic_net, ("alpha", "l1_ratio"), ("squared_error",)),
    LogisticRegression: _model(
        linear.logistic,
        ("C",),
        ("log_loss", "squared_hinge"),
        (lambda e: e.penalty not in ("deprecated", "l2") or bool(e.l1_ratio), "the L2 penalty, l1_ratio=0"),
        (lambda e: e.solver == "liblinear", "solver='lbfgs' or 'newton-cholesky': liblinear penalises the intercept"),
        (lambda e: not math.isfinite(e.C), "a finite C"),
    ),
    LinearSVC: _model(
        linear.linear_svc,
        ("C",),
        ("squared_hinge", "log_loss"),
        (lambda e: e.loss != "squared_hinge", "loss='squared_hinge': the hinge has no second derivative"),
        (lambda e: e.penalty != "l2", "penalty='l2'"),
        (lambda e: e.multi_class != "ovr", "multi_class='ovr'"),
        (lambda e: e.class_weight is not None, "class_weight=None"),
    ),
    mlp.MLPClassifier: Model(mlp.names, ("log_loss", "squared_hinge"), mlp.differentiate, (UNSEEDED,)),
    mlp.MLPRegressor: Model(mlp.names, ("squared_error",), mlp.differentiate, (UNSEEDED,)),
}


def last_step(estimator: Any) -> tuple[Any, str]:
    """The estimator that is trained last, and the beginning of its parameters' names: ("", or "step__" of a Pipeline)."""
    prefix = ""
    while isinstance(estimator, Pipeline):
        name, estimator = estimator.steps[-1]
        prefix += f"{name}__"
    return estimator, prefix


def weight_of_last_step(estimator: Any, fit_params: Mapping[str, Any]) -> Any:
    """`sample_weight` as it comes to the last step of `estimator.fit(X, y, **fit_params)`; None: it gets none."""
    while isinstance(estimator, Pipeline):
        name, last = estimator.steps[-1]
        if get_config()["enable_metadata_routing"]:
            fit_params = process_routing(estimator, "fit", **fit_params)[name]["fit"]
        else:
            prefix = f"{name}__"
            fit_params = {k.removeprefix(prefix): v for k, v in fit_params.items() if k.startswith(prefix)}
        estimator = last
    return fit_params.get("sample_weight")


def with_params(estimator: Any, params: Mapping[str, Any]) -> Any:
    """An unfitted copy that has these parameters."""
    made: Any = clone(estimator)
    return made.set_params(**params)


def find(estimator: Any) -> Model:
    """The row of an estimator, or of the last step of a Pipeline.

    Raises:
        ValueError: it has none, or a setting under which it cannot be differentiated.
    """
    estimator, _ = last_step(estimator)
    model = next((row for kind, row in MODELS.items() if type(estimator) is kind), None)
    if model is None:
        known = ", ".join(sorted(kind.__name__ for kind in MODELS))
        raise ValueError(
            f"{type(estimator).__name__} cannot be differentiated in its hyperparameters. These can, alone or as the last step "
            f"of a Pipeline: {known}. For others: GridSearchCV, or hypergrad.search.optimize."
        )
    for applies, instead in model.refused:
        if applies(estimator):
            raise ValueError(f"{type(estimator).__name__} cannot be differentiated with this setting: use {instead}.")
    return model


def check_names(estimator: Any, wrt: Sequence[str]) -> None:
    """A ValueError where one of the names has no derivative."""
    last, prefix = last_step(estimator)
    names = [prefix + own for own in find(estimator).names(last)]
    for name in wrt:
        if name not in names:
            raise ValueError(
                f"no derivative in {name!r}: {type(last).__name__} has those in {', '.join(names)}, as it is set here."
            )


def loss_of(model: Model, loss: str | None) -> str:
    """A held-out loss by its name; None is the usual one."""
    if loss is None:
        return model.losses[0]
    if loss not in model.losses:
        raise ValueError(f"loss must be one of {', '.join(model.losses)} for this estimator, got {loss!r}.")
    return loss


def hypergradient(
    fitted: Any,
    X: Any,
    y: Any,
    X_val: Any,
    y_val: Any,
    wrt: str | Sequence[str] = (),
    loss: str | None = None,
    sample_weight: Any = None,
    sample_weight_val: Any = None,
) -> HeldOut:
    """The loss of a fitted estimator on held-out data, and its derivative in hyperparameters through the fit.

    Args:
        fitted: an estimator of a kind in MODELS, or a Pipeline that ends in one, fitted on X, y.
        X, y: the data that it was fitted on.
        X_val, y_val: held-out data.
        wrt: names of hyperparameters, as in `get_params`; none: the loss alone.
        loss: "squared_error", "log_loss" or "squared_hinge" (of the decision values, as logits or margins); None: the one that
            is usual for the estimator.
        sample_weight: that the estimator was fitted with (of a Pipeline its last step), one number a row of X.
        sample_weight_val: of the rows of X_val; the loss is their weighted mean.

    Returns:
        HeldOut: `value`, the mean loss; `gradients`, name → derivative; `gap`, what the solver's tolerance adds to the value, to
        first order.

    Raises:
        ValueError: an estimator, setting or name that has no derivative; a class that X, y do not have; weights of another
            length, or below 0.

    Example:
        One row x = y = 1 of weight 4: F = 4 (1 − w)² + αw², w = 4/(4 + α), L = w², dL/dα = −2·4²/(4 + α)³.

        >>> ridge = Ridge(alpha=4.0, fit_intercept=False).fit([[1.0]], [1.0], sample_weight=[4.0])
        >>> hypergradient(ridge, [[1.0]], [1.0], [[1.0]], [0.0], wrt="alpha", sample_weight=[4.0])
        HeldOut(value=0.25, gradients={'alpha': -0.0625}, gap=0.0)
    """
    model = find(fitted)
    check_is_fitted(fitted)
    last, prefix = last_step(fitted)
    names = (wrt,) if isinstance(wrt, str) else tuple(wrt)
    check_names(fitted, names)
    chosen = LOSSES[loss_of(model, loss)]
    train, held_out = (
        _data(fitted, last, *part) for part in ((X, y, sample_weight), (X_val, y_val, sample_weight_val))
    )
    found = model.differentiate(last, train, held_out, chosen, [name.removeprefix(prefix) for name in names])
    return HeldOut(found.value, {prefix + name: value for name, value in found.gradients.items()}, found.gap)


def _data(fitted: Any, last: Any, x: Any, y: Any, weight: Any) -> Data:
    """What the last step sees, dense, in float64."""
    while isinstance(fitted, Pipeline):
        x, fitted = fitted[:-1].transform(x) if len(fitted.steps) > 1 else x, fitted.steps[-1][1]
    x = torch.tensor(np.asarray(x.toarray() if issparse(x) else x, dtype=np.float64))
    weight = weights(weight, x)
    if not is_classifier(last):
        y = np.asarray(y, dtype=np.float64)
        return Data(x, torch.tensor(y.reshape(len(y), -1)), weight)
    y = column_or_1d(y)
    column = np.searchsorted(last.classes_, y).clip(max=len(last.classes_) - 1)
    strangers = np.setdiff1d(y, last.classes_)
    if len(strangers):
        raise ValueError(
            f"the training part has no sample of the classes {strangers.tolist()}: use folds that have every class in each of "
            "them (StratifiedKFold), or fewer folds."
        )
    return Data(x, torch.tensor(column), weight)
