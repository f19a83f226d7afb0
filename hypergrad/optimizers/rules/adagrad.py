"""Adagrad, as `torch.optim.Adagrad` (Duchi et al. 2011).

    g̃  = ±g + w p                        w weight decay
    v' = v + g̃²                          before the first step v = ν, initial_accumulator_value
    D  = √v' + ε      u = g̃/D
    a  = η/c          c = 1 + (t − 1) δ  δ lr_decay
    p' = p − a u

Where v' = 0, d√v' := 0, as in `adam.py`. torch reads ν from its constructor's arguments alone, one number for all groups; the
derivative is that in a ν of each group, and 0 where the trajectory does not begin with the first step.
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
    v: Tensor  # v'
    root: Tensor  # √v'
    den: Tensor  # D
    c: float


@dataclass(frozen=True)
class Adagrad:
    initial: float = 0.0  # ν
    maximize: bool = False

    hyperparameters: ClassVar[tuple[str, ...]] = ("lr", "weight_decay", "lr_decay", "eps", "initial_accumulator_value")
    elementwise: ClassVar[bool] = True

    @property
    def slots(self) -> tuple[str, ...]:
        return ("sum",)

    @property
    def second_moment_of_decay(self) -> str | None:
        return "sum"

    @property
    def first(self) -> dict[str, float]:
        return {"sum": self.initial}

    @classmethod
    def from_group(cls, group: Mapping[str, Any], wrt: frozenset[str]) -> Adagrad:
        return cls(float(group["defaults"]["initial_accumulator_value"]), bool(group["maximize"]))

    def _forward(self, p: Tensor, g: Tensor, s: Tensors, h: Scalars) -> _Forward:
        g = torch.add(-g if self.maximize else g, p, alpha=h["weight_decay"])
        v = torch.addcmul(s["sum"], g, g)
        root = v.sqrt()
        return _Forward(g, v, root, root + h["eps"], 1 + (h["t"] - 1) * h["lr_decay"])

    def step(self, p: Tensor, g: Tensor, s: Tensors, h: Scalars) -> tuple[Tensor, Tensors]:
        f = self._forward(p, g, s, h)
        return torch.addcdiv(p, f.g, f.den, value=-h["lr"] / f.c), {"sum": f.v}

    # dg̃ = ±dg + w dp + dw p
    # dv' = dv + 2 g̃ dg̃, at the first step + dν      dD = dv'/(2 √v') + dε      du = (dg̃ − u dD)/D
    # dp' = dp − (η/c) du − (dη/c − η (t − 1) dδ/c²) u
    def jvp(
        self, p: Tensor, g: Tensor, s: Tensors, h: Scalars, dp: Tensor, dg: Tensor, ds: Tensors, dh: Tensors
    ) -> tuple[Tensor, Tensors]:
        f = self._forward(p, g, s, h)
        dg = torch.add(-dg if self.maximize else dg, dp, alpha=h["weight_decay"])
        if "weight_decay" in dh:
            dg.addcmul_(dh["weight_decay"], p)
        dv = torch.addcmul(ds["sum"], f.g, dg, value=2)
        if "initial_accumulator_value" in dh and h["t"] == 1:
            dv += dh["initial_accumulator_value"]
        dden = dv * torch.where(f.root > 0, 0.5 / f.root, 0)
        if "eps" in dh:
            dden += dh["eps"]
        u = f.g / f.den
        du = torch.addcmul(dg, u, dden, value=-1) / f.den
        dp = torch.add(dp, du, alpha=-h["lr"] / f.c)
        if "lr" in dh:
            dp.addcmul_(dh["lr"], u, value=-1 / f.c)
        if "lr_decay" in dh:
            dp.addcmul_(dh["lr_decay"], u, value=h["lr"] * (h["t"] - 1) / f.c**2)
        return dp, {"sum": dv}

    # The transpose, from the last line up:
    # λη = −λp' u/c    λδ = λp' u η (t − 1)/c²    λu = −(η/c) λp'    λg̃ = λu/D    λD = −λg̃ u    λε = λD
    # λv' += λD/(2 √v')    λv = λv'    λν = λv' at the first step, else 0    λg̃ += 2 g̃ λv'
    # λp = λp' + w λg̃    λw = λg̃ p    λg = ±λg̃
    def vjp(
        self, p: Tensor, g: Tensor, s: Tensors, h: Scalars, lp: Tensor, ls: Tensors
    ) -> tuple[Tensor, Tensor, Tensors, Tensors]:
        f = self._forward(p, g, s, h)
        u = f.g / f.den
        lg = (-h["lr"] / f.c) * lp / f.den
        lden = -lg * u
        lv = torch.addcmul(ls["sum"], lden, torch.where(f.root > 0, 0.5 / f.root, 0))
        lg = lg.addcmul_(f.g, lv, value=2)
        lh = {
            "lr": lp * u / -f.c,
            "lr_decay": lp * u * (h["lr"] * (h["t"] - 1) / f.c**2),
            "eps": lden,
            "initial_accumulator_value": lv if h["t"] == 1 else torch.zeros_like(lv),
            "weight_decay": lg * p,
        }
        return torch.add(lp, lg, alpha=h["weight_decay"]), -lg if self.maximize else lg, {"sum": lv}, lh
