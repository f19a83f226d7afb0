"""Numbers slow down where hypergradients disagree.

Each number has a pace in [slowest, 1]. It is multiplied by `faster` where a hypergradient agrees in sign with their running mean,
by `slower` where it does not: noise slows a number down, so it comes to rest.

    pace ← min(max(pace · (faster or slower), slowest), 1)        down ← pace · down

(As in Rprop: Riedmiller & Braun 1993.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hypergrad.online.policies.policy import HyperContext, Policy, Proposal, State


@dataclass(frozen=True)
class AgreementPace(Policy):
    """A step size for each number, by the signs of its hypergradients."""

    faster: float = 1.2
    slower: float = 0.7
    slowest: float = 0.1

    def init(self, k: int) -> State:
        return {"pace": torch.ones(k, dtype=torch.float64)}

    def propose(self, c: HyperContext, p: Proposal, state: State) -> tuple[Proposal, State]:
        factor = torch.where(p.agreed > 0, self.faster, torch.where(p.agreed < 0, self.slower, 1.0))
        pace = (state["pace"] * factor).clamp(self.slowest, 1.0)
        return p.but(down=p.down * pace), {"pace": pace}
