"""What the adjoint needs of a recorded run: checkpoints, random numbers, losses; and whether a replay was the same."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hypergrad.core.restore import Rng
from hypergrad.differentiate.checkpoints import Checkpoint, Stack
from hypergrad.differentiate.series import Series

REPLAY_RTOL = 1e-3  # bit-identical on CPU; kernels on a GPU may add up in another order


class TapePlan(NamedTuple):
    """How a run is recorded.

    Attributes:
        every: steps between checkpoints; the steps from one to the next are a segment, and are replayed together.
        whole: whether the stepper keeps of every recorded step what that step's vjp can use (see stepper.py).
        replayed: else of how many steps of a segment, the last that are replayed.
    """

    every: int
    whole: bool = False
    replayed: int = 0


class Tape:
    """A recorded run: checkpoints every c steps, and every step's random numbers and loss.

    Checkpoint i was taken before step i·c; the last one is the state after the last step.

    Args:
        every, whole, replayed: as of a `TapePlan`.
        checkpoints: an empty stack; a list by default.
        new_stack: makes the stack for the states of a segment that is replayed.
    """

    def __init__(
        self,
        every: int,
        whole: bool = False,
        replayed: int = 0,
        checkpoints: Stack | None = None,
        new_stack: Callable[[], Stack] = list,
    ):
        self.every, self.whole, self.replayed = every, whole, replayed
        self.checkpoints: Stack = [] if checkpoints is None else checkpoints
        self.new_stack = new_stack
        self.rng: list[Rng] = []
        self.losses = Series()
        self.digests = array("Q")  # by segment, of the state before its last step
        self.replayed_losses: dict[int, Tensor] = {}  # of the present segment
        self.mismatch = 0.0  # the largest relative difference of those

    def before_step(self, at: Checkpoint, rng: Rng, last: bool) -> None:
        """Record the state and the random numbers before the next step; those of the step before it where none were drawn."""
        t = len(self.rng)
        if t % self.every == 0:
            self.checkpoints.append(at)
        elif (t + 1) % self.every == 0 or last:
            self.digests.append(at.digest())
        self.rng.append(self.rng[-1] if self.rng and self.rng[-1].equals(rng) else rng)

    def after_step(self, loss: Tensor) -> None:
        self.losses.append(loss)

    def end(self, at: Checkpoint) -> None:
        """Record the state after the last step."""
        self.checkpoints.append(at)

    def steps_of(self, segment: int) -> range:
        return range(segment * self.every, min((segment + 1) * self.every, len(self.rng)))

    def replayed_step(self, t: int, loss: Tensor | None) -> None:
        """Record the loss of a step that was computed again; None where it was not."""
        if loss is not None:
            self.replayed_losses[t] = loss

    def same(self, segment: int, at: Checkpoint) -> bool:
        """Whether the state before a segment's last step is what it was. True where no step was replayed."""
        return segment >= len(self.digests) or at.digest() == self.digests[segment]

    def verify(self) -> None:
        """Raise where a step of the present segment, computed again, does not have the loss it had."""
        steps = [t for t in self.replayed_losses if t < len(self.losses)]
        if not steps:
            return
        then = torch.stack([self.losses[t] for t in steps])
        now = torch.stack([self.replayed_losses[t] for t in steps])
        self.replayed_losses = {}
        same = (now == then) | (now.isnan() & then.isnan())
        off, i = ((now - then).abs() / then.abs()).nan_to_num(nan=math.inf).masked_fill_(same, 0).max(0)
        self.mismatch = max(self.mismatch, float(off))
        if float(off) > REPLAY_RTOL:
            raise ValueError(
                f"step {steps[int(i)]} is not deterministic: its loss was {float(then[i]):.9g}, and {float(now[i]):.9g} when the "
                "step was replayed. Draw random numbers in the loss from torch's global generator (which is put back), not from "
                "numpy or a generator of your own, or use mode='forward', which replays nothing."
            )
