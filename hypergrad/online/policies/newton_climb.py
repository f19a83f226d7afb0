"""lr climbs by Newton's step, from slopes and curvatures that training has in hand.

With z = dθ/dlog lr, which forward mode carries, every training step's batch gives slope a = gᵀz and curvature b = zᵀHz of its
loss along z before it is used for training. Made c times as large, the displacement z would change that loss by

    a (c − 1) + b (c − 1)²/2                        least at c* = 1 − a/b

a and b are summed over the steps from one hypergradient to the next. Where the hypergradient says up, and agrees with the last
ones, lr climbs by the factor c*, by `slowest` at least and `furthest` at most, in steps of hyper_lr. With several learning
rates z_i is of the i-th, a_i = gᵀz_i, B_ij = z_iᵀHz_j, and b_i = B_ii + Σ_{j≠i} |B_ij|, a bound from above on what all of them
change together (lr_curvature.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hypergrad.online.policies.policy import HyperContext, Policy, Proposal, State


@dataclass(frozen=True)
class NewtonClimb(Policy):
    """How far up is known better than by a rule of thumb. furthest 7: a factor of 2 at hyper_lr 0.1."""

    slowest: float = 0.1
    furthest: float = 7.0

    def propose(self, c: HyperContext, p: Proposal, state: State) -> tuple[Proposal, State]:
        within = c.newton.clamp(self.slowest * c.hyper_lr, self.furthest * c.hyper_lr)
        climb = torch.where(c.newton.isnan(), -p.down, within)
        climb = torch.where((p.agreed < 0) | (p.gradient == 0), 0, climb)
        return p.but(down=torch.where(c.is_lr & (p.down < 0), -climb, p.down)), state
