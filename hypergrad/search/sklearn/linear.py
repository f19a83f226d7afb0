"""scikit-learn's linear models as minima of their training objectives, in the terms of its user guide.

W [k, d] are the coefficients, b [k] the intercepts, S = X Wᵀ + b the decision values; θ is W and then b.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from sklearn.utils.class_weight import compute_sample_weight
from torch import Tensor

from hypergrad.search.sklearn.losses import log_loss, squared_error, squared_hinge
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

    def free(self, fitted: Any, sparse: bool) -> Tensor:
        """All coefficients, or those of the active set where zeros stay zeros; the intercepts that are fitted."""
        w, _ = self.split(self.theta)
        active = (
            w.flatten() != 0
            if sparse or getattr(fitted, "positive", False)
            else torch.ones(w.numel(), dtype=torch.bool)
        )
        return torch.cat([active, self.intercepts])


def ridge(fitted: Any, x: Tensor, y: Tensor) -> Minimum:
    """Ridge: F = ‖S − y‖² + α ‖W‖²."""
    model = _Linear(fitted)

    def objective(theta: Tensor, h: Hypers) -> Tensor:
        return squared_error(model.scores(theta, x), y).sum() + h["alpha"] * model.split(theta)[0].square().sum()

    return Minimum(model.theta, model.free(fitted, sparse=False), objective, model.scores)


def elastic_net(fitted: Any, x: Tensor, y: Tensor) -> Minimum:
    """Lasso (ρ = 1) and ElasticNet: F = ‖S − y‖²/(2n) + αρ ‖W‖₁ + α(1 − ρ)/2 ‖W‖²."""
    model = _Linear(fitted)

    def objective(theta: Tensor, h: Hypers) -> Tensor:
        w, _ = model.split(theta)
        alpha, rho = h["alpha"], h.get("l1_ratio", 1.0)
        penalty = alpha * (rho * w.abs().sum() + 0.5 * (1 - rho) * w.square().sum())
        return squared_error(model.scores(theta, x), y).sum() / (2 * len(x)) + penalty

    return Minimum(model.theta, model.free(fitted, sparse=True), objective, model.scores)


def logistic(fitted: Any, x: Tensor, y: Tensor) -> Minimum:
    """LogisticRegression: F = C Σᵢ cᵢ ℓᵢ + ½ ‖W‖², ℓ the log loss, c the weight of its class.

    Of three classes or more all intercepts can move together and nothing changes: the last one is held.
    """
    model = _Linear(fitted)
    free = model.free(fitted, sparse=False)
    if model.shape[0] > 1:
        free[-1] = False
    weight = torch.tensor(compute_sample_weight(_class_weight(fitted), y.numpy()), dtype=x.dtype)

    def objective(theta: Tensor, h: Hypers) -> Tensor:
        data = weight @ log_loss(model.scores(theta, x), y)
        return h["C"] * data + 0.5 * model.split(theta)[0].square().sum()

    return Minimum(model.theta, free, objective, model.scores)


def _class_weight(fitted: Any) -> Any:
    """class_weight by the columns of `classes_`."""
    given = fitted.class_weight
    if not isinstance(given, Mapping):
        return given
    return {column: given.get(label, 1.0) for column, label in enumerate(fitted.classes_)}


def linear_svc(fitted: Any, x: Tensor, y: Tensor) -> Minimum:
    """LinearSVC: F = C Σ max(0, 1 − yS)² + ½ ‖W‖² + ½ ‖b/s‖², one class against the rest; s is intercept_scaling.

    liblinear appends s to every row, and so penalises the intercepts.
    """
    model = _Linear(fitted)

    def objective(theta: Tensor, h: Hypers) -> Tensor:
        w, b = model.split(theta)
        penalty = 0.5 * (w.square().sum() + (b / fitted.intercept_scaling).square().sum())
        return h["C"] * squared_hinge(model.scores(theta, x), y).sum() + penalty

    return Minimum(model.theta, model.free(fitted, sparse=False), objective, model.scores)
