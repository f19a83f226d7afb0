"""Whether the lr that the warm start has found is one to go on with; if not, the start is undone.

lr is found along the steps themselves, and where few weights all move one way an optimizer with inertia (Adam's β₁) goes on
moving when they have arrived: a ReLU unit may be dead before a slope has said so. Where curvature is negative along the steps, as
in deep nets with BatchNorm, lr goes on growing until the loss rises. So the warm start is undone while it is under way where

    training blows up, or
    each of the last `losses` losses is above the highest of the first `losses` by more than those spread

and in the first `watched` steps after it where

    the gradient was exactly 0 in `patience` steps in a row, of a loss that is not     nothing can be learnt from there
    each of the last `losses` losses is above each of the first `losses` of the run    worse than where it began

For losses that only jump about, the last is the case once in C(2 losses, losses) runs, 252 for 5. Weights, buffers and the
optimizers' tensors are then those before the first step again, lr is divided by `lr_cut`, and the next `watched` steps are
watched too. While the warm start is under way lr is first taken back to what it was before these losses, `growth` a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from hypergrad.core.problem import Problem
from hypergrad.online.kept_state import KeptState
from hypergrad.online.policies.lr_warm_start import LrWarmStart
from hypergrad.optimizers.binding import State
from hypergrad.optimizers.transition import Transition


class StartWatch:
    """Watches the losses of the first steps.

    Args:
        policy: its constants.
        active: False where lr does not come from a warm start, and once the watch is over.
    """

    def __init__(self, policy: LrWarmStart, problem: Problem, transition: Transition, active: bool):
        self.policy, self.problem, self.transition, self.active = policy, problem, transition, active
        self.kept: KeptState | None = None  # before the first step
        self.first: list[float] = []  # losses of the first steps, and all of the warm start
        self.since: list[float] = []  # losses since the warm start, or since it was undone
        self.zeros = 0  # in a row

    def stop(self) -> None:
        self.active, self.kept = False, None

    def sees(self, state: Callable[[], State], loss: float | None, zero: bool, searching: bool) -> bool:
        """Note a step that is about to be taken. True: undo the start.

        Args:
            state: reads the state before it, live.
            zero: whether its gradient is exactly 0.
            searching: whether the warm start is under way.
        """
        if not self.active or loss is None or not math.isfinite(loss):
            return False
        if self.kept is None:
            self.kept = KeptState.of(state(), self.problem, self.transition)
        p = self.policy
        if searching or len(self.first) < p.losses:
            self.first.append(loss)
        first = self.first[: p.losses]
        if searching:
            return len(self.first) >= 2 * p.losses and min(self.first[-p.losses :]) > 2 * max(first) - min(first)
        self.since.append(loss)
        self.zeros = self.zeros + 1 if zero and loss != 0 else 0
        if self.zeros >= p.patience:
            return True
        if len(self.since) < p.watched:
            return False
        if min(self.since[-p.losses :]) > max(first):
            return True
        self.stop()
        return False

    def undo(self) -> KeptState:
        """The state to go back to."""
        assert self.kept is not None
        self.since, self.zeros = [], 0
        return self.kept

    def state_dict(self) -> dict[str, Any]:
        return {
            "active": self.active,
            "kept": None if self.kept is None else self.kept.state_dict(),
            "first": list(self.first),
            "since": list(self.since),
            "zeros": self.zeros,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.active, self.zeros = bool(state["active"]), int(state["zeros"])
        self.first, self.since, kept = list(state["first"]), list(state["since"]), state["kept"]
        self.kept = None if kept is None else KeptState.from_state_dict(kept, self.problem, self.transition)
