"""Momentum moves at a fixed lr/(1 − momentum), which is how far a gradient goes in the end.

Otherwise momentum falls and takes the effective step with it. With u = log lr − log(1 − m) held,

    dL/dlogit m at fixed u = g_m − m · g_lr        log lr ← log lr + softplus(logit m) − softplus(logit m')

as dlog(1 − m)/dlogit m = −m and −log(1 − m) = softplus(logit m). A step down that must be one (see ChaosCeiling) is of lr
itself, and so is a bound that lr stands at: such pairs are left alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.nn.functional import softplus

from hypergrad.online.policies.policy import HyperContext, Policy, Proposal, State


@dataclass(frozen=True)
class LrMomentumCoupling(Policy):
    """Tunes momentum at a fixed effective step."""

    def condition(self, c: HyperContext, p: Proposal, state: State, moments: State) -> Proposal:
        pairs = [(i, j) for i, j in c.lr_and_momentum if not (p.chaotic[i] or p.chaotic[j])]
        pairs = [(i, j) for i, j in pairs if c.low[i] < c.phi[i] < c.high[i]]
        gradient = p.gradient.clone()
        for i, j in pairs:
            gradient[j] -= c.value[j] * gradient[i]
        return p.but(gradient=gradient, moved_lr=tuple(pairs))

    def couple(self, c: HyperContext, p: Proposal) -> Proposal:
        phi = p.phi.clone()
        for i, j in p.moved_lr:
            phi[i] += softplus(c.phi[j]) - softplus(phi[j])
        return p.but(phi=phi)
