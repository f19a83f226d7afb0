r"""Back to where the validation loss was lowest, with a smaller lr, once it stands above that by more than chance.

A hypergradient is a slope: where a net fits its training set, the validation loss may rise for hundreds of steps while lr comes
down by a few per cent a hyperparameter step. So its level counts too. With the readings v_1, v_2, … of the validation loss, v₀
the reading before training and v* the lowest so far, at weights θ*, a reading is *suspect* if

    v − v* > max(sigmas · σ, least_rise · (v₀ − v*))       σ = median |v_i − 2 v_{i−1} + v_{i−2}| / (0.6745 √6)

(the median of the last `recent` second differences: a trend is no noise). Of many readings of random batches the lowest is luck.
So a suspect is read again: the loss is read at θ* and at the running average of the weights in turn (the weights themselves
jump about it while lr is large, and what they jump by passes once lr decays), `pairs` times each with the same random numbers.
With d the differences,

    mean(d) > max(standard_errors · sd(d)/√pairs, least_rise · (v₀ − v̄*))       v̄* the mean at θ*

is a loss that has risen. If not, v* ← v̄*, which is not luck any more. If so, the weights are taken back to θ*, lr is divided by
`lr_cut`, its ceiling is √lr_cut times that (it rises as after chaos, see chaos_ceiling.py), tangents and averages start again and
so do the readings. In the first `restart_share` of a run of known length the run starts again instead, optimizer state and all,
and the loss before training counts as a reading: what lr that is far too large has done to the weights (units dead, training
loss 0 with large margins) is not undone by steps from there.

The readings start again where the tuning of another number begins: what is read at the average of the weights while lr is tuned,
and what is read at the weights later, do not compare. (Early stopping with restarts from the best weights; the paired test is
that of common random numbers.)

Evidence: experiments/results/online_tuning_log.md, sessions 6 and 7.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev
from typing import Any

import torch
from torch import Tensor

from hypergrad.core.host_copy import HostCopy
from hypergrad.core.problem import Problem, Saved
from hypergrad.online.kept_state import KeptState, as_buffers, values_of
from hypergrad.online.policies.policy import Policy
from hypergrad.optimizers.transition import Transition

# reads the validation loss `pairs` times at the present weights' average and at the record's, in turn: what it is there, and here
ReadBoth = Callable[[Tensor], tuple[Sequence[float], Sequence[float]]]


@dataclass(frozen=True)
class Backtracking(Policy):
    """Left out, a validation loss may rise as it will.

    Fields, beside those of the formulas above: `wait` is how many readings come, after the record began or a suspect was none,
    before the next suspect.
    """

    sigmas: float = 1.0
    least_rise: float = 0.1
    recent: int = 12
    pairs: int = 4
    standard_errors: float = 3.0
    wait: int = 2
    lr_cut: float = 4.0
    restart_share: float = 0.1

    def start(self, transition: Transition, problem: Problem, before: float, total: int | None) -> LossRecord:
        """before: the validation loss before the first step, v₀; NaN: not known. total: steps of the run; None: not known."""
        return LossRecord(self, transition, problem, before, total)


class LossRecord:
    """The lowest validation loss of the present phase, the weights there, and whether to go back to them."""

    def __init__(
        self, policy: Backtracking, transition: Transition, problem: Problem, before: float, total: int | None
    ):
        self.policy, self.transition, self.problem, self.before = policy, transition, problem, before
        # up to this step the run starts again
        self.until = 0.0 if total is None or not math.isfinite(before) else self.policy.restart_share * total
        self.start = KeptState.of(transition.live(), problem, transition) if self.until else None
        self.second: deque[float] = deque(maxlen=self.policy.recent)
        self.phase: list[int] = []  # the numbers that were tuned at the last reading
        self._begin()

    def _begin(self) -> None:
        self.best, self.buffers, self.step = math.inf, list[Saved](), 0
        self.lowest = HostCopy(self.problem.device)  # the weights [n] of that reading, where it is not the start's
        self.last: list[float] = []
        self.wait = self.policy.wait
        if self.start is not None:
            self.best, self.buffers = self.before, self.start.buffers

    @property
    def theta(self) -> Tensor | None:
        """The weights [n] where the loss was lowest; waits for what a device had still to send."""
        kept = self.lowest if self.lowest.kept or self.start is None else self.start.host
        return kept.back(0, self.problem.device) if kept.kept else None

    def starts_from(self, theta: Tensor) -> None:
        """The first step starts from weights theta [n], never written to: they may have been loaded since this was made."""
        if self.start is not None:
            before = self.start
            self.start = KeptState.of(self.transition.live(theta=theta), self.problem, self.transition)
            if torch.equal(before.host.read()[0], self.start.host.read()[0]):
                self.start.buffers = before.buffers  # the first forward pass has changed them since
            self._begin()

    def read(self, t: int, loss: float, theta: Tensor, phase: Sequence[int], read_both: ReadBoth) -> bool:
        """Note a validation loss at weights theta [n], never written to. True: go back (`go`).

        Args:
            phase: the numbers that are tuned at present.
        """
        if not math.isfinite(loss):
            return False
        if t > self.until and self.start is not None:
            if not self.lowest.kept:
                self.lowest = self.start.host.first_alone()
            self.start = None
        if self.phase != list(phase):
            if self.phase:
                self._begin()
            self.phase = list(phase)
        self.last = [*self.last[-2:], loss]
        if len(self.last) == 3:
            x, y, z = self.last
            self.second.append(abs(x - 2 * y + z) / (0.6745 * math.sqrt(6)))
        self.wait -= 1
        if loss < self.best:
            self.best, self.buffers, self.step = loss, self.problem.read_buffers(), t
            self.lowest.write([theta], given=1)
            return False
        sigma = median(self.second) if self.second else 0.0
        rise = max(self.policy.sigmas * sigma, self._least(self.best))
        if loss - self.best <= rise or self.wait > 0:
            return False
        lowest = self.theta
        if lowest is None:
            return False
        now, then = read_both(lowest)
        if not all(map(math.isfinite, [*now, *then])):  # nothing is known of it
            self.wait = self.policy.wait
            return False
        off, level = [a - b for a, b in zip(now, then, strict=True)], fmean(then)
        if fmean(off) > max(self.policy.standard_errors * stdev(off) / math.sqrt(len(off)), self._least(level)):
            return True
        self.best, self.wait = level, self.policy.wait
        return False

    def _least(self, best: float) -> float:
        """The rise that is too small to act on."""
        return self.policy.least_rise * max(self.before - best, 0.0) if math.isfinite(self.before) else 0.0

    def go(self) -> int:
        """Write the weights back; the step that they are from."""
        step, buffers = self.step, self.buffers
        if self.start is not None:
            step, buffers = 0, self.start.buffers
            self.transition.write(self.start.state)
        elif (theta := self.theta) is not None:
            self.transition.load(theta)
        self.problem.write_buffers(buffers)
        self._begin()
        return step

    def state_dict(self) -> dict[str, Any]:
        start = self.start
        return {
            "before": self.before,
            "until": self.until,
            "best": self.best,
            "step": self.step,
            "theta": next(iter(self.lowest.give()), None),
            "buffers": values_of(self.buffers),
            "last": list(self.last),
            "second": list(self.second),
            "wait": self.wait,
            "phase": list(self.phase),
            "start": None if start is None else start.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.before, self.until, self.best = float(state["before"]), float(state["until"]), float(state["best"])
        self.step, self.wait, self.phase = int(state["step"]), int(state["wait"]), list(state["phase"])
        self.last, self.second = list(state["last"]), deque(state["second"], maxlen=self.policy.recent)
        self.lowest.write(
            [] if state["theta"] is None else [state["theta"].to(self.transition.params[0], copy=True)], 1
        )
        self.buffers = as_buffers(state["buffers"], self.problem)
        old = state["start"]
        self.start = None if old is None else KeptState.from_state_dict(old, self.problem, self.transition)
