"""Where the tangent of lr or momentum outgrew the weights, training is chaotic there: down, and a ceiling for a while.

A tangent larger than the weights is no signal (see tangents.py). The number steps down by hyper_lr whatever its hypergradient
says and whatever its mean; where a learning rate then is becomes its ceiling. The ceiling gives way ever faster while tangents
stay small, since early chaos often passes as training goes on:

    ceiling ← φ                                          after a step in chaos
    ceiling ← ceiling + relax · hyper_lr · growⁿ          n steps after it

(Where momentum is tuned it moves at a fixed lr/(1 − m), and takes lr with it past this limit.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hypergrad.online.policies.policy import HyperContext, Policy, Proposal, State


@dataclass(frozen=True)
class ChaosCeiling(Policy):
    """What is done where a hypergradient is noise because training itself is unstable."""

    relax: float = 0.1
    grow: float = 1.5

    def init(self, k: int) -> State:
        ceiling = torch.full((k,), math.inf, dtype=torch.float64)
        return {"ceiling": ceiling, "calm": torch.zeros(k, dtype=torch.float64)}

    def condition(self, c: HyperContext, p: Proposal, state: State, moments: State) -> Proposal:
        return p.but(chaotic=p.moves & c.outgrown)

    def limit(self, c: HyperContext, p: Proposal, state: State) -> tuple[Proposal, State]:
        highest = state["ceiling"].maximum(c.phi)
        phi = torch.where(c.is_lr & p.moves & ~p.chaotic, p.phi.minimum(highest), p.phi)
        phi = torch.where(p.chaotic, c.phi - c.hyper_lr, phi)
        calm = torch.where(p.chaotic, 0, state["calm"] + 1)
        risen = state["ceiling"] + self.relax * c.hyper_lr * self.grow**calm
        return p.but(phi=phi), {"ceiling": torch.where(p.chaotic, phi, risen), "calm": calm}

    def capped(self, mine: Tensor, ceiling: Tensor, state: State) -> State:
        """A ceiling for the numbers `mine` [k] for another reason; it rises from now on as after chaos."""
        return {"ceiling": torch.where(mine, ceiling, state["ceiling"]), "calm": torch.where(mine, 0, state["calm"])}
