"""NAdam, as `torch.optim.NAdam` (Dozat 2016).

    g̃  = ±g + w p                                   w weight decay; decoupled: g̃ = ±g
    m' = β₁ m + (1 − β₁) g̃        v' = β₂ v + (1 − β₂) g̃²        D = √(v'/c₂) + ε      c₂ = 1 − β₂ᵗ
    μ  = μ_t,  ν = μ_{t+1},  μ_t = β₁ (1 − ½ 0.96^{t ψ})         ψ momentum_decay
    π' = π μ                                                      mu_product, 1 before the first step
    A  = (1 − μ)/(1 − π')         B = ν/(1 − π' ν)
    p' = p − η (A g̃ + B m')/D     decoupled: (1 − η w) p in place of p

π is one number a parameter, and depends on the β₁ and ψ of all steps before; it has a tangent of its own. torch keeps it in
the default dtype, whatever that of the parameters, and it is rounded to it here too. Where v' = 0, d√v' := 0, as in `adam.py`.
"""

from __future__ import annotations

import math
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
    root: Tensor  # √(v'/c₂)
    den: Tensor  # D
    c2: float
    dc2: float  # dc₂/dβ₂ = −t β₂^(t−1)


class _Momentum(NamedTuple):
    mu: float
    nu: float
    product: Tensor  # π'
    a: float  # A
    b: float  # B


@dataclass(frozen=True)
class NAdam:
    decoupled: bool = False
    maximize: bool = False
    dtype: torch.dtype = torch.float64  # of π

    hyperparameters: ClassVar[tuple[str, ...]] = ("lr", "weight_decay", "beta1", "beta2", "eps", "momentum_decay")
    elementwise: ClassVar[bool] = False
    first: ClassVar[dict[str, float]] = {"mu_product": 1.0}

    @property
    def slots(self) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", "mu_product")

    @property
    def second_moment_of_decay(self) -> str | None:
        return None if self.decoupled else "exp_avg_sq"

    @classmethod
    def from_group(cls, group: Mapping[str, Any], wrt: frozenset[str]) -> NAdam:
        dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
        return cls(bool(group["decoupled_weight_decay"]), bool(group["maximize"]), dtype)

    def slot_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return {"exp_avg": shape, "exp_avg_sq": shape, "mu_product": (1,) * len(shape)}

    def _forward(self, p: Tensor, g: Tensor, s: Tensors, h: Scalars) -> _Forward:
        b2, t = h["beta2"], h["t"]
        g, m, v = moments(p, g, s, h, self.maximize, self.decoupled)
        root = v.div(1 - b2**t).sqrt()
        return _Forward(g, m, v, root, root + h["eps"], 1 - b2**t, -t * b2 ** (t - 1))

    def _momentum(self, s: Tensors, h: Scalars) -> _Momentum:
        mu = h["beta1"] * (1.0 - 0.5 * (0.96 ** (h["t"] * h["momentum_decay"])))
        nu = h["beta1"] * (1.0 - 0.5 * (0.96 ** ((h["t"] + 1) * h["momentum_decay"])))
        product = s["mu_product"].to(self.dtype) * mu
        x = product.item()
        return _Momentum(mu, nu, product.to(s["mu_product"]), (1.0 - mu) / (1.0 - x), nu / (1.0 - x * nu))

    def step(self, p: Tensor, g: Tensor, s: Tensors, h: Scalars) -> tuple[Tensor, Tensors]:
        f, lr, (mu, nu, product, _, _) = self._forward(p, g, s, h), h["lr"], self._momentum(s, h)
        if self.decoupled:
            p = p * (1 - lr * h["weight_decay"])
        x = product.item()
        p = torch.addcdiv(p, f.g, f.den, value=-lr * (1.0 - mu) / (1.0 - x))
        p = p.addcdiv_(f.m, f.den, value=(-lr * nu) / (1.0 - x * nu))
        return p, {"exp_avg": f.m, "exp_avg_sq": f.v, "mu_product": product}

    # dμ_t = (μ_t/β₁) dβ₁ − ½ β₁ log(0.96) t 0.96^{t ψ} dψ
    @staticmethod
    def _slopes(h: Scalars, t: float) -> dict[str, float]:
        """dμ_t in β₁ and ψ."""
        power = 0.96 ** (t * h["momentum_decay"])
        return {"beta1": 1 - power / 2, "momentum_decay": -h["beta1"] * math.log(0.96) * t * power / 2}

    # dπ' = μ dπ + π dμ    dA = −dμ/(1 − π') + A dπ'/(1 − π')    dB = (dν + B (ν dπ' + π' dν))/(1 − π' ν)
    def _momentum_tangent(self, s: Tensors, h: Scalars, k: _Momentum, dpi: Tensor, dh: Tensors) -> tuple[Tensor, ...]:
        """(dπ', dA, dB), each [k, 1, …]."""
        dmu = dnu = torch.zeros_like(dpi)
        here, after = self._slopes(h, h["t"]), self._slopes(h, h["t"] + 1)
        for name in dh.keys() & here.keys():
            dmu, dnu = dmu + here[name] * dh[name], dnu + after[name] * dh[name]
        dpi = k.mu * dpi + s["mu_product"] * dmu
        da = (k.a * dpi - dmu) / (1 - k.product)
        return dpi, da, (dnu + k.b * (k.nu * dpi + k.product * dnu)) / (1 - k.product * k.nu)

    # dg̃, dm', dv': see moments.py
    # dD = dv'/(2 c₂ √(v'/c₂)) + dε − √(v'/c₂) dc₂/(2 c₂)
    # u = (A g̃ + B m')/D    du = (A dg̃ + B dm' + dA g̃ + dB m' − u dD)/D
    # dp' = dp − η du − dη u;  decoupled: (1 − η w) dp − η du − dη (u + w p) − η dw p
    def jvp(
        self, p: Tensor, g: Tensor, s: Tensors, h: Scalars, dp: Tensor, dg: Tensor, ds: Tensors, dh: Tensors
    ) -> tuple[Tensor, Tensors]:
        f, k, lr, wd = self._forward(p, g, s, h), self._momentum(s, h), h["lr"], h["weight_decay"]
        dg, dm, dv = moment_tangents(p, f.g, s, h, dp, dg, ds, dh, self.maximize, self.decoupled)
        dden = dv * torch.where(f.root > 0, 0.5 / (f.c2 * f.root), 0)
        if "eps" in dh:
            dden += dh["eps"]
        if "beta2" in dh:
            dden.addcmul_(dh["beta2"], f.root, value=-f.dc2 / (2 * f.c2))
        dpi, da, db = self._momentum_tangent(s, h, k, ds["mu_product"], dh)
        u = (k.a * f.g + k.b * f.m) / f.den
        du = (k.a * dg + k.b * dm + da * f.g + db * f.m).addcmul_(u, dden, value=-1) / f.den
        out = torch.add(dp * (1 - lr * wd) if self.decoupled else dp, du, alpha=-lr)
        if "lr" in dh:
            out.addcmul_(dh["lr"], torch.add(u, p, alpha=wd) if self.decoupled else u, value=-1)
        if self.decoupled and "weight_decay" in dh:
            out.addcmul_(dh["weight_decay"], p, value=-lr)
        return out, {"exp_avg": dm, "exp_avg_sq": dv, "mu_product": dpi}

    # Given λA and λB:
    # λπ' += λA A/(1 − π') + λB B ν/(1 − π' ν)    λμ = −λA/(1 − π') + λπ' π    λν = λB (1 + B π')/(1 − π' ν)    λπ = μ λπ'
    # λβ₁ = λμ dμ/dβ₁ + λν dν/dβ₁, and so for ψ
    def _momentum_adjoint(
        self, s: Tensors, h: Scalars, k: _Momentum, lpi: Tensor, la: Tensor, lb: Tensor
    ) -> tuple[Tensor, Tensors]:
        """(λπ, λβ₁ and λψ)."""
        la, lb = la / (1 - k.product), lb / (1 - k.product * k.nu)
        lpi = lpi + la * k.a + lb * (k.b * k.nu)
        lmu, lnu = lpi * s["mu_product"] - la, lb * (1 + k.b * k.product)
        here, after = self._slopes(h, h["t"]), self._slopes(h, h["t"] + 1)
        return k.mu * lpi, {name: lmu * here[name] + lnu * after[name] for name in here}

    # The transpose, from the last line up:
    # λη = −λp' u    λu = −η λp'    x = λu/D    λA = Σ x g̃    λB = Σ x m'    λg̃ = A x    λm' += B x    λD = −x u
    # λε = λD    λβ₂ = −λD √(v'/c₂) dc₂/(2 c₂)    λv' += λD/(2 c₂ √(v'/c₂))
    # λm = β₁ λm'   λv = β₂ λv'   λβ₁ += λm' (m − g̃)   λβ₂ += λv' (v − g̃²)   λg̃ += (1 − β₁) λm' + 2 (1 − β₂) g̃ λv'
    # λp = λp' + w λg̃, λw = λg̃ p;  decoupled: λp = (1 − η w) λp', λw = −η p λp', λη −= w p λp'
    def vjp(
        self, p: Tensor, g: Tensor, s: Tensors, h: Scalars, lp: Tensor, ls: Tensors
    ) -> tuple[Tensor, Tensor, Tensors, Tensors]:
        f, k, lr, wd = self._forward(p, g, s, h), self._momentum(s, h), h["lr"], h["weight_decay"]
        u, x = (k.a * f.g + k.b * f.m) / f.den, (-lr * lp) / f.den
        lden = -x * u
        lv = torch.addcmul(ls["exp_avg_sq"], lden, torch.where(f.root > 0, 0.5 / (f.c2 * f.root), 0))
        lm = torch.add(ls["exp_avg"], x, alpha=k.b)
        lg = (k.a * x).add_(lm, alpha=1 - h["beta1"]).addcmul_(f.g, lv, value=2 * (1 - h["beta2"]))
        la, lb = (x * f.g).sum().view_as(k.product), (x * f.m).sum().view_as(k.product)
        lpi, lh = self._momentum_adjoint(s, h, k, ls["mu_product"], la, lb)
        square = torch.addcmul(s["exp_avg_sq"], f.g, f.g, value=-1)
        lh |= {
            "lr": -lp * u,
            "eps": lden,
            "beta1": lh["beta1"] + (lm * (s["exp_avg"] - f.g)).sum(),
            "beta2": torch.addcmul(lden * f.root * (-f.dc2 / (2 * f.c2)), lv, square),
            "weight_decay": (-lr * p) * lp if self.decoupled else lg * p,
        }
        if self.decoupled:
            lh["lr"] = torch.addcmul(lh["lr"], p, lp, value=-wd)
        out_p = lp * (1 - lr * wd) if self.decoupled else torch.add(lp, lg, alpha=wd)
        out = {"exp_avg": h["beta1"] * lm, "exp_avg_sq": h["beta2"] * lv, "mu_product": lpi}
        return out_p, -lg if self.maximize else lg, out, lh
