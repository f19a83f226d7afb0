"""What keeps a run alive: steps on bad batches do nothing, a blow-up is rolled back.

With L₀ the larger of the first training loss and the validation loss before the first step, and the running mean of the training
loss taken over about `horizon` steps, once it has seen so many:

    bad batch    a loss or gradient that is not finite with weights that are
    surge        a loss above surge · mean, and `surge_sds` standard deviations above the mean
    spike        a surge above L₀, or a loss above blow_up · L₀
    blow-up      weights that are not finite; or a mean above drift · L₀; or a mean above L* + lost_share · (L₀ − L*) and
                 2 standard deviations above L*, the least mean so far; or `patience` bad batches, or spikes and surges, in a row:
                 one may be the batch's fault, several are the weights'

Steps on bad batches and spikes are passed over. At a blow-up weights, buffers and optimizer tensors go back to the older of two
good states, and lr is divided by `lr_cut` (after surges, which are noticed early, by `surge_cut`). A roll-back after which the
loss is as high at the good weights was a *false alarm* (L₀ becomes that loss), or it was *bad data* where the loss is not
finite there either.

Where every batch is the whole set, surges are how lr beyond the edge of stability shows, long before the mean does: left to
itself it kills ReLU units, and its tangents speak of nothing else for hundreds of steps.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hypergrad.core.problem import Problem
from hypergrad.online.kept_state import KeptState, as_buffers, values_of
from hypergrad.online.policies.policy import Policy
from hypergrad.optimizers.binding import State
from hypergrad.optimizers.transition import Transition

NEVER = 10**9
_FLOATS, _COUNTS = ("reference", "mean", "variance", "best", "level", "cut"), ("seen", "bad_in_a_row", "restored")


@dataclass(frozen=True)
class DivergenceGuard(Policy):
    """Left out, every step is taken as it comes."""

    blow_up: float = 10.0
    drift: float = 1.5
    lost_share: float = 0.5
    horizon: int = 20
    surge: float = 1.5
    surge_sds: float = 6.0
    lr_cut: float = 4.0
    surge_cut: float = 2.0
    patience: int = 3

    def start(self, transition: Transition, problem: Problem, reference: float) -> StepJudge:
        """reference: the validation loss before the first step."""
        return StepJudge(self, transition, problem, reference)


class StepJudge:
    """Judges every step before it is taken, and keeps the last good states."""

    def __init__(self, policy: DivergenceGuard, transition: Transition, problem: Problem, reference: float):
        self.policy, self.transition, self.problem = policy, transition, problem
        self.reference = abs(reference) if math.isfinite(reference) else 0.0  # L₀
        self.mean = self.variance = 0.0  # running, of the training loss
        self.best = math.inf  # least mean so far, L*
        self.level = math.inf  # what the last loss was above, if it was a surge
        self.cut = self.policy.lr_cut  # by which lr is divided at the next roll-back
        self.seen = self.bad_in_a_row = 0
        self.restored = False  # the weights of this step are those that were rolled back to
        self.good: deque[KeptState] = deque(maxlen=2)
        self.first_buffers = problem.read_buffers()

    def judge(self, loss: float | None, finite: bool, theta: Tensor) -> str:
        """One of good, bad batch, spike, blow-up, and after a roll-back false alarm or bad data.

        Args:
            loss: None: not known.
            finite: whether the gradient is.
            theta: the weights before the step [n].
        """
        if finite and (loss is None or math.isfinite(loss)):
            verdict = "good" if loss is None else self._judge_finite(loss)
            self.bad_in_a_row = self.bad_in_a_row + 1 if verdict in ("spike", "surge") else 0
            if self.bad_in_a_row >= self.policy.patience:
                return "blow-up"
            return "good" if verdict == "surge" else verdict
        if self.restored and bool(torch.isfinite(theta).all()):  # at good weights too: it is the data
            self.restored, self.bad_in_a_row = False, -NEVER
            return "bad data"
        self.bad_in_a_row += 1
        if not bool(torch.isfinite(theta).all()) or self.bad_in_a_row >= self.policy.patience:
            return "blow-up"
        return "bad batch"

    def _judge_finite(self, loss: float) -> str:
        if self.transition.maximizes:  # a loss that is to rise says nothing of a blow-up
            return "good"
        if self.seen == 0 and not self.good:
            self.reference = max(self.reference, abs(loss))
        restored, self.restored = self.restored, False
        level, self.level, threshold = self.level, math.inf, self._threshold()
        if restored and loss > min(level, threshold):  # the weights are good ones: it is the data that has changed
            if loss > threshold:
                self.reference, self.best = max(self.reference, loss), math.inf
            return "false alarm"
        self.cut = self.policy.lr_cut
        if loss > self._surge() and not 0 < self.policy.blow_up * self.reference < loss:
            self.level, self.cut = self._surge(), self.policy.surge_cut
            return "spike" if self.is_spike(loss) else "surge"
        if self.is_spike(loss):
            return "spike"
        self.seen += 1
        share, off = max(1 / self.policy.horizon, 1 / self.seen), loss - self.mean
        self.mean += share * off
        self.variance += share * (off * off - self.variance)
        enough = self.seen >= self.policy.horizon
        if enough:
            self.best = min(self.best, self.mean)
        return "blow-up" if self.reference > 0 and enough and self.mean > self._threshold() else "good"

    def is_spike(self, loss: float) -> bool:
        """Whether a loss is so high that its step should not be taken."""
        if self.transition.maximizes:
            return False
        return 0 < self.policy.blow_up * self.reference < loss or loss > max(self._surge(), self.reference)

    def _surge(self) -> float:
        """The loss from which on it is out of line with the last ones."""
        if self.seen < self.policy.horizon or self.mean <= 0:
            return math.inf
        return max(self.policy.surge * self.mean, self.mean + self.policy.surge_sds * math.sqrt(self.variance))

    def doubts(self, loss: float) -> bool:
        """Whether a loss, not judged yet, looks like the batch's own fault: nothing is to be learnt from that batch."""
        if (math.isfinite(loss) and not self.is_spike(loss)) or self.bad_in_a_row + 1 >= self.policy.patience:
            return False
        return all(bool(torch.isfinite(p).all()) for p in self.transition.params)

    def _threshold(self) -> float:
        """The mean loss from which on the run is lost."""
        drift, progress = self.policy.drift * self.reference, self.reference - self.best
        if progress <= 0 or self.best == math.inf:
            return drift
        return min(drift, self.best + max(self.policy.lost_share * progress, 2 * math.sqrt(self.variance)))

    def keep(self, state: State) -> None:
        """Note a state as good, if the loss has kept most of the progress it made.

        Its tensors are never written to, so nothing is copied but the buffers.
        """
        progress = 0.0 if math.isinf(self.best) else max(self.reference - self.best, 0.0)
        kept = self.mean <= self.reference - (1 - self.policy.lost_share / 2) * progress
        if (kept and not self.bad_in_a_row) or not self.good:
            self.good.append(KeptState(state, self.problem.read_buffers()))

    def mend_buffers(self) -> None:
        """A bad batch may have put a NaN into running statistics: take those of the last good state, or the first ones."""
        if not all(bool(torch.isfinite(b).all()) for b in self.problem.buffers):
            self.problem.write_buffers(self.good[-1].buffers if self.good else self.first_buffers)

    def start_again(self, state: State) -> None:
        """From a state that is a good one, and not the one that training has come to: forget the losses so far."""
        self.mean, self.variance, self.seen, self.bad_in_a_row, self.restored = 0.0, 0.0, 0, 0, False
        self.best = self.level = math.inf
        self.good.clear()
        self.good.append(KeptState(state, self.problem.read_buffers()))

    def roll_back(self) -> bool:
        """Copy weights, buffers and optimizer tensors back, in place, from the older of the states kept."""
        if not self.good:
            return False
        good = self.good[0]
        self.good.clear()
        self.good.append(good)
        self.mean, self.variance, self.seen, self.bad_in_a_row, self.restored = 0.0, 0.0, 0, 0, True
        self.problem.write_buffers(good.buffers)
        self.transition.write(good.state)
        return True

    def state_dict(self) -> dict[str, Any]:
        numbers = {name: getattr(self, name) for name in (*_FLOATS, *_COUNTS)}
        good = [kept.state_dict() for kept in self.good]
        return numbers | {"good": good, "first buffers": values_of(self.first_buffers)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        vars(self).update({name: float(state[name]) for name in _FLOATS} | {name: int(state[name]) for name in _COUNTS})
        self.good = deque((KeptState.from_state_dict(x, self.problem) for x in state["good"]), maxlen=2)
        self.first_buffers = as_buffers(state["first buffers"], self.problem)
