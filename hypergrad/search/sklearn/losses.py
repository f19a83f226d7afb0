"""Losses of decision values [n, k] and targets: what models are trained on, and the losses of held-out data.

Each gives one number a sample, or a sample and column. A training objective sums them; a held-out loss is their mean. Samples may
have weights.
For classes, k = 1 where there are two and the target is the column of `classes_` [n]; for numbers the target is [n, k].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.utils.validation import _check_sample_weight
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus

Loss = Callable[[Tensor, Tensor], Tensor]


class Data(NamedTuple):
    """Rows [n, d], targets, and weights of the samples [n], none below 0; None: every sample counts once."""

    x: Tensor
    y: Tensor
    weight: Tensor | None = None

    @property
    def count(self) -> Tensor | int:
        """Σ wᵢ, of samples without weights n."""
        return len(self.x) if self.weight is None else self.weight.sum()

    def sum(self, losses: Tensor) -> Tensor:
        """Σ wᵢ ℓᵢ of losses [n] or [n, k]."""
        return losses.sum() if self.weight is None else self.weight @ losses.reshape(len(losses), -1).sum(1)

    def mean(self, losses: Tensor) -> Tensor:
        """Σ wᵢ ℓᵢ / Σ wᵢ of losses [n] or [n, k], of k columns their mean.

        Example:
            >>> two = torch.zeros(2, 1), torch.zeros(2)
            >>> losses = torch.tensor([1.0, 5.0])
            >>> Data(*two).mean(losses), Data(*two, torch.tensor([3.0, 1.0])).mean(losses)
            (tensor(3.), tensor(2.))
        """
        if self.weight is None:
            return losses.mean()
        return self.weight @ losses.reshape(len(losses), -1).mean(1) / self.weight.sum()


def weights(given: Any, x: Any) -> Tensor | None:
    """Weights of the samples of x as scikit-learn takes them: None, a number or an array.

    Raises:
        ValueError: another length, a weight below 0, or none above it.
    """
    if given is None:
        return None
    return torch.tensor(_check_sample_weight(given, x, dtype=np.float64, ensure_non_negative=True))


def squared_error(s: Tensor, y: Tensor) -> Tensor:
    """(s − y)², [n, k]."""
    return (s - y).square()


def log_loss(s: Tensor, y: Tensor) -> Tensor:
    """−log p_y, [n], for p = softmax(s); of two classes p₁ = 1/(1 + e⁻ˢ)."""
    if s.shape[1] == 1:
        return softplus(torch.where(y == 1, -s[:, 0], s[:, 0]), threshold=1000.0)
    return cross_entropy(s, y, reduction="none")


def squared_hinge(s: Tensor, y: Tensor) -> Tensor:
    """max(0, 1 − ys)², y = ±1, [n, k]: one class against the rest in each column."""
    columns = torch.arange(s.shape[1], device=s.device) if s.shape[1] > 1 else torch.ones(1, device=s.device)
    sign = 2.0 * (y[:, None] == columns).to(s.dtype) - 1
    return (1 - sign * s).clamp_min(0).square()


LOSSES: dict[str, Loss] = {"squared_error": squared_error, "log_loss": log_loss, "squared_hinge": squared_hinge}
