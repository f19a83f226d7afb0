"""What the adjoint needs of a run: states, random numbers, losses; and whether the run was the same when played again."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hypergrad.core.graph import Linearization
from hypergrad.core.problem import Rng
from hypergrad.differentiate.checkpoints import Checkpoint, Stack
from hypergrad.differentiate.series import Series

REPLAY_RTOL = 1e-3  # bit-identical on CPU; kernels on a GPU may add up in another order


@dataclass
class Tape:
    """What a replay needs: states every c steps, and every step's random numbers; or every step's graph.

    Checkpoint i was taken before step i·c; the last one is the state after the last step.
    """

    every: int
    checkpoints: Stack = field(default_factory=list)
    new_stack: Callable[[], Stack] = list  # for the states of a segment
    graphs: dict[int, Linearization] = field(default_factory=dict)  # of all steps, or of the segment at hand
    spare: int = 0  # steps whose graphs are kept: all, or of each segment the last ones that are played again
    rng: list[Rng] = field(default_factory=list)
    losses: Series = field(default_factory=Series)
    keeps_gradients: bool = False  # those of all steps: with compile=True and a state of every step
    gradients: dict[int, Tensor] = field(default_factory=dict)  # of the segment at hand, with compile=True
    digests: array[int] = field(default_factory=lambda: array("Q"))  # by segment, of the state before its last step
    played: dict[int, Tensor] = field(default_factory=dict)  # losses of the segment at hand, as played again
    mismatch: float = 0.0  # the largest relative difference of those
    values: list[Tensor] = field(default_factory=list)  # shares of the objective, where they were looked at

    def note_rng(self, rng: Rng) -> None:
        """Random numbers before the next step; those of the last one again where none were drawn."""
        self.rng.append(self.rng[-1] if self.rng and self.rng[-1].equals(rng) else rng)

    def same(self, segment: int, at: Checkpoint) -> bool:
        """Whether the state before a segment's last step is what it was. True where it was not played again."""
        return segment >= len(self.digests) or at.digest() == self.digests[segment]

    def verify(self) -> None:
        """Raise where a step of the segment, played again, does not have the loss it had."""
        steps = [t for t in self.played if t < len(self.losses)]
        if not steps:
            return
        then, now = torch.stack([self.losses[t] for t in steps]), torch.stack([self.played[t] for t in steps])
        self.played = {}
        same = (now == then) | (now.isnan() & then.isnan())
        off, i = ((now - then).abs() / then.abs()).nan_to_num(nan=math.inf).masked_fill_(same, 0).max(0)
        self.mismatch = max(self.mismatch, float(off))
        if float(off) > REPLAY_RTOL:
            raise ValueError(
                f"step {steps[int(i)]} is not deterministic: its loss was {float(then[i]):.9g}, played again "
                f"{float(now[i]):.9g}. Draw random numbers in the loss from torch's global generator (which is put back), not "
                "from numpy or a generator of your own, or use mode='forward', which plays nothing again."
            )
