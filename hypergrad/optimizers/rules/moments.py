"""The two moments of the gradient that Adam, NAdam and RAdam keep, and their tangents.

g̃  = ±g + w p                    decoupled weight decay: ±g
m' = β₁ m + (1 − β₁) g̃           v' = β₂ v + (1 − β₂) g̃²
"""

from __future__ import annotations

import torch
from torch import Tensor

from hypergrad.optimizers.rule import Scalars, Tensors


def moments(
    p: Tensor, g: Tensor, s: Tensors, h: Scalars, maximize: bool, decoupled: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(g̃, m', v')."""
    g = -g if maximize else g
    if not decoupled:
        g = torch.add(g, p, alpha=h["weight_decay"])
    m = s["exp_avg"].lerp(g, 1 - h["beta1"])
    return g, m, s["exp_avg_sq"].mul(h["beta2"]).addcmul_(g, g, value=1 - h["beta2"])


# dg̃ = ±dg + w dp + dw p                       decoupled: ±dg
# dm' = β₁ dm + (1 − β₁) dg̃ + dβ₁ (m − g̃)      dv' = β₂ dv + 2 (1 − β₂) g̃ dg̃ + dβ₂ (v − g̃²)
def moment_tangents(
    p: Tensor,
    g: Tensor,
    s: Tensors,
    h: Scalars,
    dp: Tensor,
    dg: Tensor,
    ds: Tensors,
    dh: Tensors,
    maximize: bool,
    decoupled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dg̃, dm', dv'); g is g̃."""
    dg = -dg if maximize else dg
    if not decoupled:
        dg = torch.add(dg, dp, alpha=h["weight_decay"])
        if "weight_decay" in dh:
            dg.addcmul_(dh["weight_decay"], p)
    dm = ds["exp_avg"].lerp(dg, 1 - h["beta1"])
    dv = ds["exp_avg_sq"].mul(h["beta2"]).addcmul_(g, dg, value=2 * (1 - h["beta2"]))
    if "beta1" in dh:
        dm.addcmul_(dh["beta1"], s["exp_avg"] - g)
    if "beta2" in dh:
        dv.addcmul_(dh["beta2"], s["exp_avg_sq"] - g * g)
    return dg, dm, dv
