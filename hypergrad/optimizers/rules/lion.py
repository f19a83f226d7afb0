"""Lion (arXiv 2302.06675), as `pytorch_optimizer.Lion` (4.1) and `lion_pytorch.Lion` (0.2).

    g̃  = ±g                                    coupled decay: ±g + w p
    q  = κ p       κ = 1 − η w/η₀              fixed decay: 1 − w;  coupled: 1
    p' = q − η sgn(β₁ m + (1 − β₁) g̃)
    m' = β₂ m + (1 − β₂) g̃

η₀ is 1, or with lion_pytorch's decoupled_weight_decay the lr that its constructor was given.

The sign is a step function: its derivative is 0 wherever it has one, so that what a gradient is worth beyond its sign, and the
momentum, have no effect that a derivative sees. What is left are the paths through η and κ: hypergradients of lr and of decoupled
weight decay are right; those of betas (and of coupled decay, and of tensors in the loss but for their direct effect on the
validation loss) are 0, and that is right too: the run is piecewise constant in them, and the finite difference of a step too
small to flip a sign is 0. It says nothing about a larger change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from hypergrad.optimizers.rule import Scalars, Tensors

Decay = Literal["decoupled", "fixed", "coupled"]


@dataclass(frozen=True)
class Lion:
    decay: Decay = "decoupled"
    first_lr: float = 1.0  # η₀
    lerp: bool = True  # how an average is formed: pytorch_optimizer's order of operations, else lion_pytorch's
    maximize: bool = False

    hyperparameters: ClassVar[tuple[str, ...]] = ("lr", "weight_decay", "beta1", "beta2")
    elementwise: ClassVar[bool] = True

    @property
    def slots(self) -> tuple[str, ...]:
        return ("exp_avg",)

    @property
    def second_moment_of_decay(self) -> str | None:
        return None

    @property
    def decoupled(self) -> bool:
        return self.decay != "coupled"

    @classmethod
    def from_group(cls, group: Mapping[str, Any], wrt: frozenset[str]) -> Lion:
        if "weight_decouple" not in group:
            return cls._of_lion_pytorch(group)
        for flag in ("use_gc", "adanorm", "cautious"):
            if group.get(flag):
                raise NotImplementedError(f"Lion with {flag}=True has no update rule: leave {flag} out.")
        decay = decay_of(group)
        if decay == "coupled" and "weight_decay" in wrt and float(group["weight_decay"]) == 0:
            raise ValueError(
                "Lion with coupled weight decay is discontinuous in weight_decay at exactly 0 (the sign of w p, where gradients "
                "are 0): start weight_decay above 0, or pass weight_decouple=True."
            )
        return cls(decay, maximize=bool(group["maximize"]))

    @classmethod
    def _of_lion_pytorch(cls, group: Mapping[str, Any]) -> Lion:
        if group["update_fn"].__module__ != "lion_pytorch.lion_pytorch":
            raise NotImplementedError("Lion with use_triton=True has no update rule: pass use_triton=False.")
        return cls(first_lr=float(group["_init_lr"]) if group["decoupled_wd"] else 1.0, lerp=False)

    def _gradient(self, p: Tensor, g: Tensor, h: Scalars) -> Tensor:
        """g̃."""
        g = -g if self.maximize else g
        return torch.add(g, p, alpha=h["weight_decay"]) if self.decay == "coupled" else g

    def _average(self, m: Tensor, g: Tensor, beta: float) -> Tensor:
        return m.lerp(g, 1 - beta) if self.lerp else m.mul(beta).add_(g, alpha=1 - beta)

    def step(self, p: Tensor, g: Tensor, s: Tensors, h: Scalars) -> tuple[Tensor, Tensors]:
        g, m = self._gradient(p, g, h), s["exp_avg"]
        if self.decay != "coupled":
            p = p * (1 - decay_factor(self.decay, h, self.first_lr))
        sign = self._average(m, g, h["beta1"]).sign_()
        return torch.add(p, sign, alpha=-h["lr"]), {"exp_avg": self._average(m, g, h["beta2"])}

    # dg̃ = ±dg + w dp + dw p (coupled)    dm' = β₂ dm + (1 − β₂) dg̃ + dβ₂ (m − g̃)
    # dκ = −(w dη + η dw)/η₀;  fixed: −dw;  coupled: 0
    # dp' = κ dp + dκ p − dη sgn(…)
    def jvp(
        self, p: Tensor, g: Tensor, s: Tensors, h: Scalars, dp: Tensor, dg: Tensor, ds: Tensors, dh: Tensors
    ) -> tuple[Tensor, Tensors]:
        g, m = self._gradient(p, g, h), s["exp_avg"]
        dg = -dg if self.maximize else dg
        if self.decay == "coupled":
            dg = torch.add(dg, dp, alpha=h["weight_decay"])
            if "weight_decay" in dh:
                dg = torch.addcmul(dg, dh["weight_decay"], p)
        dm = ds["exp_avg"].lerp(dg, 1 - h["beta2"])
        if "beta2" in dh:
            dm.addcmul_(dh["beta2"], m - g)
        of_lr, of_wd = decay_slopes(self.decay, h, self.first_lr)
        out = dp * (1 - decay_factor(self.decay, h, self.first_lr))
        if "lr" in dh:
            sign = self._average(m, g, h["beta1"]).sign_()
            out.addcmul_(dh["lr"], torch.add(sign, p, alpha=of_lr), value=-1)
        if "weight_decay" in dh:
            out.addcmul_(dh["weight_decay"], p, value=-of_wd)
        return out, {"exp_avg": dm}

    # The transpose: λm = β₂ λm'    λg̃ = (1 − β₂) λm'    λβ₂ = λm' (m − g̃)    λβ₁ = 0
    # λη = −λp' sgn(…) − (w/η₀) p λp'    λw = −(η/η₀) p λp';  fixed: −p λp';  coupled: λg̃ p
    # λp = κ λp';  coupled: + w λg̃    λg = ±λg̃
    def vjp(
        self, p: Tensor, g: Tensor, s: Tensors, h: Scalars, lp: Tensor, ls: Tensors
    ) -> tuple[Tensor, Tensor, Tensors, Tensors]:
        g, m, lm = self._gradient(p, g, h), s["exp_avg"], ls["exp_avg"]
        sign, lg = self._average(m, g, h["beta1"]).sign_(), (1 - h["beta2"]) * lm
        of_lr, of_wd = decay_slopes(self.decay, h, self.first_lr)
        lh = {
            "lr": -lp * torch.add(sign, p, alpha=of_lr),
            "weight_decay": lg * p if self.decay == "coupled" else lp * p * -of_wd,
            "beta1": torch.zeros_like(lp),
            "beta2": lm * (m - g),
        }
        lp = lp * (1 - decay_factor(self.decay, h, self.first_lr))
        if self.decay == "coupled":
            lp = torch.add(lp, lg, alpha=h["weight_decay"])
        return lp, -lg if self.maximize else lg, {"exp_avg": h["beta2"] * lm}, lh


def decay_of(group: Mapping[str, Any]) -> Decay:
    """What pytorch_optimizer's two flags say."""
    if not group["weight_decouple"]:
        return "coupled"
    return "fixed" if group["fixed_decay"] else "decoupled"


def decay_factor(decay: Decay, h: Scalars, first_lr: float = 1.0) -> float:
    """1 − κ."""
    w = h["weight_decay"] / first_lr
    return {"decoupled": h["lr"] * w, "fixed": h["weight_decay"], "coupled": 0.0}[decay]


def decay_slopes(decay: Decay, h: Scalars, first_lr: float = 1.0) -> tuple[float, float]:
    """−dκ in η and in w."""
    w = h["weight_decay"] / first_lr
    return {"decoupled": (w, h["lr"] / first_lr), "fixed": (0.0, 1.0), "coupled": (0.0, 0.0)}[decay]
