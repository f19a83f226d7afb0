"""The first few steps: lr found from slope and curvature along the steps themselves, so that its start is only a hint.

The first step is made TINY relative to the weights; then the lr of every next step is GROWTH times that of the last. Before
each step z = dθ/dlog c is the displacement so far, c a common factor of every lr used (the tangent that forward mode carries
anyway), and a fresh batch gives slope a = gᵀz and curvature b = zᵀHz (its product is formed anyway). Made c times as large,
the displacement would change that batch's loss by

    a (c − 1) + b (c − 1)²/2                        least at c = 1 − a/b

The batch is fresh, so what z has followed of the noise in gradients counts against it. Over all looks s, with e_s the lr that
made z_s, the lr that was best in hindsight is

    ℓ* = Σ (b_s − a_s)/e_s / Σ b_s/e_s²

It ends when lr has come to SHARE·ℓ*, or after LONGEST looks. Momentum m acts late: of its final effect Σ lr/(1 − m) the steps
so far have had the share ρ, and the lr that would have gone as far in the long run is e = ρ·lr.

Momentum, where it is tuned, begins at MOMENTUM, whatever it was: at a fixed lr/(1 − m), which is what lr finds, it costs nothing
and widens the range of lr that is stable. A run of 40 steps ends before 0.9 has paid: in one shorter than SETTLES, a bound
chosen by hand, a lower one stays where it was typed.

Weight decay's start is a hint in the same way. The share of the weights that decay would take away over the rest of the run,
if nothing else moved them, is about 1 − exp(−D) with D = Σ_t rate_t; `sensible` brings D into [LITTLE, MUCH]: below it decay
does nothing in this run, above it the run forgets its own beginning. When its turn comes, it is tuned within [LEAST, MOST].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

TINY = 1e-3  # the first step, relative to the weights
GROWTH = 2.0  # of lr from step to step
SHARE = 0.5  # of ℓ*
SHORTEST, LONGEST = 8, 30  # looks
MOMENTUM, SETTLES = 0.9, 400  # where it begins when it is tuned, and steps of a run that is long enough for it
LITTLE, MUCH = 0.1, 0.5  # of D at the start
LEAST, MOST = 0.01, 50.0  # of D while it is tuned


class LrWarmStart:
    """Finds the scale of lr in the first steps of a run. All lr of all groups keep their ratios.

    Args:
        active: whether to.
        momentum: the largest of the groups'; None: not known before the first step.
    """

    def __init__(self, active: bool, momentum: float | None = None):
        self.active, self.momentum = active, momentum
        self.began = active
        self.sizes_decay: list[int] = []  # the optimizers whose next step is to look at the size of their weight decay
        self.lr = 1.0  # of the last step, in units of the first
        self.numerator = self.denominator = 0.0
        self.looks = 0
        self.velocity = self.went = self.would = 0.0  # of lr under momentum: now, summed, summed in the long run

    @staticmethod
    def first(displacement: float, norm: float) -> float:
        """The factor on lr that makes the first step TINY."""
        if not (math.isfinite(displacement) and displacement > 0 and math.isfinite(norm)):
            return 1.0
        return TINY * (norm or 1.0) / displacement

    def look(self, a: float, b: float) -> float:
        """The factor on lr for the next step, from slope a = gᵀz and curvature b = zᵀHz."""
        if not (math.isfinite(a) and math.isfinite(b)):
            self.active = False
            return 1.0
        m = self.momentum or 0.0
        self.velocity = m * self.velocity + self.lr
        self.went, self.would = self.went + self.velocity, self.would + self.lr / (1 - m)
        e = self.lr * self.went / self.would
        self.numerator += (b - a) / e
        self.denominator += b / e**2
        self.looks += 1
        best = SHARE * self.numerator / self.denominator if self.denominator > 0 else math.inf
        lr = min(GROWTH * self.lr, max(best, self.lr / GROWTH))
        self.active = self.looks < LONGEST and not (self.looks >= SHORTEST and self.lr >= best)
        factor, self.lr = lr / self.lr, lr
        return factor

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def largest_momentum(values: Mapping[str, Any], rules: Sequence[Any]) -> float:
    """The largest momentum of the param groups, 0 where there is none, or where it averages gradients instead of adding them up.

    Example:
        >>> from hypergrad.optimizers.rules.sgd import SGD
        >>> largest_momentum({"momentum": [0.5, None, 0.9]}, [SGD()] * 3), largest_momentum({}, [SGD()])
        (0.9, 0.0)
    """
    column = values.get("momentum", [])
    return max((x or 0.0 for x, rule in zip(column, rules) if not getattr(rule, "averages", False)), default=0.0)


def first_momentum(typed: float, total: int | None) -> float:
    """Where momentum begins in a run of `total` steps (None: not known).

    Example:
        >>> first_momentum(0.5, None), first_momentum(0.5, 4000), first_momentum(0.5, 100), first_momentum(0.99, 100)
        (0.9, 0.9, 0.5, 0.9)
    """
    return MOMENTUM if total is None or total >= SETTLES else min(typed, MOMENTUM)


def sensible(decayed: float) -> float:
    """The factor on weight decay that brings D = `decayed` into [LITTLE, MUCH].

    Example:
        >>> sensible(0.3), sensible(5.0), sensible(0.01)
        (1.0, 0.1, 10.0)
    """
    return min(max(decayed, LITTLE), MUCH) / decayed if decayed > 0 and math.isfinite(decayed) else 1.0
