"""lr · weight decay is kept while lr moves and weight decay waits to be tuned: the product is what decays the weights.

log wd ← log wd − (log lr' − log lr)        of a weight decay that is tuned in a later phase and whose start was not given
"""

from __future__ import annotations

from dataclasses import dataclass

from hypergrad.online.policies.policy import HyperContext, Policy, Proposal


@dataclass(frozen=True)
class LrDecayCoupling(Policy):
    """lr is tuned at a fixed decay of the weights."""

    def couple(self, c: HyperContext, p: Proposal) -> Proposal:
        phi = p.phi.clone()
        for i, j in c.lr_and_decay:
            if not c.tuned[j] and not c.given[j]:
                phi[j] -= phi[i] - c.phi[i]
        return p.but(phi=phi)
