"""How far the tuned numbers move: Adam on φ, slowed down by disagreement; lr climbs by Newton's step.

Each number has a pace: it rises by FASTER where a hypergradient agrees in sign with their running mean, falls by SLOWER where
it does not, and is 1 at most. Noise slows a number down, so it settles. Adam's second moment looks back over a share of the
steps so far, so that the first hypergradients, often the largest by far, do not rule for long.

The learning rate climbs more readily than it descends, because its hypergradient is biased one way: over a horizon shorter than
the run a smaller lr always looks better than it is (Wu et al. 2018, arXiv 1803.02021). Down it goes at DOWN times the pace. How
far up is known better than by a rule of thumb: with z = dθ/dlog lr, which forward mode carries, every training step's batch
gives slope a = gᵀz and curvature b = zᵀHz of its loss along z before it is used for training. Made c times as large, the
displacement z would change that loss by a (c − 1) + b (c − 1)²/2, least at c* = 1 − a/b. From one hypergradient to the next lr
climbs by the factor c*, summed over the steps between, by SLOWEST at least and FURTHEST at most, where the hypergradient says up.
With several lr, z_i is of the i-th, a_i = gᵀz_i, B_ij = z_iᵀHz_j, and b_i = B_ii + Σ_{j≠i} |B_ij|, a bound from above on what
all of them change together.

As a hypergradient speaks of the values that it has seen, every number keeps within a factor LEAD of its own mean so far (odds of
a number between 0 and 1), by its own steps: else what holds for the past is acted on until it is far from true. For all but a
learning rate newer values weigh more in that mean, RECENT / n for the n-th: x may then rise as n⁶ and not as n³, which one
that stood still for its first steps needs to come to where it belongs. And where lr's
tangent outgrew the weights, training is chaotic: lr steps down, whatever its mean, and where it then is becomes a ceiling, which
rises by RELAX and ever faster, by GROW a step, while tangents stay small: early chaos often passes as training goes on. (Where
momentum is tuned it moves at a fixed lr/(1 − m), and takes lr with it past these limits.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

BETA1 = 0.8  # of Adam on φ
MEMORY = 4.0  # its second moment looks back over one part in so many of the steps so far,
BETA2 = 0.99  # and gives the newest a weight of 1 − BETA2 at least
OUTLIER, SETTLED = 4.0, 10  # after so many steps a hypergradient counts for at most so many times the usual one
FASTER, SLOWER, SLOWEST = 1.2, 0.7, 0.1
DOWN = 0.5  # of lr
RELAX, GROW = 0.1, 1.5  # of lr's ceiling; RELAX in steps of hyper_lr
LEAD, RECENT = 4.0, 2.0
UPHILL = 1.3  # so far above its mean lr is still climbing
FURTHEST = 7.0  # one climb, in steps of hyper_lr: a factor of 2 at 0.1
_STATE = ("m", "s", "count", "mean", "pace", "ceiling", "calm")


class OuterOptimizer:
    """Steps of φ [k], float64 on the CPU.

    Args:
        climbs: the numbers that are a learning rate, with φ its logarithm [k].
        hyper_lr: step size.
        led: the numbers whose φ is a logarithm of some kind; None: all.
    """

    def __init__(self, climbs: Sequence[bool], hyper_lr: float, led: Sequence[bool] | None = None):
        self.climbs, self.hyper_lr = torch.tensor(climbs), hyper_lr
        self.led = torch.ones_like(self.climbs) if led is None else torch.tensor(led)
        zero = torch.zeros(len(climbs), dtype=torch.float64)
        self.m, self.s, self.count, self.mean = zero, zero.clone(), zero.clone(), zero.clone()
        self.pace, self.ceiling, self.calm = torch.ones_like(zero), torch.full_like(zero, math.inf), zero.clone()

    def step(
        self, phi: Tensor, gradient: Tensor, moves: Tensor, too_high: Tensor, newton: Tensor | None = None
    ) -> Tensor:
        """φ after a step down `gradient` [k].

        Args:
            moves: the numbers that are tuned at present; the rest stay.
            too_high: numbers that step down by hyper_lr whatever their gradient says.
            newton: log c* of every learning rate [k], NaN where it is not known; None: of none.
        """
        moves = moves & torch.isfinite(gradient)
        agreed = self._follow(phi, gradient, moves)
        moves = moves & (self.s > 0)
        m = self.m / (1 - BETA1**self.count)
        down = torch.where(moves, m / self.s.sqrt().clamp_min(1e-300), 0) * self.hyper_lr * self.pace
        climb = -down if newton is None else torch.where(newton.isnan(), -down, self._within(newton))
        climb = torch.where((agreed < 0) | (gradient == 0), 0, climb)
        of_lr = torch.where(down < 0, -climb, DOWN * down)
        down = torch.where(self.climbs, of_lr, down)
        down, self.m = torch.where(too_high, self.hyper_lr, down), torch.where(too_high, 0, self.m)
        moved = self._held(phi, phi - down, moves & ~too_high)
        self.calm = torch.where(too_high, 0, self.calm + 1)
        self.ceiling = torch.where(too_high, moved, self.ceiling + RELAX * self.hyper_lr * GROW**self.calm)
        return moved

    def _within(self, newton: Tensor) -> Tensor:
        return newton.clamp(SLOWEST * self.hyper_lr, FURTHEST * self.hyper_lr)

    def _held(self, phi: Tensor, moved: Tensor, moves: Tensor) -> Tensor:
        """Numbers within LEAD of their mean, learning rates below their ceiling; one that is beyond already stays."""
        mean = self.mean.clamp_min(1e-300).log()
        highest = torch.where(self.climbs, self.ceiling, math.inf).minimum(mean + math.log(LEAD)).maximum(phi)
        lowest = (mean - math.log(LEAD)).minimum(phi)
        return torch.where(self.led & moves, moved.clamp(lowest, highest), moved)

    def _follow(self, phi: Tensor, g: Tensor, moves: Tensor) -> Tensor:
        """Take a hypergradient into the running means; whether it agrees with them: −1, 0 or 1 [k]."""
        g = torch.where(self.count > SETTLED, g.clamp(-OUTLIER * self.s.sqrt(), OUTLIER * self.s.sqrt()), g)
        agreed = torch.where(moves, (g * self.m).sign(), 0)
        factor = torch.where(agreed > 0, FASTER, torch.where(agreed < 0, SLOWER, 1.0))
        self.pace = (self.pace * factor).clamp(SLOWEST, 1.0)
        self.count = self.count + moves
        self.m = torch.where(moves, self.m.lerp(g, 1 - BETA1), self.m)
        weight = (1 / (1 + (self.count - 1) / MEMORY)).clamp(1 - BETA2, 1.0)
        self.s = torch.where(moves, self.s + weight * (g * g - self.s), self.s)
        now = torch.where(self.led, phi, 0).exp()
        share = (torch.where(self.climbs, 1.0, RECENT) / self.count.clamp_min(1)).clamp(max=1.0)
        self.mean = torch.where(moves, self.mean + (now - self.mean) * share, self.mean)
        return agreed

    def climbing(self, phi: Tensor) -> Tensor:
        """Learning rates that are well above their mean so far [k]."""
        return self.climbs & (self.count > 0) & (phi > self.mean.log() + math.log(UPHILL))

    def turn(self, mine: Tensor, factor: float) -> None:
        """These numbers were multiplied, and so is their mean. Forget where they were heading, not how large dL/dφ is."""
        self.m, self.mean = torch.where(mine, 0, self.m), torch.where(mine, factor * self.mean, self.mean)

    def cap(self, mine: Tensor, ceiling: Tensor) -> None:
        """The ceiling of these numbers, which rises from now on as after chaos."""
        self.ceiling, self.calm = torch.where(mine, ceiling, self.ceiling), torch.where(mine, 0, self.calm)

    def forget(self, j: int) -> None:
        """Number j starts anew."""
        fresh = {"pace": 1.0, "ceiling": math.inf}
        for name in _STATE:
            getattr(self, name)[j] = fresh.get(name, 0.0)

    def noise(self) -> Tensor:
        """Standard error of the running mean of hypergradients [k]; NaN before the first."""
        return torch.where(self.count > 0, self.s, math.nan).sqrt() * math.sqrt((1 - BETA1) / (1 + BETA1))

    def smoothed(self) -> Tensor:
        """The running mean of hypergradients dL/dφ [k]; NaN before the first."""
        return self.m / (1 - BETA1**self.count)

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name).clone() for name in _STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in _STATE:
            setattr(self, name, state[name].clone())
