"""Adam and AdamW, as `torch.optim.Adam` and `torch.optim.AdamW` (arXiv 1412.6980, 1711.05101, 1904.09237).

    g̃  = ±g + w p                                   w weight decay; AdamW: g̃ = ±g
    m' = β₁ m + (1 − β₁) g̃        v' = β₂ v + (1 − β₂) g̃²
    x  = v',  or with amsgrad  x = max(x_old, v')
    D  = √x / √c₂ + ε             cᵢ = 1 − βᵢᵗ
    p' = p − (η/c₁) m'/D          AdamW: p' = (1 − η w) p − (η/c₁) m'/D

Where x = 0 the root has no derivative; there d√x := 0. The gradients that led to x = 0 were exactly 0 (a dead ReLU, an
unused embedding row), so m' = 0 too and the term vanishes whatever the root's derivative is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from hypergrad.optimizers.rule import Scalars, Shares, Tensors, inner
from hypergrad.optimizers.rules.moments import moment_tangents, moments


class _Forward(NamedTuple):
    g: Tensor  # g̃
    m: Tensor  # m'
    v: Tensor  # v'
    x: Tensor
    root: Tensor  # √x
    den: Tensor  # D
    c1: float
    c2: float
    dc1: float  # dc₁/dβ₁ = −t β₁^(t−1)
    dc2: float


@dataclass(frozen=True)
class Adam:
    decoupled: bool = False  # AdamW
    amsgrad: bool = False
    maximize: bool = False

    hyperparameters: ClassVar[tuple[str, ...]] = ("lr", "weight_decay", "beta1", "beta2", "eps")
    elementwise: ClassVar[bool] = True

    @property
    def slots(self) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq") + (("max_exp_avg_sq",) if self.amsgrad else ())

    @property
    def second_moment_of_decay(self) -> str | None:
        return None if self.decoupled else "exp_avg_sq"

    @classmethod
    def from_group(cls, group: Mapping[str, Any], wrt: frozenset[str]) -> Adam:
        return cls(bool(group["decoupled_weight_decay"]), bool(group["amsgrad"]), bool(group["maximize"]))

    def _forward(self, p: Tensor, g: Tensor, s: Tensors, h: Scalars) -> _Forward:
        b1, b2, t = h["beta1"], h["beta2"], h["t"]
        g, m, v = moments(p, g, s, h, self.maximize, self.decoupled)
        x = torch.maximum(s["max_exp_avg_sq"], v) if self.amsgrad else v
        c1, c2 = 1 - b1**t, 1 - b2**t
        root = x.sqrt()
        den = (root / c2**0.5).add_(h["eps"])
        return _Forward(g, m, v, x, root, den, c1, c2, -t * b1 ** (t - 1), -t * b2 ** (t - 1))

    def _slots(self, m: Tensor, v: Tensor, x: Tensor) -> Tensors:
        return {"exp_avg": m, "exp_avg_sq": v} | ({"max_exp_avg_sq": x} if self.amsgrad else {})

    def step(self, p: Tensor, g: Tensor, s: Tensors, h: Scalars) -> tuple[Tensor, Tensors]:
        f = self._forward(p, g, s, h)
        if self.decoupled:
            p = p * (1 - h["lr"] * h["weight_decay"])
        return torch.addcdiv(p, f.m, f.den, value=-h["lr"] / f.c1), self._slots(f.m, f.v, f.x)

    # dg̃, dm', dv': see moments.py
    # dx = dv', amsgrad: dv' where v' > x_old, else dx_old
    # dD = dx / (2 √x √c₂) + dε − √x dc₂ / (2 c₂ √c₂)
    # dp' = dp − (η/c₁) (dm' − m' dD/D)/D − (dη/c₁ − η dc₁/c₁²) m'/D;  AdamW: dp (1 − η w) − (w dη + η dw) p
    def jvp(
        self, p: Tensor, g: Tensor, s: Tensors, h: Scalars, dp: Tensor, dg: Tensor, ds: Tensors, dh: Tensors
    ) -> tuple[Tensor, Tensors]:
        f, lr, wd = self._forward(p, g, s, h), h["lr"], h["weight_decay"]
        _, dm, dv = moment_tangents(p, f.g, s, h, dp, dg, ds, dh, self.maximize, self.decoupled)
        dx = torch.where(f.v > s["max_exp_avg_sq"], dv, ds["max_exp_avg_sq"]) if self.amsgrad else dv
        droot = torch.where(f.root > 0, 0.5 / f.root, 0)
        dden = dx * (droot / f.c2**0.5)
        if "eps" in dh:
            dden += dh["eps"]
        if "beta2" in dh:
            dden.addcmul_(dh["beta2"], f.root, value=-f.dc2 / (2 * f.c2**1.5))
        u = f.m / f.den
        du = torch.addcmul(dm, u, dden, value=-1) / f.den
        out = torch.add(dp * (1 - lr * wd) if self.decoupled else dp, du, alpha=-lr / f.c1)
        if "beta1" in dh:
            out.addcmul_(dh["beta1"], u, value=lr * f.dc1 / f.c1**2)
        if "lr" in dh:
            out.addcmul_(dh["lr"], torch.add(u / f.c1, p, alpha=wd) if self.decoupled else u / f.c1, value=-1)
        if self.decoupled and "weight_decay" in dh:
            out.addcmul_(dh["weight_decay"], p, value=-lr)
        return out, self._slots(dm, dv, dx)

    # With u = m'/D and a = η/c₁, the transpose from the last line up:
    # λu = −a λp'    λm' += λu/D    λD = −λu u/D    λη = −λp' u/c₁    λβ₁ = λp' u η dc₁/c₁²
    # λε = λD    λx += λD / (2 √x √c₂)    λβ₂ = −λD √x dc₂ / (2 c₂ √c₂)
    # λv' += λx, amsgrad: where v' > x_old, else λx_old = λx
    # λm = β₁ λm'   λv = β₂ λv'   λβ₁ += λm' (m − g̃)   λβ₂ += λv' (v − g̃²)   λg̃ = (1 − β₁) λm' + 2 (1 − β₂) g̃ λv'
    # λp = λp' + w λg̃, λw = λg̃ p;  AdamW: λp = (1 − η w) λp', λw = −η p λp', λη −= w p λp'
    def vjp(
        self, p: Tensor, g: Tensor, s: Tensors, h: Scalars, lp: Tensor, ls: Tensors
    ) -> tuple[Tensor, Tensor, Tensors, Shares]:
        f, lr, wd, b1, b2 = self._forward(p, g, s, h), h["lr"], h["weight_decay"], h["beta1"], h["beta2"]
        g, root, den, c1, dc1, root_c2, dc2 = f.g, f.root, f.den, f.c1, f.dc1, f.c2**0.5, f.dc2
        u, grown = f.m.div_(den), f.v > s["max_exp_avg_sq"] if self.amsgrad else None
        del f  # v'; a flat tensor that is freed early is memory for the rest
        lu = lp * (-lr / c1)
        lm = torch.addcdiv(ls["exp_avg"], lu, den)
        lden, lp_u = lu.mul_(u).div_(den).neg_(), inner(lp, u)
        lden_sum, lden_root = lden.sum(), inner(lden, root)
        del u, lu, den
        lx = lden.div_(root).masked_fill_(~(root > 0), 0).mul_(0.5 / root_c2)
        del lden, root
        out: Tensors = {}
        if grown is not None:
            lx.add_(ls["max_exp_avg_sq"])
            out["max_exp_avg_sq"] = lx.masked_fill(grown, 0)
            lx.masked_fill_(~grown, 0)
        lv = lx.add_(ls["exp_avg_sq"])
        out |= {"exp_avg": lm * b1, "exp_avg_sq": lv * b2}
        lg = (lm * (1 - b1)).addcmul_(g, lv, value=2 * (1 - b2))
        lh: dict[str, Callable[[], Tensor]] = {
            "lr": lambda: lp_u / -c1 - (wd * inner(lp, p) if self.decoupled else 0),
            "eps": lambda: lden_sum,
            "beta1": lambda: lp_u * (lr * dc1 / c1**2) + inner(lm, s["exp_avg"] - g),
            "beta2": lambda: (
                lden_root * (-dc2 / (2 * root_c2**3)) + inner(lv, torch.addcmul(s["exp_avg_sq"], g, g, value=-1))
            ),
            "weight_decay": lambda: inner(lp, p) * -lr if self.decoupled else inner(lg, p),
        }
        out_p = lp * (1 - lr * wd) if self.decoupled else torch.add(lp, lg, alpha=wd)
        return out_p, -lg if self.maximize else lg, out, lh
