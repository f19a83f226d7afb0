"""RAdam, as `torch.optim.RAdam` (arXiv 1908.03265).

    g̃  = ±g + w p                                   w weight decay; decoupled: g̃ = ±g
    m' = β₁ m + (1 − β₁) g̃        v' = β₂ v + (1 − β₂) g̃²        cᵢ = 1 − βᵢᵗ
    ρ∞ = 2/(1 − β₂) − 1           ρ = ρ∞ − 2 t β₂ᵗ/c₂
    ρ > 5:   D = √v' + ε    k = √c₂ √[(ρ − 4) (ρ − 2) ρ∞/((ρ∞ − 4) (ρ∞ − 2) ρ)]
    else:    D = 1          k = 1
    u  = (k/c₁) m'/D
    p' = p − η u                  decoupled: p' = (1 − η w) p − η u

Whether ρ > 5 is a matter of t and β₂ alone. At a β₂ where some step of the run crosses it the run is discontinuous in β₂;
the derivative is that of the side it is on. Where v' = 0, d√v' := 0, as in `adam.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from hypergrad.optimizers.rule import Scalars, Tensors
from hypergrad.optimizers.rules.moments import moment_tangents, moments


class _Forward(NamedTuple):
    g: Tensor  # g̃
    m: Tensor  # m'
    v: Tensor  # v'
    root: Tensor  # √v'
    den: Tensor | None  # D; None is 1


class _Scalars(NamedTuple):
    c1: float
    dc1: float  # dc₁/dβ₁ = −t β₁^(t−1)
    c2: float
    r: float | None  # k/√c₂; None where ρ ≤ 5
    k: float
    dk: float  # dk/dβ₂


# dc₂ = −t β₂^(t−1)    dρ∞ = 2/(1 − β₂)²    dρ = dρ∞ − 2 t² β₂^(t−1)/c₂²
# d log r = ½ [(1/(ρ − 4) + 1/(ρ − 2) − 1/ρ) dρ − (1/(ρ∞ − 4) + 1/(ρ∞ − 2) − 1/ρ∞) dρ∞]    dk = k (d log r + dc₂/(2 c₂))
def _scalars(h: Scalars) -> _Scalars:
    b1, b2, t = h["beta1"], h["beta2"], h["t"]
    c1, dc1, c2, dc2 = 1 - b1**t, -t * b1 ** (t - 1), 1 - b2**t, -t * b2 ** (t - 1)
    limit = 2 / (1 - b2) - 1
    rho = limit - 2 * t * (b2**t) / c2
    if not rho > 5.0:
        return _Scalars(c1, dc1, c2, None, 1.0, 0.0)
    r = ((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho)) ** 0.5
    dlimit = 2 / (1 - b2) ** 2
    drho = dlimit - 2 * t**2 * b2 ** (t - 1) / c2**2
    dlog = ((1 / (x - 4) + 1 / (x - 2) - 1 / x) * dx for x, dx in ((rho, drho), (limit, dlimit)))
    k = r * c2**0.5
    return _Scalars(c1, dc1, c2, r, k, k * ((next(dlog) - next(dlog)) / 2 + dc2 / (2 * c2)))


@dataclass(frozen=True)
class RAdam:
    decoupled: bool = False
    maximize: bool = False

    hyperparameters: ClassVar[tuple[str, ...]] = ("lr", "weight_decay", "beta1", "beta2", "eps")
    elementwise: ClassVar[bool] = True

    @property
    def slots(self) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    @property
    def second_moment_of_decay(self) -> str | None:
        return None if self.decoupled else "exp_avg_sq"

    @classmethod
    def from_group(cls, group: Mapping[str, Any], wrt: frozenset[str]) -> RAdam:
        return cls(bool(group["decoupled_weight_decay"]), bool(group["maximize"]))

    def _forward(self, p: Tensor, g: Tensor, s: Tensors, h: Scalars, rectified: bool) -> _Forward:
        g, m, v = moments(p, g, s, h, self.maximize, self.decoupled)
        root = v.sqrt()
        return _Forward(g, m, v, root, root + h["eps"] if rectified else None)

    def step(self, p: Tensor, g: Tensor, s: Tensors, h: Scalars) -> tuple[Tensor, Tensors]:
        x = _scalars(h)
        f = self._forward(p, g, s, h, x.r is not None)
        if self.decoupled:
            p = p * (1 - h["lr"] * h["weight_decay"])
        u = f.m / x.c1 * h["lr"]
        if f.den is not None and x.r is not None:
            u = u * (x.c2**0.5 / f.den) * x.r
        return torch.add(p, u, alpha=-1.0), {"exp_avg": f.m, "exp_avg_sq": f.v}

    # dg̃, dm', dv': see moments.py
    # q = m'/D    dD = dv'/(2 √v') + dε (0 where D = 1)    dq = (dm' − q dD)/D
    # du = (k/c₁) dq + (dk/c₁ − k dc₁/c₁²) q
    # dp' = dp − η du − dη u;  decoupled: (1 − η w) dp − η du − dη (u + w p) − η dw p
    def jvp(
        self, p: Tensor, g: Tensor, s: Tensors, h: Scalars, dp: Tensor, dg: Tensor, ds: Tensors, dh: Tensors
    ) -> tuple[Tensor, Tensors]:
        x, lr, wd = _scalars(h), h["lr"], h["weight_decay"]
        f = self._forward(p, g, s, h, x.r is not None)
        _, dm, dv = moment_tangents(p, f.g, s, h, dp, dg, ds, dh, self.maximize, self.decoupled)
        q, dq = f.m, dm
        if f.den is not None:
            dden = dv * torch.where(f.root > 0, 0.5 / f.root, 0)
            dden = dden + dh["eps"] if "eps" in dh else dden
            q = f.m / f.den
            dq = torch.addcmul(dm, q, dden, value=-1) / f.den
        out = torch.add(dp * (1 - lr * wd) if self.decoupled else dp, dq, alpha=-lr * x.k / x.c1)
        if "beta1" in dh:
            out.addcmul_(dh["beta1"], q, value=lr * x.k * x.dc1 / x.c1**2)
        if "beta2" in dh:
            out.addcmul_(dh["beta2"], q, value=-lr * x.dk / x.c1)
        if "lr" in dh:
            u = q * (x.k / x.c1)
            out.addcmul_(dh["lr"], torch.add(u, p, alpha=wd) if self.decoupled else u, value=-1)
        if self.decoupled and "weight_decay" in dh:
            out.addcmul_(dh["weight_decay"], p, value=-lr)
        return out, {"exp_avg": dm, "exp_avg_sq": dv}

    # The transpose, from the last line up:
    # λη = −λp' u    λβ₁ = λp' q η k dc₁/c₁²    λβ₂ = −λp' q η dk/c₁    λq = −η (k/c₁) λp'
    # λm' += λq/D    λD = −λq q/D    λε = λD    λv' += λD/(2 √v')      (D = 1: λm' += λq, and no more)
    # λm = β₁ λm'   λv = β₂ λv'   λβ₁ += λm' (m − g̃)   λβ₂ += λv' (v − g̃²)   λg̃ = (1 − β₁) λm' + 2 (1 − β₂) g̃ λv'
    # λp = λp' + w λg̃, λw = λg̃ p;  decoupled: λp = (1 − η w) λp', λw = −η p λp', λη −= w p λp'
    def vjp(
        self, p: Tensor, g: Tensor, s: Tensors, h: Scalars, lp: Tensor, ls: Tensors
    ) -> tuple[Tensor, Tensor, Tensors, Tensors]:
        x, lr, wd = _scalars(h), h["lr"], h["weight_decay"]
        f = self._forward(p, g, s, h, x.r is not None)
        q, lq, lv, lden = f.m, (-lr * x.k / x.c1) * lp, ls["exp_avg_sq"], torch.zeros_like(p)
        if f.den is not None:
            q, lq = f.m / f.den, lq / f.den
            lden = -lq * q
            lv = torch.addcmul(lv, lden, torch.where(f.root > 0, 0.5 / f.root, 0))
        lm, lpq = ls["exp_avg"] + lq, lp * q
        lg = torch.addcmul((1 - h["beta1"]) * lm, f.g, lv, value=2 * (1 - h["beta2"]))
        square = torch.addcmul(s["exp_avg_sq"], f.g, f.g, value=-1)
        lh = {
            "lr": lpq * (-x.k / x.c1),
            "eps": lden,
            "beta1": torch.addcmul(lpq * (lr * x.k * x.dc1 / x.c1**2), lm, s["exp_avg"] - f.g),
            "beta2": torch.addcmul(lpq * (-lr * x.dk / x.c1), lv, square),
            "weight_decay": (-lr * p) * lp if self.decoupled else lg * p,
        }
        if self.decoupled:
            lh["lr"] = torch.addcmul(lh["lr"], p, lp, value=-wd)
        out_p = lp * (1 - lr * wd) if self.decoupled else torch.add(lp, lg, alpha=wd)
        out = {"exp_avg": h["beta1"] * lm, "exp_avg_sq": h["beta2"] * lv}
        return out_p, -lg if self.maximize else lg, out, lh
