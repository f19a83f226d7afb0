"""Weights that something other than the optimizer has written: a clamp, a mask, a layer that is reset, a checkpoint.

The weights that a step left are compared with those at the next `backward`, and those with the ones at the step. An element that
was written is a constant from there on, so its tangent is 0. That is its derivative for clamping, masks and layers that begin
anew; for what was computed from the weights (normalising, averaging, older weights) it is a tangent that starts again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from hypergrad.core.multi_tensor import equal
from hypergrad.core.readout import Readout
from hypergrad.optimizers.transition import Transition

SAID = (
    "weights were written between two steps by something other than the optimizer (tuner.stats['written_weights']): tangents of "
    "those elements start again from zero. That is right for constants (clamping, masks, a layer that begins anew); of what is "
    "computed from the weights themselves (normalising, averaging, loading older weights) hypergradients know nothing."
)


class WrittenWeights:
    """What the weights were when they were last looked at."""

    def __init__(self) -> None:
        self.left: Tensor | None = None  # [n]; None: not known
        self.found: Tensor | None = None  # 0-d bool, until the host has read it

    def weights(self, transition: Transition) -> Tensor:
        """The present weights [n], never written to: those that were last looked at, where nothing was written since."""
        if self.left is not None and equal(transition.params, transition.split(self.left)):
            return self.left
        return transition.flatten(transition.params)

    def note(self, read: Callable[[], Tensor]) -> None:
        """The weights [n] that `read` reads are as they should be."""
        self.left = None  # its memory is free for them
        self.left = read()

    def forget(self) -> None:
        self.left = self.found = None

    def kept(self, theta: Tensor) -> Tensor | None:
        """Which elements of the weights [n] are as they were [n] bool; None: all are, or nothing is known."""
        left, self.left = self.left, theta
        if left is None or left is theta or left.shape != theta.shape:
            return None
        if theta.device.type == "cpu" and torch.equal(left, theta):
            return None
        same = (left == theta) | ((left != left) & (theta != theta))
        written = ~same.all()
        self.found = written if self.found is None else self.found | written
        return same

    def ask(self, readout: Readout) -> None:
        if self.found is not None:
            readout.ask("written", self.found)
            self.found = None

    @staticmethod
    def said(read: Mapping[str, list[float]], counts: dict[str, int]) -> str:
        """A sentence, where something was written; it is counted."""
        if not read.get("written", [0.0])[0]:
            return ""
        counts["written_weights"] += 1
        return SAID
