"""RMSprop, as `torch.optim.RMSprop` (Tieleman & Hinton 2012; centered: arXiv 1308.0850).

    g̃  = ±g + w p                        w weight decay
    v' = α v + (1 − α) g̃²               a' = α a + (1 − α) g̃   (centered)
    x  = v',  centered: v' − a'²          D = √x + ε             u = g̃/D
    b' = μ b + u                          (momentum μ)
    p' = p − η b',  without momentum p − η u

Where x = 0, d√x := 0, as in `adam.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from hypergrad.optimizers.rule import Scalars, Shares, Tensors, inner


class _Forward(NamedTuple):
    g: Tensor  # g̃
    slots: Tensors  # v', a', b'
    root: Tensor  # √x
    den: Tensor  # D


@dataclass(frozen=True)
class RMSprop:
    centered: bool = False
    buffered: bool = False  # keeps a momentum buffer
    maximize: bool = False

    hyperparameters: ClassVar[tuple[str, ...]] = ("lr", "weight_decay", "alpha", "eps", "momentum")
    elementwise: ClassVar[bool] = True

    @property
    def slots(self) -> tuple[str, ...]:
        extra = (("grad_avg",) if self.centered else ()) + (("momentum_buffer",) if self.buffered else ())
        return ("square_avg", *extra)

    @property
    def second_moment_of_decay(self) -> str | None:
        return "square_avg"

    @classmethod
    def from_group(cls, group: Mapping[str, Any], wrt: frozenset[str]) -> RMSprop:
        buffered = float(group["momentum"]) > 0 or "momentum" in wrt
        return cls(bool(group["centered"]), buffered, bool(group["maximize"]))

    def _forward(self, p: Tensor, g: Tensor, s: Tensors, h: Scalars) -> _Forward:
        alpha = h["alpha"]
        g = torch.add(-g if self.maximize else g, p, alpha=h["weight_decay"])
        v = s["square_avg"].mul(alpha).addcmul_(g, g, value=1 - alpha)
        slots = {"square_avg": v}
        root = v
        if self.centered:
            a = slots["grad_avg"] = s["grad_avg"].lerp(g, 1 - alpha)
            root = v.addcmul(a, a, value=-1)
        root = root.sqrt()
        den = root + h["eps"]
        if self.buffered:
            slots["momentum_buffer"] = s["momentum_buffer"].mul(h["momentum"]).addcdiv_(g, den)
        return _Forward(g, slots, root, den)

    def step(self, p: Tensor, g: Tensor, s: Tensors, h: Scalars) -> tuple[Tensor, Tensors]:
        f = self._forward(p, g, s, h)
        if self.buffered:
            return torch.add(p, f.slots["momentum_buffer"], alpha=-h["lr"]), f.slots
        return torch.addcdiv(p, f.g, f.den, value=-h["lr"]), f.slots

    # dg̃ = ±dg + w dp + dw p
    # dv' = α dv + 2 (1 − α) g̃ dg̃ + dα (v − g̃²)     da' = α da + (1 − α) dg̃ + dα (a − g̃)
    # dx = dv' (− 2 a' da')    dD = dx/(2 √x) + dε    du = (dg̃ − u dD)/D
    # db' = μ db + dμ b + du   dp' = dp − η db' − dη b'   (du, u without momentum)
    def jvp(
        self, p: Tensor, g: Tensor, s: Tensors, h: Scalars, dp: Tensor, dg: Tensor, ds: Tensors, dh: Tensors
    ) -> tuple[Tensor, Tensors]:
        f, alpha = self._forward(p, g, s, h), h["alpha"]
        dg = torch.add(-dg if self.maximize else dg, dp, alpha=h["weight_decay"])
        if "weight_decay" in dh:
            dg.addcmul_(dh["weight_decay"], p)
        dv = ds["square_avg"].mul(alpha).addcmul_(f.g, dg, value=2 * (1 - alpha))
        if "alpha" in dh:
            dv.addcmul_(dh["alpha"], s["square_avg"] - f.g * f.g)
        out, dx = {"square_avg": dv}, dv
        if self.centered:
            da = out["grad_avg"] = ds["grad_avg"].lerp(dg, 1 - alpha)
            if "alpha" in dh:
                da.addcmul_(dh["alpha"], s["grad_avg"] - f.g)
            dx = torch.addcmul(dv, f.slots["grad_avg"], da, value=-2)
        dden = dx * torch.where(f.root > 0, 0.5 / f.root, 0)
        if "eps" in dh:
            dden += dh["eps"]
        d = f.g / f.den
        dd = torch.addcmul(dg, d, dden, value=-1) / f.den
        if self.buffered:
            dd = dd.add_(ds["momentum_buffer"], alpha=h["momentum"])
            if "momentum" in dh:
                dd.addcmul_(dh["momentum"], s["momentum_buffer"])
            d, out["momentum_buffer"] = f.slots["momentum_buffer"], dd
        dp = torch.add(dp, dd, alpha=-h["lr"])
        if "lr" in dh:
            dp.addcmul_(dh["lr"], d, value=-1)
        return dp, out

    # The transpose, from the last line up:
    # λη = −λp' b'    λb' += −η λp'    λb = μ λb'    λμ = λb' b    λu = λb'      (λu = −η λp' without momentum)
    # λg̃ = λu/D    λD = −λu u/D    λε = λD    λx = λD/(2 √x)
    # λv' += λx    λa' −= 2 a' λx    λv = α λv'    λa = α λa'    λα = λv' (v − g̃²) + λa' (a − g̃)
    # λg̃ += 2 (1 − α) g̃ λv' + (1 − α) λa'    λp = λp' + w λg̃    λw = λg̃ p    λg = ±λg̃
    def vjp(
        self, p: Tensor, g: Tensor, s: Tensors, h: Scalars, lp: Tensor, ls: Tensors
    ) -> tuple[Tensor, Tensor, Tensors, Shares]:
        f, alpha = self._forward(p, g, s, h), h["alpha"]
        out: Tensors = {}
        u = f.g / f.den
        lu = lp * -h["lr"]
        if self.buffered:
            lu.add_(ls["momentum_buffer"])
            out["momentum_buffer"] = lu * h["momentum"]
        lg = lu / f.den
        lden = (lg * u).neg_()
        lx = (lden / f.root).masked_fill_(~(f.root > 0), 0).mul_(0.5)
        lv = ls["square_avg"] + lx
        lg.addcmul_(f.g, lv, value=2 * (1 - alpha))
        out["square_avg"] = lv * alpha
        la = lv  # read where centered
        if self.centered:
            la = torch.addcmul(ls["grad_avg"], f.slots["grad_avg"], lx, value=-2)
            lg.add_(la, alpha=1 - alpha)
            out["grad_avg"] = la * alpha
        lh: dict[str, Callable[[], Tensor]] = {
            "lr": lambda: -inner(lp, f.slots["momentum_buffer"] if self.buffered else u),
            "momentum": lambda: inner(lu, s["momentum_buffer"]) if self.buffered else lu.new_zeros(()),
            "eps": lambda: lden.sum(),
            "alpha": lambda: (
                inner(lv, torch.addcmul(s["square_avg"], f.g, f.g, value=-1))
                + (inner(la, s["grad_avg"] - f.g) if self.centered else 0)
            ),
            "weight_decay": lambda: inner(lg, p),
        }
        return torch.add(lp, lg, alpha=h["weight_decay"]), -lg if self.maximize else lg, out, lh
