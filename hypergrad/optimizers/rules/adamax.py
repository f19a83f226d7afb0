"""Adamax, as `torch.optim.Adamax` (arXiv 1412.6980, section 7.1).

    g̃  = ±g + w p                                w weight decay
    m' = β₁ m + (1 − β₁) g̃
    u' = max(β₂ u, |g̃| + ε)
    p' = p − a r      r = m'/u'      a = η/c      c = 1 − β₁ᵗ

u' follows the larger of the two; where they tie the maximum has no derivative, and that of β₂ u is taken. d|g̃| := 0 where
g̃ = 0. A coordinate whose gradients were all exactly 0 has m' = 0, so there neither choice matters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from hypergrad.optimizers.rule import Scalars, Tensors


class _Forward(NamedTuple):
    g: Tensor  # g̃
    m: Tensor  # m'
    u: Tensor  # u'
    fresh: Tensor  # where u' = |g̃| + ε
    c: float
    dc: float  # dc/dβ₁ = −t β₁^(t−1)


@dataclass(frozen=True)
class Adamax:
    maximize: bool = False

    hyperparameters: ClassVar[tuple[str, ...]] = ("lr", "weight_decay", "beta1", "beta2", "eps")
    elementwise: ClassVar[bool] = True

    @property
    def slots(self) -> tuple[str, ...]:
        return ("exp_avg", "exp_inf")

    @property
    def second_moment_of_decay(self) -> str | None:
        return "exp_inf"  # its root, here

    @classmethod
    def from_group(cls, group: Mapping[str, Any], wrt: frozenset[str]) -> Adamax:
        return cls(bool(group["maximize"]))

    def _forward(self, p: Tensor, g: Tensor, s: Tensors, h: Scalars) -> _Forward:
        b1, t = h["beta1"], h["t"]
        g = torch.add(-g if self.maximize else g, p, alpha=h["weight_decay"])
        m = s["exp_avg"].lerp(g, 1 - b1)
        old, new = s["exp_inf"] * h["beta2"], g.abs().add_(h["eps"])
        return _Forward(g, m, torch.maximum(old, new), new > old, 1 - b1**t, -t * b1 ** (t - 1))

    def step(self, p: Tensor, g: Tensor, s: Tensors, h: Scalars) -> tuple[Tensor, Tensors]:
        f = self._forward(p, g, s, h)
        return torch.addcdiv(p, f.m, f.u, value=-(h["lr"] / f.c)), {"exp_avg": f.m, "exp_inf": f.u}

    # dg̃ = ±dg + w dp + dw p
    # dm' = β₁ dm + (1 − β₁) dg̃ + dβ₁ (m − g̃)
    # du' = sgn(g̃) dg̃ + dε where |g̃| + ε > β₂ u, else β₂ du + dβ₂ u
    # dp' = dp − (η/c) (dm' − r du')/u' − (dη/c − η dc/c²) r
    def jvp(
        self, p: Tensor, g: Tensor, s: Tensors, h: Scalars, dp: Tensor, dg: Tensor, ds: Tensors, dh: Tensors
    ) -> tuple[Tensor, Tensors]:
        f, lr = self._forward(p, g, s, h), h["lr"]
        dg = torch.add(-dg if self.maximize else dg, dp, alpha=h["weight_decay"])
        if "weight_decay" in dh:
            dg.addcmul_(dh["weight_decay"], p)
        dm = ds["exp_avg"].lerp(dg, 1 - h["beta1"])
        if "beta1" in dh:
            dm.addcmul_(dh["beta1"], s["exp_avg"] - f.g)
        new, old = dg * f.g.sign(), ds["exp_inf"] * h["beta2"]
        if "eps" in dh:
            new += dh["eps"]
        if "beta2" in dh:
            old.addcmul_(dh["beta2"], s["exp_inf"])
        du = torch.where(f.fresh, new, old)
        r = f.m / f.u
        dp = torch.add(dp, torch.addcmul(dm, r, du, value=-1) / f.u, alpha=-lr / f.c)
        if "lr" in dh:
            dp.addcmul_(dh["lr"], r, value=-1 / f.c)
        if "beta1" in dh:
            dp.addcmul_(dh["beta1"], r, value=lr * f.dc / f.c**2)
        return dp, {"exp_avg": dm, "exp_inf": du}

    # The transpose, from the last line up:
    # λη = −λp' r/c    λβ₁ = λp' r η dc/c²    λr = −(η/c) λp'    λm' += λr/u'    λu' −= λr r/u'
    # where |g̃| + ε > β₂ u: λg̃ = sgn(g̃) λu', λε = λu', else λu = β₂ λu', λβ₂ = λu' u
    # λm = β₁ λm'    λβ₁ += λm' (m − g̃)    λg̃ += (1 − β₁) λm'
    # λp = λp' + w λg̃    λw = λg̃ p    λg = ±λg̃
    def vjp(
        self, p: Tensor, g: Tensor, s: Tensors, h: Scalars, lp: Tensor, ls: Tensors
    ) -> tuple[Tensor, Tensor, Tensors, Tensors]:
        f, lr = self._forward(p, g, s, h), h["lr"]
        r = f.m / f.u
        lr_over_u = (-lr / f.c) * lp / f.u  # λr/u'
        lm = ls["exp_avg"] + lr_over_u
        lu = torch.addcmul(ls["exp_inf"], lr_over_u, r, value=-1)
        new, old = torch.where(f.fresh, lu, 0), torch.where(f.fresh, 0, lu)
        lg = torch.addcmul((1 - h["beta1"]) * lm, f.g.sign(), new)
        lh = {
            "lr": lp * r / -f.c,
            "beta1": torch.addcmul(lp * r * (lr * f.dc / f.c**2), lm, s["exp_avg"] - f.g),
            "beta2": old * s["exp_inf"],
            "eps": new,
            "weight_decay": lg * p,
        }
        out = {"exp_avg": h["beta1"] * lm, "exp_inf": h["beta2"] * old}
        return torch.add(lp, lg, alpha=h["weight_decay"]), -lg if self.maximize else lg, out, lh
