"""An exponential moving average of the weights, a stage of the transition after the update rule.

    θ', s' = U(θ, s, g, h)
    a'     = d a + (1 − d) θ'          a₀ = θ₀

as `torch.optim.swa_utils.AveragedModel` with `get_ema_multi_avg_fn(d)` has it when it is updated once before training and once
after every step. The average is a slot of the state, laid out as θ; the decay is a number of the first param group's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hypergrad.optimizers.binding import State, Values
from hypergrad.optimizers.rule import Tensors
from hypergrad.optimizers.transition import Tangent, Transition

EMA = "ema"  # the name of the decay, and of the slot


def check_decay(d: float, what: str) -> float:
    if not 0 <= d <= 1:
        raise ValueError(f"{what} must be a decay from 0 to 1, got {d}.")
    return float(d)


class Averaged(Transition):
    """A transition with the average as its last stage."""

    def decays(self, d: float) -> Values:
        return {EMA: [d] + [None] * (len(self.groups) - 1)}

    def read(self) -> State:
        state = super().read()
        state.slots[EMA] = state.theta.clone()
        return state

    def step(self, state: State, g: Tensor, active: tuple[bool, ...], values: Values) -> State:
        new = super().step(state, g, active, values)
        new.slots[EMA] = state.slots[EMA].lerp(new.theta, 1 - values[EMA][0])
        return new

    # da' = d da + (1 − d) dθ' + dd (a − θ')
    def jvp(
        self,
        state: State,
        g: Tensor,
        active: tuple[bool, ...],
        values: Values,
        tangent: Tangent,
        dg: Tensor,
        seeds: Sequence[Tensors],
        *rest: Any,
    ) -> Tangent:
        out = super().jvp(state, g, active, values, tangent, dg, seeds, *rest)
        average = tangent.slots[EMA].lerp(out.theta, 1 - values[EMA][0])
        if EMA in seeds[0]:
            average.addcmul_(seeds[0][EMA], state.slots[EMA] - super().step(state, g, active, values).theta)
        out.slots[EMA] = average
        return out

    # The transpose: λd = λa'·(a − θ')    λa = d λa'    λθ' += (1 − d) λa'
    def vjp(
        self, state: State, g: Tensor, active: tuple[bool, ...], values: Values, adjoint: Tangent
    ) -> tuple[Tangent, Tensor, list[Tensors], Tensor | None]:
        d, lam = values[EMA][0], adjoint.slots[EMA]
        inner = Tangent(torch.add(adjoint.theta, lam, alpha=1 - d), adjoint.slots)
        out, lam_g, lam_h, lam_clip = super().vjp(state, g, active, values, inner)
        if EMA in self.wrt:
            lam_h[0][EMA] = lam @ (state.slots[EMA] - super().step(state, g, active, values).theta)
        out.slots[EMA] = d * lam
        return out, lam_g, lam_h, lam_clip
