"""The problems of the search benchmark: scikit-learn's sets, its MLP with one hidden layer, and their five folds as one model.

A fifth of each set is left out, as in Bayesmark; the rest is cut into five folds. Inputs (and a regression's target) are
standardised by the mean and standard deviation of these four fifths. Folds' training parts have equal sizes: at most one row of
each is left out. All folds are trained at once, a batched matrix product a layer, on

    L = mean over the batch of the loss + α / (2 n_batch) (‖W1‖² + ‖W2‖²)          (biases are not decayed)

by the update rules of scikit-learn's MLPClassifier and MLPRegressor: SGD with Nesterov's momentum, or Adam with its ε beside the
uncorrected √v.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn import datasets
from sklearn.model_selection import KFold, StratifiedKFold, train_test_split
from torch import Tensor

from hypergrad.search import Float, Int, Space

EPOCHS, FOLDS, SPLIT_SEED = 40, 5, 0
LOOKS = (1, 2, 5, 10, 20, 40)  # epochs after which a table has the held-out score
CAP = 10.0  # of log loss, MAE and MSE: a diverged fit has it
SETS: dict[str, Any] = {
    "breast": datasets.load_breast_cancer,
    "digits": datasets.load_digits,
    "iris": datasets.load_iris,
    "wine": datasets.load_wine,
    "diabetes": datasets.load_diabetes,
}
METRICS = {name: ("mae", "mse") if name == "diabetes" else ("error", "nll") for name in SETS}
COMMON = {
    "hidden": Int(50, 200),
    "alpha": Float(1e-5, 1e1, "log"),
    "batch": Int(10, 250),
    "lr": Float(1e-5, 1e-1, "log"),
}
SPACES = {
    "sgd": Space(COMMON | {"momentum": Float(0.001, 0.999, "logit")}),
    "adam": Space(
        COMMON | {"beta1": Float(0.5, 0.99), "beta2": Float(0.9, 1 - 1e-6, "logit"), "eps": Float(1e-9, 1e-6, "log")}
    ),
}
Values = dict[str, Any]


@dataclass(frozen=True)
class Folds:
    """A set's folds: x [folds, rows, inputs], y [folds, rows, outputs] (one-hot, 0/1 or real), and the held-out parts padded."""

    kind: str  # "softmax", "logistic" or "identity"
    x: Tensor
    y: Tensor
    held_x: Tensor
    held_y: Tensor
    held: Tensor  # [folds, rows]: 1 / held-out rows, 0 where padded


@functools.cache
def folds(name: str, dtype: torch.dtype = torch.float32) -> Folds:
    load: Any = SETS[name]
    x, y = load(return_X_y=True)
    regression = name == "diabetes"
    x, _, y, _ = map(
        np.asarray, train_test_split(x, y, test_size=0.2, random_state=SPLIT_SEED, stratify=None if regression else y)
    )
    x = (x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0), 1)
    if regression:
        kind, target = "identity", ((y - y.mean()) / y.std())[:, None]
    else:
        classes = int(y.max()) + 1
        kind, target = ("logistic", y[:, None]) if classes == 2 else ("softmax", np.eye(classes)[y])
    cut = (KFold if regression else StratifiedKFold)(FOLDS, shuffle=True, random_state=SPLIT_SEED)
    parts = list(cut.split(x, y))
    n, m = min(len(a) for a, _ in parts), max(len(b) for _, b in parts)
    rng = np.random.default_rng(SPLIT_SEED)
    train = np.stack([rng.permutation(a)[:n] for a, _ in parts])
    held = np.stack([np.pad(b, (0, m - len(b))) for _, b in parts])
    weights = np.stack([(np.arange(m) < len(b)) / len(b) for _, b in parts])
    tensor = functools.partial(torch.as_tensor, dtype=dtype)
    return Folds(kind, tensor(x[train]), tensor(target[train]), *map(tensor, (x[held], target[held], weights)))


class MLP:
    """Several MLPs of one hidden layer side by side: all weights of one fold are a row of `flat`."""

    def __init__(self, models: int, inputs: int, hidden: int, outputs: int, kind: str, seed: int, dtype: torch.dtype):
        sizes = [inputs * hidden, hidden, hidden * outputs, outputs]
        self.kind, self.shapes = kind, [(inputs, hidden), (1, hidden), (hidden, outputs), (1, outputs)]
        self.flat, self.grad = (
            torch.zeros(models, sum(sizes), dtype=dtype),
            torch.zeros(models, sum(sizes), dtype=dtype),
        )
        self.weights, self.grads = self._views(self.flat, sizes), self._views(self.grad, sizes)
        self.decayed = torch.cat([torch.full((s,), float(i % 2 == 0), dtype=dtype) for i, s in enumerate(sizes)])
        for row in range(models):  # Glorot's bounds, drawn as scikit-learn draws them
            rng = np.random.RandomState(seed + row)
            for i, (fan_in, fan_out) in enumerate([(inputs, hidden), (hidden, outputs)]):
                bound = math.sqrt(6.0 / (fan_in + fan_out))
                self.weights[2 * i][row] = torch.as_tensor(rng.uniform(-bound, bound, (fan_in, fan_out)))
                self.weights[2 * i + 1][row] = torch.as_tensor(rng.uniform(-bound, bound, fan_out))

    def _views(self, flat: Tensor, sizes: list[int]) -> list[Tensor]:
        return [part.view(len(flat), *s) for part, s in zip(flat.split(sizes, 1), self.shapes, strict=True)]

    def hidden(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.weights[1], x, self.weights[0]).relu_()

    def output(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.weights[3], self.hidden(x), self.weights[2])

    def backward(self, x: Tensor, y: Tensor, alpha: float) -> None:
        """dL/dW into `grad`; for each of the three losses dL/d(output) = (prediction − y) / n."""
        _, _, w2, b2 = self.weights
        h = self.hidden(x)
        delta = (predict(torch.baddbmm(b2, h, w2), self.kind) - y) / x.shape[1]
        back = torch.bmm(delta, w2.transpose(1, 2)) * (h > 0)
        for out, value in zip(
            self.grads, (x.transpose(1, 2) @ back, back.sum(1, True), h.transpose(1, 2) @ delta, delta.sum(1, True))
        ):
            out.copy_(value)
        self.grad.addcmul_(self.flat, self.decayed, value=alpha / x.shape[1])


def predict(output: Tensor, kind: str) -> Tensor:
    return output.softmax(-1) if kind == "softmax" else output.sigmoid() if kind == "logistic" else output


def scores(output: Tensor, y: Tensor, weights: Tensor, kind: str) -> tuple[float, float]:
    """(error, log loss), or (MAE, MSE), meaned over rows by `weights` and over folds; what is not finite counts as the cap."""
    if kind == "identity":
        pair = ((output - y).abs()[..., 0], (output - y).square()[..., 0])
    elif kind == "logistic":
        nll = torch.nn.functional.softplus(torch.where(y > 0.5, -output, output))[..., 0]
        pair = (((output > 0) != (y > 0.5))[..., 0].to(y), nll)
    else:
        pair = ((output.argmax(-1) != y.argmax(-1)).to(y), -(output.log_softmax(-1) * y).sum(-1))
    lost = ~output.isfinite().all(-1)
    first, second = (
        torch.where(lost, cap, v).clamp(max=CAP) for v, cap in zip(pair, (CAP if kind == "identity" else 1.0, CAP))
    )
    return float((first * weights).sum(1).mean()), float((second * weights).sum(1).mean())


def fit(
    data: Folds, values: Values, seed: int, epochs: int = EPOCHS, path: Sequence[Values] | None = None
) -> list[tuple[float, float]]:
    """Train the folds with one configuration; their scores on the held-out parts after each epoch of LOOKS, and the last.

    Args:
        path: values that hold one after the other for equal shares of the run. Decay is then that of a live run: the same for
            every batch, whatever its size, and of biases too.
    """
    n, batch = data.x.shape[1], min(values["batch"], data.x.shape[1])
    net = MLP(len(data.x), data.x.shape[2], values["hidden"], data.y.shape[2], data.kind, seed, data.x.dtype)
    rng, rule, curve = np.random.default_rng(seed), Rule(net.flat, values), []
    total, t = epochs * math.ceil(n / batch), 0
    if path is not None:
        net.decayed.fill_(1)
    for epoch in range(1, epochs + 1):
        order = torch.as_tensor(rng.permutation(n))
        x, y = data.x[:, order], data.y[:, order]
        for first in range(0, n, batch):
            part, alpha = slice(first, first + batch), values["alpha"]
            if path is not None:
                rule.values = values | path[t * len(path) // total]
                alpha = rule.values["alpha"] * x[:, part].shape[1] / batch
            net.backward(x[:, part], y[:, part], alpha)
            rule.step(net.grad)
            t += 1
        if epoch in LOOKS or epoch == epochs:
            curve.append(scores(net.output(data.held_x), data.held_y, data.held, data.kind))
    return curve


class Rule:
    """scikit-learn's SGDOptimizer with Nesterov's momentum, or its AdamOptimizer, on one flat tensor."""

    def __init__(self, flat: Tensor, values: Values):
        self.flat, self.values, self.t = flat, values, 0
        self.first, self.second = torch.zeros_like(flat), torch.zeros_like(flat)

    def step(self, grad: Tensor) -> None:
        v, lr = self.values, self.values["lr"]
        self.t += 1
        if "momentum" in v:  # v ← m v − lr g;  w ← w + m v − lr g
            self.first.mul_(v["momentum"]).add_(grad, alpha=-lr)
            self.flat.add_(self.first, alpha=v["momentum"]).add_(grad, alpha=-lr)
            return
        self.first.mul_(v["beta1"]).add_(grad, alpha=1 - v["beta1"])
        self.second.mul_(v["beta2"]).addcmul_(grad, grad, value=1 - v["beta2"])
        lr *= math.sqrt(1 - v["beta2"] ** self.t) / (1 - v["beta1"] ** self.t)
        self.flat.addcdiv_(self.first, self.second.sqrt().add_(v["eps"]), value=-lr)
