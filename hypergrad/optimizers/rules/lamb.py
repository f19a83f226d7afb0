"""LAMB (arXiv 1904.00962), as `pytorch_optimizer.Lamb` (4.1).

    q  = κ p       κ = 1 − η w                 fixed decay: 1 − w;  coupled: 1
    m' = β₁ m + β₃ (±g)                        β₃ = 1 − β₁, without grad_averaging 1
    v' = β₂ v + (1 − β₂) g²      D = √v' + ε
    u  = m'/D                                  coupled: m'/D + w q
    a  = min(‖q‖, 10)      b = ‖u‖      τ = a/(b + ε)
    p' = q − (η/c₁) τ u                        c₁ = 1 − β₁ᵗ, with adam_debias 1

Norms are of one parameter tensor. τ = 1 with adam=True, and where a or b is exactly 0 (a bias that starts from zeros): τ jumps
there, and dτ := 0. t counts the steps of the group. Where v' = 0, d√v' := 0, as in `adam.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from hypergrad.optimizers.rule import Scalars, Tensors, along
from hypergrad.optimizers.rules.lion import Decay, decay_factor, decay_of, decay_slopes


class _Forward(NamedTuple):
    g: Tensor  # ±g
    q: Tensor
    m: Tensor  # m'
    v: Tensor  # v'
    root: Tensor  # √v'
    over: Tensor  # 1/D
    u: Tensor
    norm: Tensor  # ‖q‖
    b: Tensor
    tau: Tensor
    ratio: bool  # τ = a/(b + ε), not 1
    c1: float
    dc1: float  # dc₁/dβ₁ = −t β₁^(t−1)


@dataclass(frozen=True)
class Lamb:
    decay: Decay = "decoupled"
    averaging: bool = True
    adam: bool = False
    debias: bool = True  # η/c₁
    clamp: float = 10.0
    maximize: bool = False

    hyperparameters: ClassVar[tuple[str, ...]] = ("lr", "weight_decay", "beta1", "beta2", "eps")
    elementwise: ClassVar[bool] = False
    counts_groups: ClassVar[bool] = True
    decoupled: ClassVar[bool] = True  # coupled or not: no fixed point is a minimum of the loss plus a penalty

    @property
    def slots(self) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    @property
    def second_moment_of_decay(self) -> str | None:
        return None

    @classmethod
    def from_group(cls, group: Mapping[str, Any], wrt: frozenset[str]) -> Lamb:
        for flag, way_out in (
            ("rectify", "leave it out"),
            ("adanorm", "leave it out"),
            ("pre_norm", "leave it out, and clip with clip_norm=… instead"),
        ):
            if group.get(flag):
                raise NotImplementedError(f"Lamb with {flag}=True has no update rule: {way_out}.")
        return cls(
            decay_of(group),
            bool(group["grad_averaging"]),
            bool(group["adam"]),
            not group.get("adam_debias", False),
            float(group.get("clamp", 10.0)),
            bool(group["maximize"]),
        )

    def slot_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys(self.slots, shape)

    def _forward(self, p: Tensor, g: Tensor, s: Tensors, h: Scalars) -> _Forward:
        b1, b2, t = h["beta1"], h["beta2"], h["t"]
        g = -g if self.maximize else g
        q = p if self.decay == "coupled" else p * (1 - decay_factor(self.decay, h))
        m = s["exp_avg"].mul(b1).add_(g, alpha=1 - b1 if self.averaging else 1.0)
        v = s["exp_avg_sq"].mul(b2).addcmul_(g, g, value=1 - b2)
        root = v.sqrt()
        over = (root + h["eps"]).reciprocal_()
        u = over * m
        if self.decay == "coupled":
            u = u.add_(q, alpha=h["weight_decay"])
        norm, b = torch.linalg.vector_norm(q), torch.linalg.vector_norm(u)
        ratio = not self.adam and bool((norm != 0) & (b != 0))
        tau = norm.clamp(max=self.clamp) / (b + h["eps"]) if ratio else torch.ones_like(b)
        c1, dc1 = (1 - b1**t, -t * b1 ** (t - 1)) if self.debias else (1.0, 0.0)
        return _Forward(g, q, m, v, root, over, u, norm, b, tau, ratio, c1, dc1)

    def step(self, p: Tensor, g: Tensor, s: Tensors, h: Scalars) -> tuple[Tensor, Tensors]:
        f = self._forward(p, g, s, h)
        return torch.add(f.q, f.u * f.tau, alpha=-(h["lr"] / f.c1)), {"exp_avg": f.m, "exp_avg_sq": f.v}

    # dq = κ dp + dκ p    dκ = −(w dη + η dw);  fixed: −dw;  coupled: 0
    # dm' = β₁ dm ± β₃ dg + dβ₁ (m ∓ g)  (without averaging dβ₁ m)    dv' = β₂ dv + 2 (1 − β₂) g dg + dβ₂ (v − g²)
    # dD = dv'/(2 √v') + dε    du = (dm' − (m'/D) dD)/D, coupled: + w dq + dw q
    # da = q·dq/‖q‖ (0 where ‖q‖ > 10)    db = u·du/b    dτ = (da − τ (db + dε))/(b + ε)
    # dp' = dq − (η/c₁) (τ du + dτ u) − (dη/c₁ − η dc₁/c₁²) τ u
    def jvp(
        self, p: Tensor, g: Tensor, s: Tensors, h: Scalars, dp: Tensor, dg: Tensor, ds: Tensors, dh: Tensors
    ) -> tuple[Tensor, Tensors]:
        f, lr = self._forward(p, g, s, h), h["lr"]
        dq = dp * (1 - decay_factor(self.decay, h))
        for name, slope in zip(("lr", "weight_decay"), decay_slopes(self.decay, h), strict=True):
            if name in dh:
                dq.addcmul_(dh[name], p, value=-slope)
        dg = -dg if self.maximize else dg
        dm = torch.add(ds["exp_avg"] * h["beta1"], dg, alpha=1 - h["beta1"] if self.averaging else 1.0)
        dv = ds["exp_avg_sq"].mul(h["beta2"]).addcmul_(f.g, dg, value=2 * (1 - h["beta2"]))
        if "beta1" in dh:
            dm.addcmul_(dh["beta1"], s["exp_avg"] - f.g if self.averaging else s["exp_avg"])
        if "beta2" in dh:
            dv.addcmul_(dh["beta2"], s["exp_avg_sq"] - f.g * f.g)
        deps = dh.get("eps", torch.zeros_like(dq))
        dden = torch.addcmul(deps, dv, torch.where(f.root > 0, 0.5 / f.root, 0))
        du = torch.addcmul(dm, f.m * f.over, dden, value=-1) * f.over
        if self.decay == "coupled":
            du.add_(dq, alpha=h["weight_decay"])
            if "weight_decay" in dh:
                du.addcmul_(dh["weight_decay"], f.q)
        step = f.tau * du
        if f.ratio:
            da = along(dq, f.q) / f.norm if f.norm <= self.clamp else 0.0
            step = step + (da - f.tau * (along(du, f.u) / f.b + dh.get("eps", 0.0))) / (f.b + h["eps"]) * f.u
        dp = torch.add(dq, step, alpha=-lr / f.c1)
        if "lr" in dh:
            dp.addcmul_(dh["lr"], f.tau * f.u, value=-1 / f.c1)
        if "beta1" in dh:
            dp.addcmul_(dh["beta1"], f.tau * f.u, value=lr * f.dc1 / f.c1**2)
        return dp, {"exp_avg": dm, "exp_avg_sq": dv}

    # The transpose, from the last line up:
    # λη = −λp' τ u/c₁    λβ₁ = λp' τ u η dc₁/c₁²    λu = −(η/c₁) τ λp'    λτ = −(η/c₁) Σ λp' u    y = λτ/(b + ε)
    # λε = −τ y    λu −= τ y u/b    λq = λp' + y q/‖q‖ (where ‖q‖ ≤ 10);  coupled: λq += w λu, λw = λu q
    # λm' += λu/D    λD = −λu (m'/D)/D    λε += λD    λv' += λD/(2 √v')
    # λm = β₁ λm'    λv = β₂ λv'    λβ₁ += λm' (m ∓ g)  (λm' m)    λβ₂ = λv' (v − g²)    λg = ±β₃ λm' + 2 (1 − β₂) g λv'
    # λp = κ λq    λη −= w p λq    λw −= η p λq;  fixed: λw −= p λq
    def vjp(
        self, p: Tensor, g: Tensor, s: Tensors, h: Scalars, lp: Tensor, ls: Tensors
    ) -> tuple[Tensor, Tensor, Tensors, Tensors]:
        f, lr, lq = self._forward(p, g, s, h), h["lr"], lp
        lu, lpu = (-lr / f.c1) * f.tau * lp, lp * f.tau * f.u
        lh = {"lr": lpu / -f.c1, "eps": torch.zeros_like(lp), "weight_decay": torch.zeros_like(lp)}
        if f.ratio:
            y = (-lr / f.c1) * (lp * f.u).sum() / (f.b + h["eps"])
            lh["eps"] = (-f.tau * y / f.u.numel()).expand_as(lp)
            lu = torch.addcmul(lu, f.u, f.tau * y / f.b, value=-1)
            lq = torch.addcmul(lp, f.q, y / f.norm) if f.norm <= self.clamp else lp
        if self.decay == "coupled":
            lq, lh["weight_decay"] = torch.add(lq, lu, alpha=h["weight_decay"]), lu * f.q
        lm = torch.addcmul(ls["exp_avg"], lu, f.over)
        lden = -lu * f.m * f.over**2
        lv = torch.addcmul(ls["exp_avg_sq"], lden, torch.where(f.root > 0, 0.5 / f.root, 0))
        lg = (lm * (1 - h["beta1"] if self.averaging else 1.0)).addcmul_(f.g, lv, value=2 * (1 - h["beta2"]))
        of_lr, of_wd = decay_slopes(self.decay, h)
        lh["lr"] = torch.addcmul(lh["lr"], p, lq, value=-of_lr)
        lh["weight_decay"] = torch.addcmul(lh["weight_decay"], p, lq, value=-of_wd)
        lh["eps"] = lh["eps"] + lden
        old = s["exp_avg"] - f.g if self.averaging else s["exp_avg"]
        lh["beta1"] = torch.addcmul(lpu * (lr * f.dc1 / f.c1**2), lm, old)
        lh["beta2"] = lv * torch.addcmul(s["exp_avg_sq"], f.g, f.g, value=-1)
        out = {"exp_avg": h["beta1"] * lm, "exp_avg_sq": h["beta2"] * lv}
        return lq * (1 - decay_factor(self.decay, h)), -lg if self.maximize else lg, out, lh
