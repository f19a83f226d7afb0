"""scikit-learn's linear models as minima of their training objectives, in the terms of its user guide.

W [k, d] are the coefficients, b [k] the intercepts, S = X Wᵀ + b the decision values; θ is W and then b. Sums over samples i are
weighted where samples have weights wᵢ, and n is Σ wᵢ then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor

from hypergrad.search.sklearn.losses import Data, log_loss, squared_error, squared_hinge
from hypergrad.search.sklearn.minimum import Minimum

Hypers = Mapping[str, Tensor]


class _Linear:
    """The coefficients of a fitted linear model, packed into θ."""

    def __init__(self, fitted: Any):
        w = torch.tensor(np.atleast_2d(np.asarray(fitted.coef_, dtype=np.float64)))
        b = torch.tensor(np.broadcast_to(np.asarray(fitted.intercept_, dtype=np.float64), (len(w),)).copy())
        self.shape, self.theta = w.shape, torch.cat([w.flatten(), b])
        self.intercepts = torch.full((len(w),), bool(fitted.fit_intercept))

    def split(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        k, d = self.shape
        return theta[: k * d].reshape(k, d), theta[k * d :]

    def scores(self, theta: Tensor, x: Tensor) -> Tensor:
        w, b = self.split(theta)
        return x @ w.T + b

    def scores_of_mean_0(self, theta: Tensor, x: Tensor) -> Tensor:
        """Decision values with the mean of the intercepts taken off; of intercepts that are not fitted this is 0."""
        return self.scores(theta, x) - self.split(theta)[1].mean()

    def free(self, fitted: Any, sparse: bool) -> Tensor:
        """All coefficients, or those of the active set where zeros stay zeros; the intercepts that are fitted."""
        w, _ = self.split(self.theta)
        active = (
            w.flatten() != 0
            if sparse or getattr(fitted, "positive", False)
            else torch.ones(w.numel(), dtype=torch.bool)
        )
        return torch.cat([active, self.intercepts])


def ridge(fitted: Any, data: Data) -> Minimum:
    """Ridge: F = ‖S − y‖² + α ‖W‖²."""
    model = _Linear(fitted)

    def objective(theta: Tensor, h: Hypers) -> Tensor:
        misfit = data.sum(squared_error(model.scores(theta, data.x), data.y))
        return misfit + h["alpha"] * model.split(theta)[0].square().sum()

    return Minimum(model.theta, model.free(fitted, sparse=False), objective, model.scores)


def elastic_net(fitted: Any, data: Data) -> Minimum:
    """Lasso (ρ = 1) and ElasticNet: F = ‖S − y‖²/(2n) + αρ ‖W‖₁ + α(1 − ρ)/2 ‖W‖²."""
    model = _Linear(fitted)

    def objective(theta: Tensor, h: Hypers) -> Tensor:
        w, _ = model.split(theta)
        alpha, rho = h["alpha"], h.get("l1_ratio", 1.0)
        penalty = alpha * (rho * w.abs().sum() + 0.5 * (1 - rho) * w.square().sum())
        return data.sum(squared_error(model.scores(theta, data.x), data.y)) / (2 * data.count) + penalty

    return Minimum(model.theta, model.free(fitted, sparse=True), objective, model.scores)


def logistic(fitted: Any, data: Data) -> Minimum:
    """LogisticRegression: F = C Σᵢ cᵢ ℓᵢ + ½ ‖W‖², ℓ the log loss, c the weight of its class (and sample).

    Of three classes or more all intercepts can move together and F does not change. Fits leave their mean at 0: the last one is
    held, and the mean is taken off the decision values.
    """
    model = _Linear(fitted)
    free, scores = model.free(fitted, sparse=False), model.scores
    if model.shape[0] > 1:
        free[-1], scores = False, model.scores_of_mean_0
    weighted = data._replace(weight=_weights(fitted, data))

    def objective(theta: Tensor, h: Hypers) -> Tensor:
        misfit = weighted.sum(log_loss(model.scores(theta, data.x), data.y))
        return h["C"] * misfit + 0.5 * model.split(theta)[0].square().sum()

    return Minimum(model.theta, free, objective, scores)


def _weights(fitted: Any, data: Data) -> Tensor | None:
    """Weights of the samples times those of their classes, as LogisticRegression has them."""
    given, y = fitted.class_weight, data.y.numpy()
    if given is None:
        return data.weight
    if isinstance(given, Mapping):
        given = {column: given.get(label, 1.0) for column, label in enumerate(fitted.classes_)}
    own = np.ones(len(y)) if data.weight is None else data.weight.numpy()
    of_class = compute_class_weight(given, classes=np.arange(len(fitted.classes_)), y=y, sample_weight=own)
    return torch.tensor(own * of_class[y])


def linear_svc(fitted: Any, data: Data) -> Minimum:
    """LinearSVC: F = C Σ max(0, 1 − yS)² + ½ ‖W‖² + ½ ‖b/s‖², one class against the rest; s is intercept_scaling.

    liblinear appends s to every row, and so penalises the intercepts.
    """
    model = _Linear(fitted)

    def objective(theta: Tensor, h: Hypers) -> Tensor:
        w, b = model.split(theta)
        penalty = 0.5 * (w.square().sum() + (b / fitted.intercept_scaling).square().sum())
        return h["C"] * data.sum(squared_hinge(model.scores(theta, data.x), data.y)) + penalty

    return Minimum(model.theta, model.free(fitted, sparse=False), objective, model.scores)
