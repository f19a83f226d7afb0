"""Adadelta, as `torch.optim.Adadelta` (arXiv 1212.5701).

    g̃  = ±g + w p                        w weight decay
    v' = ρ v + (1 − ρ) g̃²
    S  = √(v' + ε)    T = √(a + ε)    Δ = T g̃/S
    a' = ρ a + (1 − ρ) Δ²
    p' = p − η Δ

With ε = 0 the roots have no derivative at 0; there it is taken to be 0. ε is under both roots, so g̃ = v = a = 0 gives
Δ = g̃: no derivative in weight decay is ill-conditioned here.
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
    bottom: Tensor  # S
    top: Tensor  # T
    delta: Tensor  # Δ
    a: Tensor  # a'
    dbottom: Tensor  # 1/(2 S)
    dtop: Tensor  # 1/(2 T)


@dataclass(frozen=True)
class Adadelta:
    maximize: bool = False

    hyperparameters: ClassVar[tuple[str, ...]] = ("lr", "weight_decay", "rho", "eps")
    elementwise: ClassVar[bool] = True

    @property
    def slots(self) -> tuple[str, ...]:
        return ("square_avg", "acc_delta")

    @property
    def second_moment_of_decay(self) -> str | None:
        return None

    @classmethod
    def from_group(cls, group: Mapping[str, Any], wrt: frozenset[str]) -> Adadelta:
        return cls(bool(group["maximize"]))

    def _forward(self, p: Tensor, g: Tensor, s: Tensors, h: Scalars) -> _Forward:
        rho, eps = h["rho"], h["eps"]
        g = torch.add(-g if self.maximize else g, p, alpha=h["weight_decay"])
        v = s["square_avg"].mul(rho).addcmul_(g, g, value=1 - rho)
        bottom, top = v.add(eps).sqrt_(), s["acc_delta"].add(eps).sqrt_()
        delta = (top / bottom).mul_(g)
        a = s["acc_delta"].mul(rho).addcmul_(delta, delta, value=1 - rho)
        slopes = (torch.where(x > 0, 0.5 / x, 0) for x in (bottom, top))
        return _Forward(g, v, bottom, top, delta, a, *slopes)

    def step(self, p: Tensor, g: Tensor, s: Tensors, h: Scalars) -> tuple[Tensor, Tensors]:
        f = self._forward(p, g, s, h)
        return torch.add(p, f.delta, alpha=-h["lr"]), {"square_avg": f.v, "acc_delta": f.a}

    # dg̃ = ±dg + w dp + dw p
    # dv' = ρ dv + 2 (1 − ρ) g̃ dg̃ + dρ (v − g̃²)
    # dS = (dv' + dε)/(2 S)    dT = (da + dε)/(2 T)    dΔ = (T dg̃ + g̃ dT − Δ dS)/S
    # da' = ρ da + 2 (1 − ρ) Δ dΔ + dρ (a − Δ²)
    # dp' = dp − η dΔ − dη Δ
    def jvp(
        self, p: Tensor, g: Tensor, s: Tensors, h: Scalars, dp: Tensor, dg: Tensor, ds: Tensors, dh: Tensors
    ) -> tuple[Tensor, Tensors]:
        f, rho = self._forward(p, g, s, h), h["rho"]
        dg = torch.add(-dg if self.maximize else dg, dp, alpha=h["weight_decay"])
        if "weight_decay" in dh:
            dg.addcmul_(dh["weight_decay"], p)
        dv = ds["square_avg"].mul(rho).addcmul_(f.g, dg, value=2 * (1 - rho))
        if "rho" in dh:
            dv.addcmul_(dh["rho"], s["square_avg"] - f.g * f.g)
        under_s, under_t = (dv + dh["eps"], ds["acc_delta"] + dh["eps"]) if "eps" in dh else (dv, ds["acc_delta"])
        dd = (
            (f.top * dg).addcmul_(f.g, under_t * f.dtop).addcmul_(f.delta, under_s * f.dbottom, value=-1).div_(f.bottom)
        )
        da = ds["acc_delta"].mul(rho).addcmul_(f.delta, dd, value=2 * (1 - rho))
        if "rho" in dh:
            da.addcmul_(dh["rho"], s["acc_delta"] - f.delta * f.delta)
        dp = torch.add(dp, dd, alpha=-h["lr"])
        if "lr" in dh:
            dp.addcmul_(dh["lr"], f.delta, value=-1)
        return dp, {"square_avg": dv, "acc_delta": da}

    # The transpose, from the last line up:
    # λη = −λp' Δ    λΔ = −η λp' + 2 (1 − ρ) Δ λa'    λa = ρ λa'    λρ = λa' (a − Δ²)
    # λg̃ = λΔ T/S    λT = λΔ g̃/S    λS = −λΔ Δ/S    x = λT/(2 T)    y = λS/(2 S)    λa += x    λv' += y    λε = x + y
    # λv = ρ λv'    λρ += λv' (v − g̃²)    λg̃ += 2 (1 − ρ) g̃ λv'
    # λp = λp' + w λg̃    λw = λg̃ p    λg = ±λg̃
    def vjp(
        self, p: Tensor, g: Tensor, s: Tensors, h: Scalars, lp: Tensor, ls: Tensors
    ) -> tuple[Tensor, Tensor, Tensors, Tensors]:
        f, rho, la = self._forward(p, g, s, h), h["rho"], ls["acc_delta"]
        over_s = (-h["lr"] * lp).addcmul_(f.delta, la, value=2 * (1 - rho)).div_(f.bottom)  # λΔ/S
        x, y = over_s * f.g * f.dtop, -over_s * f.delta * f.dbottom
        lv = ls["square_avg"] + y
        lg = torch.addcmul(over_s * f.top, f.g, lv, value=2 * (1 - rho))
        of_rho = la * torch.addcmul(s["acc_delta"], f.delta, f.delta, value=-1)
        lh = {
            "lr": -lp * f.delta,
            "eps": x + y,
            "rho": of_rho.addcmul_(lv, torch.addcmul(s["square_avg"], f.g, f.g, value=-1)),
            "weight_decay": lg * p,
        }
        out = {"square_avg": rho * lv, "acc_delta": torch.add(x, la, alpha=rho)}
        return torch.add(lp, lg, alpha=h["weight_decay"]), -lg if self.maximize else lg, out, lh
