"""What keeps an online run alive: steps on bad batches do nothing, a blow-up is rolled back."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from hypergrad.core.problem import Problem, Saved
from hypergrad.optimizers.binding import State
from hypergrad.optimizers.transition import Transition

# With L₀ the larger of the first training loss and the validation loss before the first step, a blow-up is
BLOW_UP = 10.0  # a training loss above so many L₀, PATIENCE times in a row, or
DRIFT = 1.5  # a running mean of the training loss above so many L₀, or
LOST = 0.5  # the same mean above L* + so much of the progress L₀ − L*, L* its least so far, and above L* + 2 standard deviations
HORIZON = 20  # taken over about so many steps, once it has seen so many
SURGE, SURGE_SDS = 1.5, 6.0  # a loss above so many times that mean, and so many deviations above it, is a surge
LR_CUT = 4.0  # lr is divided by this at a roll-back;
SURGE_CUT = 2.0  # after surges, which are noticed early, by this
NEVER = 10**9
_FLOATS, _COUNTS = ("reference", "mean", "variance", "best", "level", "cut"), ("seen", "bad_in_a_row", "restored")
PATIENCE = 3  # so many steps in a row that are not finite, with finite weights, or spikes or surges, are a blow-up too


@dataclass
class _Good:
    state: State
    buffers: list[Saved]


class DivergenceGuard:
    """Judges every step before it is taken, and keeps the last good states.

    A *bad batch* is a loss or gradient that is not finite with weights that are; a *surge* a loss out of line with the last
    ones (see SURGE); a *spike* a surge above L₀, or a loss far above L₀ (see BLOW_UP). Steps on bad batches and spikes are passed
    over. A *blow-up* is weights that are not finite, a mean loss above L₀ or above what it had come to (see DRIFT, LOST), or
    PATIENCE bad batches, or spikes and surges, in a row: one may be the batch's fault, several are the weights'. Where every
    batch is the whole set, surges are how lr beyond the edge of stability shows, long before the mean does: left to itself it
    kills ReLU units, and its tangents speak of nothing else for hundreds of steps. A roll-back after which the loss is as high at
    the good weights was a *false alarm* (L₀ becomes that loss), or it was *bad data* where the loss is not finite there either.

    Args:
        reference: the validation loss before the first step.
    """

    def __init__(self, transition: Transition, problem: Problem, reference: float):
        self.transition, self.problem = transition, problem
        self.reference = abs(reference) if math.isfinite(reference) else 0.0  # L₀
        self.mean = self.variance = 0.0  # running, of the training loss
        self.best = math.inf  # least mean so far, L*
        self.level = math.inf  # what the last loss was above, if it was a surge
        self.cut = LR_CUT  # by which lr is divided at the next roll-back
        self.seen = self.bad_in_a_row = 0
        self.restored = False  # the weights of this step are those that were rolled back to
        self.good: deque[_Good] = deque(maxlen=2)
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
            if self.bad_in_a_row >= PATIENCE:
                return "blow-up"
            return "good" if verdict == "surge" else verdict
        if self.restored and bool(torch.isfinite(theta).all()):  # at good weights too: it is the data
            self.restored, self.bad_in_a_row = False, -NEVER
            return "bad data"
        self.bad_in_a_row += 1
        if not bool(torch.isfinite(theta).all()) or self.bad_in_a_row >= PATIENCE:
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
        self.cut = LR_CUT
        if loss > self._surge() and not 0 < BLOW_UP * self.reference < loss:
            self.level, self.cut = self._surge(), SURGE_CUT
            return "spike" if self.is_spike(loss) else "surge"
        if self.is_spike(loss):
            return "spike"
        self.seen += 1
        share, off = max(1 / HORIZON, 1 / self.seen), loss - self.mean
        self.mean += share * off
        self.variance += share * (off * off - self.variance)
        settled = self.seen >= HORIZON
        if settled:
            self.best = min(self.best, self.mean)
        return "blow-up" if self.reference > 0 and settled and self.mean > self._threshold() else "good"

    def is_spike(self, loss: float) -> bool:
        """Whether a loss is so high that its step should not be taken."""
        if self.transition.maximizes:
            return False
        return 0 < BLOW_UP * self.reference < loss or loss > max(self._surge(), self.reference)

    def _surge(self) -> float:
        """The loss from which on it is out of line with the last ones."""
        if self.seen < HORIZON or self.mean <= 0:
            return math.inf
        return max(SURGE * self.mean, self.mean + SURGE_SDS * math.sqrt(self.variance))

    def doubts(self, loss: float) -> bool:
        """Whether a loss, not judged yet, looks like the batch's own fault: nothing is to be learnt from that batch."""
        if (math.isfinite(loss) and not self.is_spike(loss)) or self.bad_in_a_row + 1 >= PATIENCE:
            return False
        return all(bool(torch.isfinite(p).all()) for p in self.transition.params)

    def _threshold(self) -> float:
        """The mean loss from which on the run is lost."""
        drift, progress = DRIFT * self.reference, self.reference - self.best
        if progress <= 0 or self.best == math.inf:
            return drift
        return min(drift, self.best + max(LOST * progress, 2 * math.sqrt(self.variance)))

    def keep(self, state: State) -> None:
        """Note a state as good, if the loss has kept most of the progress it made.

        Its tensors are never written to, so nothing is copied but the buffers.
        """
        progress = 0.0 if math.isinf(self.best) else max(self.reference - self.best, 0.0)
        kept = self.mean <= self.reference - (1 - LOST / 2) * progress
        if (kept and not self.bad_in_a_row) or not self.good:
            self.good.append(_Good(state, self.problem.read_buffers()))

    def mend_buffers(self) -> None:
        """A bad batch may have put a NaN into running statistics: take those of the last good state, or the first ones."""
        if not all(bool(torch.isfinite(b).all()) for b in self.problem.buffers):
            self.problem.write_buffers(self.good[-1].buffers if self.good else self.first_buffers)

    def start_again(self, state: State) -> None:
        """From a state that is a good one, and not the one that training has come to: forget the losses so far."""
        self.mean, self.variance, self.seen, self.bad_in_a_row, self.restored = 0.0, 0.0, 0, 0, False
        self.best = self.level = math.inf
        self.good.clear()
        self.good.append(_Good(state, self.problem.read_buffers()))

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

    def state_dict(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in (*_FLOATS, *_COUNTS)}

    def load_state_dict(self, state: dict[str, float]) -> None:
        vars(self).update({name: float(state[name]) for name in _FLOATS} | {name: int(state[name]) for name in _COUNTS})
