"""A hypergradient counts for at most a few times the usual one.

    g ← min(max(g, −most √s), most √s)        once the number has taken more than `after` steps

with s Adam's second moment before this step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hypergrad.online.policies.policy import HyperContext, Policy, Proposal, State


@dataclass(frozen=True)
class ClipOutliers(Policy):
    """One wild hypergradient neither throws a number off nor fills Adam's second moment for the next hundred."""

    most: float = 4.0
    after: int = 10

    def condition(self, c: HyperContext, p: Proposal, state: State, moments: State) -> Proposal:
        g, usual = p.gradient, moments["s"].sqrt()
        clipped = g.clamp(-self.most * usual, self.most * usual)
        return p.but(gradient=torch.where(moments["count"] > self.after, clipped, g))
