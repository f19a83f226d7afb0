"""How far the tuned numbers move: Adam on φ, paced by what the hypergradients agree on.

Each number has a pace: it rises by FASTER where a hypergradient agrees in sign with their running mean, falls by SLOWER where
it does not. Noise slows a number down, so it settles; a clear signal speeds it up.

The learning rate climbs more readily than it descends, because its hypergradient is biased one way: over a horizon shorter than
the run a smaller lr always looks better than it is (Wu et al. 2018, arXiv 1803.02021). So lr goes up at its full pace, down at
DOWN times it and never accelerated; it stops climbing as soon as one hypergradient says otherwise; and as a hypergradient speaks
of the steps that it has seen, lr climbs to no more than LEAD times its mean so far.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

BETA1, BETA2 = 0.8, 0.99  # of Adam on φ
OUTLIER, SETTLED = 4.0, 10  # after so many steps a hypergradient counts for at most so many times the usual one
FASTER, SLOWER = 1.2, 0.7
SLOWEST, FASTEST = 0.1, 5.0
DOWN, LEAD = 0.5, 4.0  # of lr


class Descent:
    """Steps of φ [k], float64 on the CPU.

    Args:
        climbs: the numbers that are a learning rate, with φ its logarithm [k].
        hyper_lr: step size.
    """

    def __init__(self, climbs: Sequence[bool], hyper_lr: float):
        self.climbs, self.hyper_lr = torch.tensor(climbs), hyper_lr
        zero = torch.zeros(len(climbs), dtype=torch.float64)
        self.m, self.s, self.count, self.mean = zero, zero.clone(), zero.clone(), zero.clone()
        self.pace = torch.ones_like(zero)

    def step(self, phi: Tensor, gradient: Tensor, moves: Tensor, too_high: Tensor) -> Tensor:
        """φ after a step down `gradient` [k].

        Args:
            moves: the numbers that are tuned at present; the rest stay.
            too_high: numbers that step down by hyper_lr whatever their gradient says.
        """
        moves = moves & torch.isfinite(gradient)
        agreed = self._follow(phi, gradient, moves)
        moves = moves & (self.s > 0)
        m, s = self.m / (1 - BETA1**self.count), self.s / (1 - BETA2**self.count)
        down = torch.where(moves, m / s.sqrt().clamp_min(1e-300), 0)
        descent = torch.where(self.climbs, DOWN, 1.0) * self.pace.clamp(max=1)
        climb = torch.where(agreed < 0, 0, self.pace)
        down = down * torch.where(self.climbs & (down < 0), climb, descent)
        down, self.m = torch.where(too_high, 1.0, down), torch.where(too_high, 0, self.m)
        moved = phi - self.hyper_lr * down
        highest = torch.maximum(phi, self.mean.clamp_min(1e-300).log() + math.log(LEAD))
        return torch.where(self.climbs & moves, torch.minimum(moved, highest), moved)

    def _follow(self, phi: Tensor, g: Tensor, moves: Tensor) -> Tensor:
        """Take a hypergradient into the running means; whether it agrees with them: −1, 0 or 1 [k]."""
        rms = (self.s / (1 - BETA2**self.count)).sqrt()  # NaN before the first step: no bound
        g = torch.where(self.count > SETTLED, g.clamp(-OUTLIER * rms, OUTLIER * rms), g)
        agreed = torch.where(moves, (g * self.m).sign(), 0)
        factor = torch.where(agreed > 0, FASTER, torch.where(agreed < 0, SLOWER, 1.0))
        self.pace = (self.pace * factor).clamp(SLOWEST, FASTEST)
        self.count = self.count + moves
        self.m = torch.where(moves, self.m.lerp(g, 1 - BETA1), self.m)
        self.s = torch.where(moves, self.s.lerp(g * g, 1 - BETA2), self.s)
        now = phi.exp()
        self.mean = torch.where(moves & self.climbs, self.mean + (now - self.mean) / self.count.clamp_min(1), self.mean)
        return agreed

    def turn(self, mine: Tensor) -> None:
        """Forget where these numbers were heading; not how large their hypergradients are."""
        self.m = torch.where(mine, 0, self.m)

    def forget(self, j: int) -> None:
        """Number j starts anew."""
        for x, value in ((self.m, 0), (self.s, 0), (self.count, 0), (self.mean, 0), (self.pace, 1)):
            x[j] = value

    def noise(self) -> Tensor:
        """Standard error of the running mean of hypergradients [k]; NaN before the first."""
        return (self.s / (1 - BETA2**self.count)).sqrt() * math.sqrt((1 - BETA1) / (1 + BETA1))

    def smoothed(self) -> Tensor:
        """The running mean of hypergradients dL/dφ [k]; NaN before the first."""
        return self.m / (1 - BETA1**self.count)

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name).clone() for name in ("m", "s", "count", "mean", "pace")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in ("m", "s", "count", "mean", "pace"):
            setattr(self, name, state[name].clone())
