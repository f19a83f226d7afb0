"""Stochastic gradient descent, as `torch.optim.SGD`.

g̃  = ±g + w p                       w weight decay, minus with maximize
b' = μ b + (1 − τ) g̃                μ momentum, τ dampening; at the first step b' = g̃
d  = g̃ + μ b' (nesterov),  b' (momentum),  g̃ (plain)
p' = p − η d                         η lr
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hypergrad.optimizers.rule import Scalars, Shares, Tensors, inner


@dataclass(frozen=True)
class SGD:
    buffered: bool = False  # keeps a momentum buffer
    nesterov: bool = False
    maximize: bool = False

    hyperparameters: ClassVar[tuple[str, ...]] = ("lr", "weight_decay", "momentum", "dampening")
    elementwise: ClassVar[bool] = True

    @property
    def slots(self) -> tuple[str, ...]:
        return ("momentum_buffer",) if self.buffered else ()

    @property
    def second_moment_of_decay(self) -> str | None:
        return None

    @classmethod
    def from_group(cls, group: Mapping[str, Any], wrt: frozenset[str]) -> SGD:
        momentum, dampening = float(group["momentum"]), float(group["dampening"])
        if "momentum" in wrt and momentum == 0 and (dampening != 0 or group["nesterov"] or "dampening" in wrt):
            raise ValueError(
                "SGD is discontinuous in momentum at exactly 0 when dampening or nesterov is set (torch skips both "
                "there): start momentum at a value above 0, for example 0.1."
            )
        return cls(momentum != 0 or "momentum" in wrt, bool(group["nesterov"]), bool(group["maximize"]))

    def _directions(self, p: Tensor, g: Tensor, s: Tensors, h: Scalars) -> tuple[Tensor, Tensor, Tensor]:
        """g̃, b' (g̃ without momentum) and d."""
        g = torch.add(-g if self.maximize else g, p, alpha=h["weight_decay"])
        if not self.buffered:
            return g, g, g
        b = g.clone() if h["t"] == 1 else s["momentum_buffer"].mul(h["momentum"]).add_(g, alpha=1 - h["dampening"])
        return g, b, torch.add(g, b, alpha=h["momentum"]) if self.nesterov else b

    def step(self, p: Tensor, g: Tensor, s: Tensors, h: Scalars) -> tuple[Tensor, Tensors]:
        _, b, d = self._directions(p, g, s, h)
        return torch.add(p, d, alpha=-h["lr"]), {"momentum_buffer": b} if self.buffered else {}

    # dg̃ = ±dg + w dp + dw p
    # db' = μ db + (1 − τ) dg̃ + dμ b − dτ g̃          first step: db' = dg̃
    # dd = dg̃ + μ db' + dμ b' | db' | dg̃
    # dp' = dp − η dd − dη d
    def jvp(
        self, p: Tensor, g: Tensor, s: Tensors, h: Scalars, dp: Tensor, dg: Tensor, ds: Tensors, dh: Tensors
    ) -> tuple[Tensor, Tensors]:
        b, d = g, g  # read only along those three directions
        if dh.keys() & {"lr", "momentum", "dampening"}:
            g, b, d = self._directions(p, g, s, h)
        dg = torch.add(-dg if self.maximize else dg, dp, alpha=h["weight_decay"])
        if "weight_decay" in dh:
            dg.addcmul_(dh["weight_decay"], p)
        dd, out = dg, {}
        if self.buffered:
            db = dg
            if h["t"] != 1:
                db = ds["momentum_buffer"].mul(h["momentum"]).add_(dg, alpha=1 - h["dampening"])
                if "momentum" in dh:
                    db.addcmul_(dh["momentum"], s["momentum_buffer"])
                if "dampening" in dh:
                    db.addcmul_(dh["dampening"], g, value=-1)
            out["momentum_buffer"] = dd = db
            if self.nesterov:
                dd = torch.add(dg, db, alpha=h["momentum"])
                if "momentum" in dh:
                    dd.addcmul_(dh["momentum"], b)
        dp = torch.add(dp, dd, alpha=-h["lr"])
        if "lr" in dh:
            dp.addcmul_(dh["lr"], d, value=-1)
        return dp, out

    # The transpose, from the last line up:
    # λη = −λp'·d    λd = −η λp'
    # nesterov: λg̃ = λd, λb' += μ λd, λμ = λd·b'      momentum: λb' += λd      plain: λg̃ = λd
    # λb = μ λb'    λg̃ += (1 − τ) λb'    λμ += λb'·b    λτ = −λb'·g̃          first step: λg̃ += λb', λb = 0
    # λp = λp' + w λg̃    λw = λg̃·p    λg = ±λg̃
    def vjp(
        self, p: Tensor, g: Tensor, s: Tensors, h: Scalars, lp: Tensor, ls: Tensors
    ) -> tuple[Tensor, Tensor, Tensors, Shares]:
        lr, momentum, keep, first = h["lr"], h["momentum"], 1 - h["dampening"], h["t"] == 1
        gt = torch.add(-g if self.maximize else g, p, alpha=h["weight_decay"])  # g̃
        if not self.buffered:
            lg = lp * -lr
            lh = {"lr": lambda: -inner(lp, gt), "weight_decay": lambda: inner(lg, p)}
            return torch.add(lp, lg, alpha=h["weight_decay"]), -lg if self.maximize else lg, {}, lh
        b = s["momentum_buffer"]
        lb = torch.add(ls["momentum_buffer"], lp, alpha=-lr * (momentum if self.nesterov else 1))
        lg = lb.clone() if first else lb * keep
        if self.nesterov:
            lg.add_(lp, alpha=-lr)

        def with_b(x: Tensor) -> Tensor:  # ⟨x, b'⟩
            return inner(x, gt) if first else momentum * inner(x, b) + keep * inner(x, gt)

        lh = {
            "lr": lambda: -(inner(lp, gt) + momentum * with_b(lp)) if self.nesterov else -with_b(lp),
            "momentum": lambda: (
                (0 if first else inner(lb, b)) - (lr * with_b(lp) if self.nesterov else lp.new_zeros(()))
            ),
            "dampening": lambda: lp.new_zeros(()) if first else -inner(lb, gt),
            "weight_decay": lambda: inner(lg, p),
        }
        out = {"momentum_buffer": torch.zeros_like(lb) if first else lb * momentum}
        return torch.add(lp, lg, alpha=h["weight_decay"]), -lg if self.maximize else lg, out, lh
