"""A training run that is not begun yet, as a user hands it over: to `tune_run`, and to `hypergrad.search`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hypergrad.differentiate.arguments import Optimizers

COST_OF_PRODUCT = 2  # of a Hessian-vector product, in gradient evaluations


class Run(NamedTuple):
    """A training run, not yet begun: what `build` returns. The fields are arguments of `hypergrad.hypergradient`.

    Attributes:
        model, optimizer: fresh ones, or ones that are put back as they were.
        batches: one batch a step.
        loss: `loss(model, batch)`, or `loss(model, batch, hypers)` where hyperparameters in the loss are tuned.
        val_loss: `val_loss()` or `val_loss(t)`.
        val_steps: numbers of completed steps at which it is taken; None: after the last.
        schedules: name in param_groups → f(step, hypers), which reads hyperparameters that are tuned.
    """

    model: torch.nn.Module
    optimizer: Optimizers
    batches: Iterable[Any]
    loss: Callable[..., Tensor]
    val_loss: Callable[..., Tensor]
    val_steps: Sequence[int] | None = None
    schedules: Mapping[str, Callable[..., Any]] | None = None
