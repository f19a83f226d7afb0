"""A small multilayer perceptron in scikit-learn's protocol, in float64, and its hypergradients.

    F(θ, h) = Σᵢ wᵢ ℓᵢ / Σᵢ wᵢ + α/2 Σ_layers ‖W‖²          biases are not penalised

ℓ is the log loss of classes or the squared error, w a sample's weight. solver="lbfgs" goes to a minimum of F, which is
differentiated there (minimum.py). solver="sgd" takes `max_iter` full-batch steps with momentum; they are differentiated one by
one (`hypergrad.hypergradient`), and so the result is exact however far from a minimum they end.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin, is_classifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data
from torch import Tensor, nn

from hypergrad.core.user_warnings import warn_user
from hypergrad.differentiate.hypergradient import hypergradient
from hypergrad.search.sklearn.losses import Data, Loss, log_loss, squared_error, weights
from hypergrad.search.sklearn.minimum import DENSE, HeldOut, Minimum, at_minimum, hessian_of
from hypergrad.search.sklearn.newton import to_minimum

ACTIVATIONS = {"tanh": torch.tanh, "softplus": nn.functional.softplus, "sigmoid": torch.sigmoid}  # smooth ones
SGD_NAMES = {"learning_rate_init": "lr", "momentum": "momentum", "alpha": "alpha"}  # ours → hypergrad's


class Net(nn.Module):
    """The network of all weights θ, layer by layer W [out, in] and then b [out]."""

    def __init__(self, theta: Tensor, sizes: Sequence[int], activation: str):
        super().__init__()
        self.theta, self.sizes, self.act = nn.Parameter(theta), sizes, ACTIVATIONS[activation]

    def scores(self, theta: Tensor, x: Tensor) -> Tensor:
        for i, (w, b) in enumerate(self.layers(theta)):
            x = (self.act(x) if i else x) @ w.T + b
        return x

    def layers(self, theta: Tensor) -> list[tuple[Tensor, Tensor]]:
        shapes = list(pairwise(self.sizes))
        flat = iter(theta.split([n for a, b in shapes for n in (a * b, b)]))
        return [(next(flat).view(b, a), next(flat)) for a, b in shapes]

    def penalty(self, theta: Tensor, alpha: Any) -> Tensor:
        return 0.5 * alpha * torch.stack([w.square().sum() for w, _ in self.layers(theta)]).sum()


class _MLP(BaseEstimator):
    _loss: Loss

    def __init__(
        self,
        hidden_layer_sizes: Sequence[int] = (10,),
        *,
        activation: str = "tanh",
        alpha: float = 1e-2,
        solver: str = "lbfgs",
        learning_rate_init: float = 0.1,
        momentum: float = 0.9,
        max_iter: int = 2000,
        tol: float = 1e-7,
        random_state: Any = None,
    ):
        self.hidden_layer_sizes, self.activation, self.alpha = hidden_layer_sizes, activation, alpha
        self.solver, self.learning_rate_init, self.momentum = solver, learning_rate_init, momentum
        self.max_iter, self.tol, self.random_state = max_iter, tol, random_state

    def _check(self) -> tuple[int, ...]:
        sizes: Any = self.hidden_layer_sizes
        sizes = tuple(sizes) if isinstance(sizes, (list, tuple, np.ndarray)) else (sizes,)
        for name, values in (("hidden_layer_sizes", sizes), ("max_iter", (self.max_iter,))):
            if not all(isinstance(n, Integral) and int(n) >= 1 for n in values):
                raise ValueError(f"{name} must be of whole numbers from 1, got {getattr(self, name)!r}.")
        for name, known in (("activation", tuple(ACTIVATIONS)), ("solver", ("lbfgs", "sgd"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}.")
        for name in ("alpha", "learning_rate_init", "momentum", "tol"):
            value = getattr(self, name)
            if not isinstance(value, Real) or not 0 <= value < np.inf:  # type: ignore[operator]
                raise ValueError(f"{name} must be a finite number from 0, got {value!r}.")
        return sizes

    def _train(self, data: Data, outputs: int) -> None:
        self.sizes_ = (data.x.shape[1], *self._check(), outputs)
        draw, start = check_random_state(self.random_state), []
        for a, b in pairwise(self.sizes_):  # Glorot's bound
            start += [draw.uniform(-1, 1, a * b) * np.sqrt(6 / (a + b)), np.zeros(b)]
        self.initial_ = np.concatenate(start)
        self.theta_ = (self._to_minimum if self.solver == "lbfgs" else self._steps)(data)
        if not np.isfinite(self.theta_).all():
            raise ValueError(f"training diverged: pass a smaller learning_rate_init than {self.learning_rate_init}.")

    def net(self, theta: Any) -> Net:
        return Net(torch.tensor(theta), self.sizes_, self.activation)

    def objective(self, net: Net, theta: Tensor, alpha: Any, data: Data) -> Tensor:
        """F(θ, α)."""
        return data.mean(type(self)._loss(net.scores(theta, data.x), data.y)) + net.penalty(theta, alpha)

    def _to_minimum(self, data: Data) -> np.ndarray:
        net = self.net(self.initial_)

        def slope(flat: np.ndarray, graph: bool = False) -> tuple[Tensor, Tensor, Tensor]:
            theta = torch.tensor(flat, requires_grad=True)
            value = self.objective(net, theta, self.alpha, data)
            return theta, value.detach(), torch.autograd.grad(value, theta, create_graph=graph)[0]

        def value_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
            _, value, gradient = slope(flat)
            return value.item(), gradient.numpy()

        def hessian(flat: np.ndarray) -> np.ndarray:
            theta, _, gradient = slope(flat, graph=True)
            return hessian_of(gradient, theta).numpy()

        second = hessian if len(self.initial_) <= DENSE else None
        found, self.n_iter_, reached = to_minimum(value_and_gradient, second, self.initial_, self.max_iter, self.tol)
        if not reached:
            text = f"no minimum within max_iter={self.max_iter}: raise max_iter, alpha or tol."
            warn_user(text, ConvergenceWarning)
        return found

    def _steps(self, data: Data) -> np.ndarray:
        net = self.net(self.initial_)
        optimizer = self.sgd(net)
        for _ in range(self.max_iter):
            optimizer.zero_grad()
            self.objective(net, net.theta, self.alpha, data).backward()
            optimizer.step()
        self.n_iter_ = self.max_iter
        return net.theta.detach().numpy()

    def sgd(self, net: Net) -> torch.optim.SGD:
        return torch.optim.SGD([net.theta], lr=self.learning_rate_init, momentum=self.momentum)

    def _scores(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        x = torch.tensor(validate_data(self, X, reset=False, dtype=np.float64))
        net = self.net(self.theta_)
        return net.scores(net.theta, x).detach().numpy()


class MLPClassifier(ClassifierMixin, _MLP):
    """A small multilayer perceptron for classes, trained on log loss with an L2 penalty.

    Args:
        hidden_layer_sizes: units of each hidden layer.
        activation: "tanh", "softplus" or "sigmoid", between the layers.
        alpha: α of the penalty α/2 Σ ‖W‖², beside the mean of the loss (scikit-learn's divides it by the number of samples).
        solver: "lbfgs", to a minimum, with Newton's steps at the end (up to 300 weights); "sgd", `max_iter` full-batch steps.
        learning_rate_init, momentum: of solver="sgd".
        max_iter: steps; at most, for "lbfgs".
        tol: size of the gradient at which "lbfgs" ends.
        random_state: of the first weights.

    Attributes:
        classes_; theta_: all weights, layer by layer W [out, in] and b; initial_: those before training; n_iter_.

    Raises:
        ValueError: in `fit`: an argument out of range, weights below 0, training that diverged.

    Example:
        >>> MLPClassifier((3,), random_state=0).fit([[0.0], [1.0], [2.0]], ["a", "b", "b"]).predict([[-1.0], [3.0]])
        array(['a', 'b'], dtype='<U1')
    """

    _loss = staticmethod(log_loss)

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> MLPClassifier:
        """Train on rows X [n, d] and labels y [n], with weights [n] where there are any."""
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, column = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y has one class only, {self.classes_[0]!r}: two or more are needed.")
        data = Data(torch.tensor(X), torch.tensor(column), weights(sample_weight, X))
        classes = len(self.classes_)
        self._train(data, classes if classes > 2 else 1)
        if classes > 2 and self.solver == "lbfgs":
            # the last biases can move together and F does not change: gradients leave their mean at 0, Newton's steps do not
            self.theta_[-classes:] -= self.theta_[-classes:].mean()
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """Logits [n, classes], of two classes those of the second [n]."""
        scores = self._scores(X)
        return scores[:, 0] if scores.shape[1] == 1 else scores

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities [n, classes]."""
        s = torch.tensor(self._scores(X))
        return torch.softmax(torch.cat([torch.zeros_like(s), s], 1) if s.shape[1] == 1 else s, 1).numpy()

    def predict(self, X: Any) -> np.ndarray:
        """The most probable class of each row."""
        column = self.predict_proba(X).argmax(1)
        return self.classes_[column]


class MLPRegressor(RegressorMixin, _MLP):
    """A small multilayer perceptron for numbers, trained on squared error with an L2 penalty.

    Args:
        hidden_layer_sizes, activation, alpha, solver, learning_rate_init, momentum, max_iter, tol, random_state: as of
            `MLPClassifier`. The targets are taken as they are: bring them to a scale of about 1 first.

    Attributes:
        theta_, initial_, n_iter_: as of `MLPClassifier`.

    Raises:
        ValueError: in `fit`: an argument out of range, weights below 0, training that diverged.
    """

    _loss = staticmethod(squared_error)

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> MLPRegressor:
        """Train on rows X [n, d] and numbers y [n] or [n, k], with weights [n] where there are any."""
        X, y = validate_data(self, X, y, dtype=np.float64, multi_output=True, y_numeric=True)
        y = column_or_1d(y, warn=True) if y.ndim == 2 and y.shape[1] == 1 else y
        self._flat, y = y.ndim == 1, np.asarray(y, dtype=np.float64).reshape(len(y), -1)
        self._train(Data(torch.tensor(X), torch.tensor(y), weights(sample_weight, X)), y.shape[1])
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Numbers [n] or [n, k], as y had."""
        scores = self._scores(X)
        return scores[:, 0] if self._flat else scores


def names(estimator: _MLP) -> tuple[str, ...]:
    """What has a derivative."""
    return ("alpha",) if estimator.solver == "lbfgs" else tuple(SGD_NAMES)


def differentiate(fitted: _MLP, train: Data, held_out: Data, loss: Loss, wrt: Sequence[str]) -> HeldOut:
    """The held-out loss and its hypergradient, through the minimum or through the steps."""
    net = fitted.net(fitted.theta_)
    if fitted.solver == "lbfgs" or not wrt:
        theta = net.theta.detach()
        free, outputs = torch.ones_like(theta, dtype=torch.bool), fitted.sizes_[-1]
        together = fitted.solver == "lbfgs" and is_classifier(fitted) and outputs > 1  # as of `linear.logistic`
        free[-1] = not together

        def scores(t: Tensor, x: Tensor) -> Tensor:
            return net.scores(t, x) - t[-outputs:].mean() if together else net.scores(t, x)

        minimum = Minimum(theta, free, lambda t, h: fitted.objective(net, t, h["alpha"], train), scores)
        return at_minimum(
            minimum, lambda s: held_out.mean(loss(s, held_out.y)), held_out.x, {"alpha": fitted.alpha}, wrt
        )
    net = fitted.net(fitted.initial_)
    result = hypergradient(
        net,
        fitted.sgd(net),
        lambda model, _, h: fitted.objective(model, model.theta, h["alpha"], train),
        [None] * fitted.max_iter,
        lambda: held_out.mean(loss(net.scores(net.theta, held_out.x), held_out.y)),
        wrt=[SGD_NAMES[name] for name in wrt],
        hypers={"alpha": torch.tensor(fitted.alpha, dtype=torch.float64)},
    )
    return HeldOut(float(result.value), {name: float(result.gradients[SGD_NAMES[name]].sum()) for name in wrt})
