"""Tangents (nearly) without Hessian products: a matrix B of low rank stands in for the Hessian H between the few that are formed.

One product y = Hv, along one of the tangents in turn, in every GAP-th gradient; every one in the warm start. Each is taken into
B = Σ_i u_i u_iᵀ/c_i (a secant update of rank one, as in quasi-Newton methods), of which the last RANK are kept:

    vᵀBv < vᵀy    u = y − Bv, c = uᵀv > 0, B ← B + u uᵀ/c     then Bv = y
    vᵀBv ≥ vᵀy    B ← B · max(vᵀy/vᵀBv, ½)                    B claims too much curvature along v: then vᵀBv = vᵀy

c > 0 keeps B positive semi-definite, so that by itself it never makes a tangent grow as negative curvature would. Along what was
never measured B is 0 and a tangent is not contracted as H would; so it forgets, and the hypergradient is that of a horizon of
about 1/(1 − KEEP) steps:

    z' = KEEP · ((∂Φ/∂s) z + ∂Φ/∂φ),   H z := B z in ∂Φ/∂s
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hypergrad.online.lr_searches import LrSearches
from hypergrad.optimizers.transition import Tangent

GAP = 40  # gradients from product to product
EVERY = 20  # steps from validation to validation, unless the user says otherwise
RANK = 8  # of B, each a copy of the weights
KEEP = 0.98  # of a tangent, from step to step
FLAT = 1e-3  # c below so much |u| |v|: nothing new was measured


class LowRankHessian:
    """B, and when a product is due.

    Args:
        search: lr's warm start; while it is active every product is formed and nothing is forgotten: it
            wants slopes and curvatures as they are.
    """

    def __init__(self, search: LrSearches):
        self.search = search
        self.u: Tensor | None = None  # [RANK, n], the newest last
        self.c: Tensor | None = None  # [RANK], infinite where there is no u yet

    def due(self, gradients: int, k: int) -> list[int]:
        """The tangents, of k, whose product is formed in gradient number `gradients`."""
        if self.search.active:
            return list(range(k))
        return [gradients // GAP % k] if k and gradients % GAP == 0 else []

    def times(self, z: Tensor) -> Tensor:
        """B z, for the rows of z [k, n]."""
        return torch.zeros_like(z) if self.u is None or self.c is None else (z @ self.u.T / self.c) @ self.u

    def completed(self, z: Tensor, measured: Tensor | None, due: list[int], scale: float) -> Tensor:
        """Tangents of the gradient [k, n] along z: as `measured` in the rows that were due, B z in the rest.

        Args:
            scale: of a GradScaler, which is in `measured`.
        """
        if measured is not None:
            for j in due:
                self.learn(z[j], measured[j] / scale)
        dg = self.times(z) * scale
        if measured is not None:
            dg[due] = measured[due]
        return dg

    def learn(self, v: Tensor, y: Tensor) -> None:
        """Take y = Hv into B."""
        blank, nothing = v.new_zeros(1, len(v)), v.new_full((1,), math.inf)
        if self.u is None or self.c is None:
            self.u, self.c = blank.repeat(RANK, 1), nothing.repeat(RANK)
        self.u, self.c = torch.cat([blank, self.u[1:]]), torch.cat([nothing, self.c[1:]])  # the oldest goes
        bv = self.times(v[None])[0]
        u = y - bv
        c, true, claimed, size = u @ v, y @ v, bv @ v, u.norm() * v.norm()
        self.c = self.c / torch.where((claimed > 0) & (c <= 0), (true / claimed).clamp_min(0.5), 1.0)
        news = (c > FLAT * size) & (size < math.inf)  # False also where either is not finite
        self.u = torch.where(news, torch.cat([self.u[1:], u[None]]), self.u)
        self.c = torch.where(news, torch.cat([self.c[1:], c[None]]), self.c)

    def faded(self, z: Tangent) -> Tangent:
        if self.search.active:
            return z
        return Tangent(z.theta * KEEP, {name: x * KEEP for name, x in z.slots.items()})

    def state_dict(self) -> dict[str, Any]:
        return {"u": self.u, "c": self.c}

    def load_state_dict(self, state: dict[str, Any], like: Tensor) -> None:
        self.u, self.c = (None if state[name] is None else state[name].to(like) for name in ("u", "c"))
