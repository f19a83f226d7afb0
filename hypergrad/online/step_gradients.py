"""The gradients that an optimizer is about to step with."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from hypergrad.core.multi_tensor import equal, norms
from hypergrad.core.readout import Readout
from hypergrad.optimizers.transition import Transition


class StepGradients:
    """Which parameters of optimizer i have one, and whether all is finite, or 0.

    Args:
        joined: also as one flat vector, which only tangents need; without them nothing is copied.
        left: what `backward` left [n], which is that vector where they are the same; None: not known.

    Attributes:
        active: for each parameter, whether this optimizer will step it.
        flat: [n], 0 elsewhere; None: not joined, or there are none.
    """

    def __init__(self, transition: Transition, i: int, joined: bool, left: Tensor | None = None):
        self.active = tuple(
            p.grad is not None and transition.optimizer_of_group[group] == i
            for p, group in zip(transition.params, transition.group_of, strict=True)
        )
        grads = [p.grad if a else None for p, a in zip(transition.params, self.active, strict=True)]
        self.tensors = [g for g in grads if g is not None]
        self.flat: Tensor | None = None
        if joined and self.tensors:
            if left is not None and len(self.tensors) == len(grads) and equal(self.tensors, transition.split(left)):
                self.flat = left
            else:
                self.flat = transition.flatten(grads)

    def ask(self, readout: Readout) -> None:
        """Ask for a number that is not finite where a gradient is not, and 0 where all are."""
        if self.flat is not None:
            readout.ask("sum", self.flat.sum())
        elif self.tensors:
            readout.ask("sum", norms(self.tensors).sum())  # of order 2: four times as fast as 1

    # sums of finite numbers, and their squares, may overflow, and be 0 where not all are
    def finite(self, read: Mapping[str, list[float]]) -> bool:
        return math.isfinite(read["sum"][0]) or bool(norms(self.tensors, math.inf).isfinite().all())

    def zero(self, read: Mapping[str, list[float]]) -> bool:
        return read["sum"][0] == 0 and not bool(norms(self.tensors, math.inf).any())


def drop_gradients(transition: Transition, i: int) -> None:
    """Make optimizer i do nothing. The others' gradients stay until they step: a GradScaler wants to see them."""
    for p, group in zip(transition.params, transition.group_of, strict=True):
        if transition.optimizer_of_group[group] == i:
            p.grad = None
