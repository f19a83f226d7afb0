"""What keeps an online run alive: steps that are not finite do nothing, a blow-up is rolled back."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from hypergrad.problem import Problem
from hypergrad.updates.transition import State, Transition

BLOW_UP = 10.0  # a training loss above so many times the first one is a blow-up
LR_CUT = 4.0  # lr is divided by this at a roll-back
PATIENCE = 3  # so many steps in a row that are not finite, with finite weights, are a blow-up too


@dataclass
class _Good:
    state: State
    buffers: list[Tensor]


class Guard:
    """Judges every step before it is taken, and keeps the last good states.

    A *bad batch* is a loss or gradient that is not finite with weights that are: the step is passed over. A *blow-up* is
    weights that are not finite, a loss above BLOW_UP times the first one, or PATIENCE bad batches in a row.
    """

    def __init__(self, transition: Transition, problem: Problem):
        self.transition, self.problem = transition, problem
        self.first_loss = math.nan
        self.bad_in_a_row = 0
        self.good: deque[_Good] = deque(maxlen=2)

    def judge(self, loss: float, g: Tensor, theta: Tensor) -> str:
        """ "good", "bad batch" or "blow-up"."""
        if math.isnan(self.first_loss) and math.isfinite(loss):
            self.first_loss = loss
        largest = float(g.abs().amax()) if g.numel() else 0.0
        if math.isfinite(loss) and math.isfinite(largest):
            self.bad_in_a_row = 0
            return "blow-up" if loss > BLOW_UP * abs(self.first_loss) > 0 else "good"
        self.bad_in_a_row += 1
        if not bool(torch.isfinite(theta).all()) or self.bad_in_a_row >= PATIENCE:
            return "blow-up"
        return "bad batch"

    def keep(self, state: State) -> None:
        """Note a good state. Its tensors are never written to, so nothing is copied but the buffers."""
        self.good.append(_Good(state, self.problem.read_buffers()))

    def mend_buffers(self) -> None:
        """A bad batch may have put a NaN into running statistics: take those of the last good state."""
        if self.good and not all(bool(torch.isfinite(b).all()) for b in self.problem.buffers):
            self.problem.write_buffers(self.good[-1].buffers)

    def roll_back(self) -> bool:
        """Copy weights, buffers and optimizer tensors back, in place, from the older of the states kept."""
        if not self.good:
            return False
        good = self.good[0]
        self.good.clear()
        self.good.append(good)
        self.bad_in_a_row = 0
        self.problem.write_buffers(good.buffers)
        self.transition.write(good.state)
        return True
