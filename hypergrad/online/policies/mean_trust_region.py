"""Every number keeps near its own mean so far.

A hypergradient speaks of the values that it has seen. Without a limit what holds for the past is acted on until it is far from
true: weight decay, whose effect comes late, swings from one end of its range to the other. So by its own steps a number keeps

    mean/lead ≤ x ≤ lead · mean        mean ← mean + (x − mean) · min(r/n, 1)

(of a number between 0 and 1: its odds), n its hyperparameter steps; r is 1 for a learning rate and `recent` for all else. With
r = 2 newer values weigh more, and x may rise as n⁶ rather than n³, which one that stood still in its first steps needs to come
to where it belongs. One that is beyond the limit already stays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hypergrad.online.policies.policy import HyperContext, Policy, Proposal, State


@dataclass(frozen=True)
class MeanTrustRegion(Policy):
    """A trust region around the values that the hypergradients are of. uphill: see `climbing`."""

    lead: float = 4.0
    recent: float = 2.0
    uphill: float = 1.3

    def init(self, k: int) -> State:
        return {"mean": torch.zeros(k, dtype=torch.float64), "count": torch.zeros(k, dtype=torch.float64)}

    def propose(self, c: HyperContext, p: Proposal, state: State) -> tuple[Proposal, State]:
        seen = c.tuned & torch.isfinite(p.gradient)
        count, now = state["count"] + seen, torch.where(c.scaled, c.phi, 0).exp()
        share = (torch.where(c.is_lr, 1.0, self.recent) / count.clamp_min(1)).clamp(max=1.0)
        mean = torch.where(seen, state["mean"] + (now - state["mean"]) * share, state["mean"])
        return p, {"mean": mean, "count": count}

    def limit(self, c: HyperContext, p: Proposal, state: State) -> tuple[Proposal, State]:
        mean = state["mean"].clamp_min(1e-300).log()
        highest = (mean + math.log(self.lead)).maximum(c.phi)
        lowest = (mean - math.log(self.lead)).minimum(c.phi)
        held = c.scaled & p.moves & ~p.chaotic
        return p.but(phi=torch.where(held, p.phi.clamp(lowest, highest), p.phi)), state

    def rescaled(self, mine: Tensor, factor: float, state: State) -> State:
        return state | {"mean": torch.where(mine, factor * state["mean"], state["mean"])}

    def climbing(self, is_lr: Tensor, phi: Tensor, state: State) -> Tensor:
        """Learning rates that are well above their mean so far, by the factor `uphill` [k]: they are still on their way up."""
        return is_lr & (state["count"] > 0) & (phi > state["mean"].log() + math.log(self.uphill))
