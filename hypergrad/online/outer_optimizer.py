"""A hyperparameter step: the hypergradient through the list of policies, in four passes (see policies/policy.py).

condition, propose      φ' = φ − down
limit, then the bounds of each number, then couple
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hypergrad.core.float64 import on_host
from hypergrad.online.hyper_vector import HyperVector
from hypergrad.online.policies.adam_on_phi import AdamOnPhi
from hypergrad.online.policies.chaos_ceiling import ChaosCeiling
from hypergrad.online.policies.mean_trust_region import MeanTrustRegion
from hypergrad.online.policies.policy import HyperContext, Policy, Proposal, State, find

_SAFE_DOWN = frozenset({"lr", "momentum"})  # names of which less is safe where training is chaotic


class OuterOptimizer:
    """Moves φ, and keeps what each policy remembers under its name.

    Args:
        policies: the list, with `AdamOnPhi` in it (`policies.check`).
        hyper_lr: the user's step size on φ.
    """

    def __init__(self, vector: HyperVector, policies: Sequence[Policy], hyper_lr: float):
        self.vector, self.policies, self.hyper_lr = vector, tuple(policies), hyper_lr
        (self.adam,) = (policy for policy in policies if isinstance(policy, AdamOnPhi))
        self.state: dict[str, State] = {p.name: p.init(len(vector)) for p in self.policies}
        self._safe_down = torch.tensor([entry.name in _SAFE_DOWN for entry in vector.entries])

    def step(self, gradient: Tensor, outgrown: Tensor, newton: Tensor) -> None:
        """One step down `gradient` [k] (dL/dφ), of the numbers that are tuned at present.

        Args:
            outgrown: [k], numbers whose tangent outgrew the weights.
            newton: log c* of every learning rate [k], NaN where it is not known.
        """
        c = self._context(outgrown & self._safe_down, newton)
        none = torch.zeros_like(c.tuned)
        zero = torch.zeros_like(c.phi)
        p = Proposal(on_host(gradient).clone(), c.tuned, none, zero, zero, c.phi)
        moments = self.state[self.adam.name]
        for policy in self.policies:
            p = policy.condition(c, p, self.state[policy.name], moments)
        for policy in self.policies:
            p, self.state[policy.name] = policy.propose(c, p, self.state[policy.name])
        p = p.but(phi=c.phi - p.down)
        for policy in self.policies:
            p, self.state[policy.name] = policy.limit(c, p, self.state[policy.name])
        p = p.but(phi=p.phi.clamp(c.low, c.high))
        for policy in self.policies:
            p = policy.couple(c, p)
        self.vector.apply(p.phi)

    def _context(self, outgrown: Tensor, newton: Tensor) -> HyperContext:
        v = self.vector
        tuned = v.tuned_mask()
        decay, momentum = v.pairs("lr", "weight_decay", tuned), v.pairs("lr", "momentum", tuned)
        return HyperContext(
            v.phi, v.value, v.low, v.high, tuned, torch.tensor(v.given), v.is_lr, v.scaled, outgrown, newton, decay, momentum,
            self.hyper_lr,
        )  # fmt: skip

    # ---- what else moves φ

    def multiply(self, name: str, factor: float, optimizer: int | None = None) -> bool:
        """Multiply the values of one positive hyperparameter (of one optimizer). False if it is not tuned."""
        mine = self.vector.called(name, optimizer)
        self.vector.apply(self.vector.multiplied(mine, factor))
        self.state = {p.name: p.rescaled(mine, factor, self.state[p.name]) for p in self.policies}
        return bool(mine.any())

    def cap(self, name: str, factor: float) -> None:
        """A ceiling for the numbers of this name, `factor` times what they are, which rises as after chaos."""
        policy, mine = find(self.policies, ChaosCeiling), self.vector.called(name)
        if policy is not None:
            ceiling = self.vector.phi + math.log(factor)
            self.state[policy.name] = policy.capped(mine, ceiling, self.state[policy.name])

    def restart(self, j: int) -> None:
        """Number j begins anew: what was remembered of it is forgotten."""
        for policy in self.policies:
            self.state[policy.name] = policy.restarted(j, self.state[policy.name])

    # ---- what is read of it

    @property
    def names(self) -> list[str]:
        """Of the policies, in their order."""
        return [policy.name for policy in self.policies]

    def climbing(self) -> bool:
        """Whether a learning rate that is tuned at present is on its way up (see MeanTrustRegion.climbing)."""
        policy = find(self.policies, MeanTrustRegion)
        if policy is None:
            return False
        up = policy.climbing(self.vector.is_lr, self.vector.phi, self.state[policy.name])
        return any(bool(up[j]) for j in self.vector.moving)

    def smoothed(self) -> Tensor:
        """The running mean of hypergradients dL/dφ [k]; NaN before the first."""
        return self.adam.smoothed(self.state[self.adam.name])

    def noise(self) -> Tensor:
        """Standard error of that mean [k]; NaN before the first."""
        return self.adam.noise(self.state[self.adam.name])

    def state_dict(self) -> dict[str, Any]:
        return {name: {key: x.clone() for key, x in state.items()} for name, state in self.state.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.state = {name: {key: state[name][key].clone() for key in mine} for name, mine in self.state.items()}
