r"""Adam on φ, whose second moment forgets the first hypergradients.

    m ← m + (1 − β₁)(g − m)        s ← s + w (g² − s),   w = max(1/(1 + (n − 1)/memory), 1 − β₂)        down = hyper_lr · m̂/√s

with m̂ = m/(1 − β₁ⁿ) and n the hyperparameter steps in which the number moved. The second moment looks back over one part in
`memory` of the steps so far, and gives the newest a weight of 1 − β₂ at least: the first hypergradients, often the largest by
far, do not rule for long. (Kingma & Ba 2015, arXiv 1412.6980, with a weight of our own.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hypergrad.online.policies.policy import HyperContext, Policy, Proposal, State


@dataclass(frozen=True)
class AdamOnPhi(Policy):
    """The step that all others shape; it cannot be left out."""

    beta1: float = 0.8
    memory: float = 4.0
    beta2: float = 0.99

    def init(self, k: int) -> State:
        zero = torch.zeros(k, dtype=torch.float64)
        return {"m": zero, "s": zero.clone(), "count": zero.clone()}

    def propose(self, c: HyperContext, p: Proposal, state: State) -> tuple[Proposal, State]:
        moves = p.moves & torch.isfinite(p.gradient)
        g, m, s = p.gradient, state["m"], state["s"]
        agreed = torch.where(moves, (g * m).sign(), 0)
        count = state["count"] + moves
        m = torch.where(moves, m.lerp(g, 1 - self.beta1), m)
        weight = (1 / (1 + (count - 1) / self.memory)).clamp(1 - self.beta2, 1.0)
        s = torch.where(moves, s + weight * (g * g - s), s)
        moves = moves & (s > 0)
        unbiased = m / (1 - self.beta1**count)
        down = torch.where(moves, unbiased / s.sqrt().clamp_min(1e-300), 0) * c.hyper_lr
        state = {"m": torch.where(p.chaotic, 0, m), "s": s, "count": count}
        return p.but(moves=moves, agreed=agreed, down=down), state

    def rescaled(self, mine: Tensor, factor: float, state: State) -> State:
        """Where the number was heading is forgotten, how large dL/dφ is stays."""
        return state | {"m": torch.where(mine, 0, state["m"])}

    def smoothed(self, state: State) -> Tensor:
        """The running mean of hypergradients dL/dφ [k]; NaN before the first."""
        return state["m"] / (1 - self.beta1 ** state["count"])

    def noise(self, state: State) -> Tensor:
        """Standard error of that mean [k]; NaN before the first."""
        of_one = torch.where(state["count"] > 0, state["s"], math.nan).sqrt()
        return of_one * math.sqrt((1 - self.beta1) / (1 + self.beta1))
