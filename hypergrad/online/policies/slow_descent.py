"""lr descends more slowly than it climbs.

    down ← share · down        of a learning rate that goes down

Its hypergradient is biased one way: over a horizon shorter than the run a smaller lr always looks better than it is.
(Wu et al. 2018, arXiv 1803.02021.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hypergrad.online.policies.policy import HyperContext, Policy, Proposal, State


@dataclass(frozen=True)
class SlowDescent(Policy):
    """The answer to short-horizon bias."""

    share: float = 0.5

    def propose(self, c: HyperContext, p: Proposal, state: State) -> tuple[Proposal, State]:
        return p.but(down=torch.where(c.is_lr & ~(p.down < 0), self.share * p.down, p.down)), state
