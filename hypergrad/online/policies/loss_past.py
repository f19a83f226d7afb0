"""The training losses so far of an optimizer, or of all that go down one loss; how a new one looks beside them.

Where every optimizer has a loss of its own (a GAN, actor and critic) a loss may well rise: another one works against it. Then
only a loss above blow_up · max(L₀, running mean of |loss|) is out of line, and no mean is a blow-up.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hypergrad.online.policies.policy import Policy

_FLOATS, _COUNTS = (
    ("reference", "mean", "variance", "best", "level", "cut"),
    ("seen", "bad_in_a_row", "restored", "alone", "begun"),
)


@dataclass(frozen=True)
class Limits(Policy):
    """What is out of line; the constants of DivergenceGuard, where they are explained."""

    blow_up: float = 10.0
    drift: float = 1.5
    lost_share: float = 0.5
    horizon: int = 20
    surge: float = 1.5
    surge_sds: float = 6.0
    lr_cut: float = 4.0
    surge_cut: float = 2.0
    patience: int = 3


class LossPast:
    """Running statistics of losses.

    Args:
        policy: the constants.
        before: the validation loss before the first step.
        maximizes: the loss is to rise, which says nothing of a blow-up.
    """

    def __init__(self, policy: Limits, before: float, maximizes: bool):
        self.policy, self.maximizes = policy, maximizes
        self.reference = abs(before) if math.isfinite(before) else 0.0  # L₀
        self.mean = self.variance = 0.0  # running
        self.best = math.inf  # least mean so far, L*
        self.level = math.inf  # what the last loss was above, if it was a surge
        self.cut = policy.lr_cut  # by which lr is divided at the next roll-back
        self.seen = self.bad_in_a_row = 0
        self.restored = False  # the weights of this step are those that were rolled back to
        self.alone = False  # other optimizers have other losses
        self.begun = False  # a loss was judged

    def copy(self) -> LossPast:
        return copy.copy(self)

    def judge(self, loss: float, first: bool) -> str:
        """good, surge, spike, blow-up or false alarm. first: there is no good state yet."""
        if self.maximizes:
            return "good"
        if not self.begun if self.alone else (self.seen == 0 and first):
            self.reference = max(self.reference, abs(loss))
        self.begun = True
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
        x = abs(loss) if self.alone else loss
        share, off = max(1 / self.policy.horizon, 1 / self.seen), x - self.mean
        self.mean += share * off
        self.variance += share * (off * off - self.variance)
        enough = self.seen >= self.policy.horizon
        if enough:
            self.best = min(self.best, self.mean)
        return "blow-up" if self.reference > 0 and enough and self.mean > self._threshold() else "good"

    def is_spike(self, loss: float) -> bool:
        """Whether a loss is so high that its step should not be taken."""
        if self.maximizes:
            return False
        if self.alone:
            return 0 < self.policy.blow_up * max(self.reference, self.mean) < loss
        return 0 < self.policy.blow_up * self.reference < loss or loss > max(self._surge(), self.reference)

    def _surge(self) -> float:
        """The loss from which on it is out of line with the last ones."""
        if self.alone or self.seen < self.policy.horizon or self.mean <= 0:
            return math.inf
        return max(self.policy.surge * self.mean, self.mean + self.policy.surge_sds * math.sqrt(self.variance))

    def _threshold(self) -> float:
        """The mean loss from which on the run is lost."""
        if self.alone:
            return math.inf
        drift, progress = self.policy.drift * self.reference, self.reference - self.best
        if progress <= 0 or self.best == math.inf:
            return drift
        return min(drift, self.best + max(self.policy.lost_share * progress, 2 * math.sqrt(self.variance)))

    def healthy(self) -> bool:
        """Whether the loss has kept most of the progress it made."""
        progress = 0.0 if math.isinf(self.best) else max(self.reference - self.best, 0.0)
        kept = self.alone or self.mean <= self.reference - (1 - self.policy.lost_share / 2) * progress
        return kept and not self.bad_in_a_row

    def start_again(self, restored: bool) -> None:
        """Training goes on from other weights."""
        self.mean, self.variance, self.seen, self.bad_in_a_row, self.restored = 0.0, 0.0, 0, 0, restored

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in (*_FLOATS, *_COUNTS)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        vars(self).update({name: type(x)(state[name]) for name, x in self.state_dict().items()})
