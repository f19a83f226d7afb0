"""A backward pass while nothing is tuned: torch's own, which copies nothing, and what the step has to know of its loss."""

from __future__ import annotations

from torch import Tensor

from hypergrad.core.multi_tensor import norms
from hypergrad.core.survey import survey
from hypergrad.online.gradient_changes import Pending, reached
from hypergrad.optimizers.transition import Transition


def without_tangents(loss: Tensor, old: Pending | None, transition: Transition, scale: float) -> Pending:
    """What the step has to know of a loss, before its backward pass.

    Args:
        old: what earlier calls left; the losses of those whose gradients are still there count too.
        scale: of a GradScaler.
    """
    there = [p.grad for p in transition.params if p.grad is not None]
    has = _depends_on(loss, transition)
    to = reached(transition, has)
    new = Pending(None, has, None, {to: loss.detach()}, scale, coupled=len(to) > 1)
    if old is None or not there:
        return new
    old.survives = norms(there, 1).sum() > 0
    return old.joined(new)


def _depends_on(loss: Tensor, transition: Transition) -> tuple[bool, ...]:
    """For each parameter, whether a loss depends on it; with one optimizer all are taken to: it does not matter which."""
    if len(transition.optimizers) == 1:
        return (True,) * len(transition.params)
    leaves = {id(x) for x in survey(loss).leaves}
    return tuple(id(p) in leaves for p in transition.params)
