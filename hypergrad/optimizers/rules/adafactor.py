"""Adafactor, as `torch.optim.Adafactor` (arXiv 1804.04235).

    q  = (1 − η w) p
    α  = max(ε₂, RMS(p)) min(η, 1/√t)             RMS(x) = ‖x‖/√n, n elements
    β  = t^τ                                       τ beta2_decay
    vectors:   v' = v + β (g² − v)                 V = v'
    matrices:  r' = r + β (mean over columns of g² − r)      c' = c + β (mean over rows of g² − c)
               V = r' c'/M                         M = max(mean of r', ε₁)
    W  = max(V, ε₁²)      U = g/√W
    δ  = max(1, RMS(U)/d)                          d clipping threshold
    p' = q − (α/δ) U                               g is −g with maximize

Where p has more than two dimensions, matrices are those of its last two. Each maximum or minimum has the derivative of the side
it is on: from lr = 1/√t on, lr acts through weight decay alone. ε₁ and ε₂ are such bounds; there is no derivative in them here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from hypergrad.optimizers.rule import Scalars, Tensors, along


class _Forward(NamedTuple):
    g: Tensor  # ±g
    slots: Tensors  # r', c' or v'
    fresh: Tensors  # the means of g² that they move towards
    m: Tensor | None  # M, None for vectors
    v: Tensor  # V
    w: Tensor  # W
    u: Tensor  # U
    rms_p: float
    rms_u: float
    alpha: float
    delta: float
    beta: float


@dataclass(frozen=True)
class Adafactor:
    eps1: float | None = None  # None: that of the dtype
    eps2: float = 1e-3
    maximize: bool = False

    hyperparameters: ClassVar[tuple[str, ...]] = ("lr", "weight_decay", "beta2_decay", "d")
    elementwise: ClassVar[bool] = False
    decoupled: ClassVar[bool] = True

    @property
    def slots(self) -> tuple[str, ...]:
        return ("row_var", "col_var", "variance")

    @property
    def second_moment_of_decay(self) -> str | None:
        return None

    @classmethod
    def from_group(cls, group: Mapping[str, Any], wrt: frozenset[str]) -> Adafactor:
        if "d" in wrt and float(group["d"]) == 1:
            raise ValueError(
                "Adafactor has no derivative in d at exactly 1 (RMS(U) of a vector is 1 at its first step, where clipping sets "
                "in): start d above 1, for example 1.1."
            )
        eps1, eps2 = group["eps"]
        return cls(None if eps1 is None else float(eps1), float(eps2), bool(group["maximize"]))

    def slot_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        if len(shape) < 2:
            return {"row_var": (0,), "col_var": (0,), "variance": shape}
        return {"row_var": (*shape[:-1], 1), "col_var": (*shape[:-2], 1, shape[-1]), "variance": (0,)}

    def _floor(self, p: Tensor) -> float:
        """ε₁."""
        return torch.finfo(p.dtype).eps if self.eps1 is None else self.eps1

    def _forward(self, p: Tensor, g: Tensor, s: Tensors, h: Scalars) -> _Forward:
        g, beta, eps1, n, m = -g if self.maximize else g, h["t"] ** h["beta2_decay"], self._floor(p), p.numel(), None
        rms_p = p.norm(2).item() / n**0.5
        alpha = max(self.eps2, rms_p) * min(h["lr"], 1 / h["t"] ** 0.5)
        if g.dim() > 1:
            squares = {d: torch.linalg.vector_norm(g, dim=d, keepdim=True).square_().div_(g.shape[d]) for d in (-1, -2)}
            fresh = {"row_var": squares[-1], "col_var": squares[-2]}
            slots = {name: s[name].lerp(x, beta) for name, x in fresh.items()}
            m = slots["row_var"].mean(dim=-2, keepdim=True).clamp_(min=eps1)
            v = (slots["row_var"] @ slots["col_var"]).div_(m)
        else:
            fresh = {"variance": g * g}
            v = s["variance"].lerp(fresh["variance"], beta)
            slots = {"variance": v}
        w = v.clamp(min=eps1 * eps1)
        u = w.rsqrt().mul_(g)
        norm = u.norm(2).item()
        return _Forward(
            g, slots, fresh, m, v, w, u, rms_p, norm / n**0.5, alpha, max(1.0, norm / (n**0.5 * h["d"])), beta
        )

    def step(self, p: Tensor, g: Tensor, s: Tensors, h: Scalars) -> tuple[Tensor, Tensors]:
        f = self._forward(p, g, s, h)
        return (p * (1 - h["lr"] * h["weight_decay"])).add_(f.u, alpha=-f.alpha / f.delta), f.slots

    # dβ = β log t dτ    dr' = (1 − β) dr + 2 β mean(g dg) + dβ (mean g² − r), and so c', v'
    # dV = (c' dr' + r' dc' − V dM)/M    dM = mean dr', 0 where M = ε₁;  vectors: dV = dv'
    def _variance_tangent(
        self, f: _Forward, s: Tensors, h: Scalars, dg: Tensor, ds: Tensors, dh: Tensors
    ) -> tuple[Tensor, Tensors]:
        """dV and the tangents of the slots."""
        square, out = 2 * f.g * dg, {}
        means = {"row_var": lambda: square.mean(-1, keepdim=True), "col_var": lambda: square.mean(-2, keepdim=True)}
        for name, x in f.fresh.items():
            out[name] = ds[name].lerp(means[name]() if name in means else square, f.beta)
            if "beta2_decay" in dh:
                out[name].addcmul_(dh["beta2_decay"], x - s[name], value=f.beta * math.log(h["t"]))
        if f.m is None:
            return out["variance"], out
        dm = torch.where(f.m > self._floor(f.g), out["row_var"].mean(-2, keepdim=True), 0)
        dv = out["row_var"] * f.slots["col_var"] + f.slots["row_var"] * out["col_var"]
        return torch.addcmul(dv, f.v, dm, value=-1) / f.m, out

    # The transpose: λr' += Σ_columns λV c'/M + (mean's share of λM)    λc' += Σ_rows λV r'/M    λM = −Σ λV V/M
    # λr = (1 − β) λr'    λg = 2 β g λr'/columns + …    λτ = β log t Σ λr' (mean g² − r) + …
    def _variance_adjoint(
        self, f: _Forward, s: Tensors, h: Scalars, lv: Tensor, ls: Tensors
    ) -> tuple[Tensor, Tensors, Tensor]:
        """λg, λ of the slots, λτ."""
        if f.m is None:
            share, counts = {"variance": lv}, {"variance": 1}
        else:
            rows, columns = lv.shape[-2:]
            lv = lv / f.m
            lm = torch.where(f.m > self._floor(f.g), -(lv * f.v).sum((-2, -1), keepdim=True), 0)
            row = (lv * f.slots["col_var"]).sum(-1, keepdim=True) + lm / rows
            share = {"row_var": row, "col_var": (lv * f.slots["row_var"]).sum(-2, keepdim=True)}
            counts = {"row_var": columns, "col_var": rows}
        lg, lbeta, out = torch.zeros_like(f.g), torch.zeros((), dtype=lv.dtype, device=lv.device), {}
        for name, x in share.items():
            lam = ls[name] + x
            lg = lg + lam * f.g * (2 * f.beta / counts[name])
            lbeta = lbeta + (lam * (f.fresh[name] - s[name])).sum()
            out[name] = (1 - f.beta) * lam
        return lg, out, lbeta * (f.beta * math.log(h["t"]))

    # dU = (dg − U dW/(2 √W))/√W    dW = dV where V > ε₁², else 0
    # dα = min(η, 1/√t) p·dp/(n RMS(p)) (0 where RMS(p) < ε₂) + max(ε₂, RMS(p)) dη (0 where η > 1/√t)
    # dδ = U·dU/(n RMS(U) d) − δ dd/d, 0 where δ = 1
    # dp' = (1 − η w) dp − (w dη + η dw) p − (α/δ) dU − (dα − α dδ/δ) U/δ
    def jvp(
        self, p: Tensor, g: Tensor, s: Tensors, h: Scalars, dp: Tensor, dg: Tensor, ds: Tensors, dh: Tensors
    ) -> tuple[Tensor, Tensors]:
        f, lr, wd, n = self._forward(p, g, s, h), h["lr"], h["weight_decay"], p.numel()
        dg = -dg if self.maximize else dg
        dv, out = self._variance_tangent(f, s, h, dg, ds, dh)
        dw = torch.where(f.v > self._floor(p) ** 2, dv, 0)
        du = torch.addcmul(dg * f.w.rsqrt(), f.u / f.w, dw, value=-0.5)
        capped = 1 / h["t"] ** 0.5
        change = dp.new_zeros((len(dp), *[1] * p.dim()))  # dα − α dδ/δ
        if f.rms_p > self.eps2:
            change = change + along(dp, p) * (min(lr, capped) / (n * f.rms_p))
        if "lr" in dh and lr <= capped:
            change = change + dh["lr"] * max(self.eps2, f.rms_p)
        if f.delta > 1:
            change = change - along(du, f.u) * (f.alpha / (f.delta * n * f.rms_u * h["d"]))
            if "d" in dh:
                change = change + dh["d"] * (f.alpha / h["d"])
        dp = torch.add(dp * (1 - lr * wd), du, alpha=-f.alpha / f.delta).addcmul_(change, f.u, value=-1 / f.delta)
        if "lr" in dh:
            dp.addcmul_(dh["lr"], p, value=-wd)
        if "weight_decay" in dh:
            dp.addcmul_(dh["weight_decay"], p, value=-lr)
        return dp, out

    # The transpose: λU = −(α/δ) λp'    y = −Σ λp' U/δ    λα = y    λδ = −α y/δ
    # δ > 1: λU += λδ U/(n RMS(U) d), λd = −λδ δ/d    λη = −w p λp' + λα max(ε₂, RMS(p))    λw = −η p λp'
    # λp = (1 − η w) λp' + λα min(η, 1/√t) p/(n RMS(p))    λg = λU/√W    λV = −λU U/(2 W) where V > ε₁²; the rest by the slots
    def vjp(
        self, p: Tensor, g: Tensor, s: Tensors, h: Scalars, lp: Tensor, ls: Tensors
    ) -> tuple[Tensor, Tensor, Tensors, Tensors]:
        f, lr, wd, n = self._forward(p, g, s, h), h["lr"], h["weight_decay"], p.numel()
        capped, y = 1 / h["t"] ** 0.5, -(lp * f.u).sum() / f.delta
        lu, zero = lp * (-f.alpha / f.delta), torch.zeros_like(y)
        lh = {"lr": (lp * p).sum() * -wd, "weight_decay": lp * p * -lr, "d": zero}
        if f.delta > 1:
            lu = lu - y * f.u * (f.alpha / (f.delta * n * f.rms_u * h["d"]))
            lh["d"] = y * (f.alpha / h["d"])
        if lr <= capped:
            lh["lr"] = lh["lr"] + y * max(self.eps2, f.rms_p)
        lp = lp * (1 - lr * wd)
        if f.rms_p > self.eps2:
            lp = lp + y * p * (min(lr, capped) / (n * f.rms_p))
        lv = torch.where(f.v > self._floor(p) ** 2, -0.5 * lu * f.u / f.w, 0)
        lg, out, lh["beta2_decay"] = self._variance_adjoint(f, s, h, lv, ls)
        lg = lg + lu * f.w.rsqrt()
        return lp, -lg if self.maximize else lg, out, lh
