"""Losses of decision values [n, k] and targets: what models are trained on, and the losses of held-out data.

Each gives one number a sample, or a sample and column. A training objective sums them; a held-out loss is their mean.
For classes, k = 1 where there are two and the target is the column of `classes_` [n]; for numbers the target is [n, k].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus

Loss = Callable[[Tensor, Tensor], Tensor]


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
