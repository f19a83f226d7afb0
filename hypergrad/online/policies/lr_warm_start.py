"""lr is found in the first few steps, from slope and curvature along the steps themselves: its start is only a hint.

The first step is made `tiny` relative to the weights; then the lr of every next step is `growth` times that of the last. Before
each step z = dθ/dlog c is the displacement so far, c a common factor of every lr used (the tangent that forward mode carries
anyway), and a fresh batch gives slope a = gᵀz and curvature b = zᵀHz (its product is formed anyway). Made c times as large, the
displacement would change that batch's loss by

    a (c − 1) + b (c − 1)²/2                        least at c = 1 − a/b

The batch is fresh, so what z has followed of the noise in gradients counts against it. Over all observations s, with e_s the lr
that made z_s, the lr that was best in hindsight is

    ℓ* = Σ (b_s − a_s)/e_s / Σ b_s/e_s²

It ends when lr has come to share · ℓ*, or after `longest` observations. Where curvature changes its sign from batch to batch, as
in narrow nets with BatchNorm, ℓ* counts only if the lower sum is at least what its terms x_s = b_s/e_s² reach with signs at
random, √(Σ x_s²), as those of positive sign always do. Otherwise lr goes on growing. ℓ* ≤ 0 says that z leads uphill from the
first weights on (momentum of another run, noise), which no lr mends: lr stays as it is.

While lr doubles, its last value has made most of z. When lr comes down again, z stays, and what made it is the largest lr so far:
taken for the work of the present one, it would call for a smaller lr at every observation, without end. Momentum m acts late:
of its final effect Σ lr/(1 − m) the steps so far have had the share ρ, and the lr that would have gone as far in the long run is
e = ρ · max lr.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from hypergrad.online.policies.policy import Policy


@dataclass(frozen=True)
class LrWarmStart(Policy):
    """Finds the scale of lr in the first steps of a run. All lr of all groups keep their ratios.

    Fields from `watched` on: when it is undone, see start_watch.py.
    """

    tiny: float = 1e-3
    growth: float = 2.0
    share: float = 0.5
    shortest: int = 8
    longest: int = 30
    coupled: float = 4.0
    watched: int = 20
    losses: int = 5
    patience: int = 3
    lr_cut: float = 4.0


class LrSearch:
    """A warm start under way.

    Args:
        policy: its constants; None: there is none.
        active: whether the search is under way.
    """

    def __init__(self, policy: LrWarmStart | None, active: bool):
        self.policy, self.active = policy or LrWarmStart(), active and policy is not None
        self.lr = 1.0  # of the last step, in units of the first
        self.largest = 0.0  # lr so far
        self.numerator = self.denominator = self.squares = 0.0
        self.observed = 0
        self.coupled = False  # what the loss calls for is not what the run does: other optimizers move it too
        # of lr under momentum: now, so far, and in the end, of the steps so far
        self.velocity = self.effect = self.whole_effect = 0.0

    def stop(self) -> None:
        self.active = False

    def first(self, displacement: float, norm: float) -> float:
        """The factor on lr that makes the first step `tiny`."""
        if not (math.isfinite(displacement) and displacement > 0 and math.isfinite(norm)):
            return 1.0
        return self.policy.tiny * (norm or 1.0) / displacement

    def observe(self, a: float, b: float, momentum: float) -> float:
        """The factor on lr for the next step, from slope a = gᵀz and curvature b = zᵀHz."""
        if not (math.isfinite(a) and math.isfinite(b)):
            self.active = False
            return 1.0
        p, m = self.policy, momentum
        self.velocity = m * self.velocity + self.lr
        self.effect, self.whole_effect = self.effect + self.velocity, self.whole_effect + self.lr / (1 - m)
        self.largest = max(self.largest, self.lr)
        e = self.largest * self.effect / self.whole_effect
        x = b / e**2
        self.numerator += (b - a) / e
        self.denominator += x
        self.squares += x * x
        self.observed += 1
        known = self.denominator > 0 and self.denominator * self.denominator >= self.squares
        uphill = known and self.numerator <= 0
        best = p.share * self.numerator / self.denominator if known and not uphill else math.inf
        if self.coupled:
            best = min(best, p.coupled)
        lr = self.lr if uphill else min(p.growth * self.lr, max(best, self.lr / p.growth))
        self.active = self.observed < p.longest and not (self.observed >= p.shortest and self.lr >= best)
        factor, self.lr = lr / self.lr, lr
        return factor

    def state_dict(self) -> dict[str, Any]:
        return {name: x for name, x in vars(self).items() if name != "policy"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update({name: state[name] for name in self.state_dict()})
