r"""Weight decay's start is a hint: it is brought to a size that makes sense in what is left of the run.

The share of the weights that decay would take away over the rest of the run, if nothing else moved them, is about 1 − exp(−D),

    D = rate / (1 − momentum) · Σ_s shape_s / shape_t          rate = −θᵀz / θᵀθ,   z = dθ/dlog wd of this step

with z found by one step of forward mode from tangents of zero: it is what decay does in this step, −rate · θ. Where D is below
`little` decay does nothing in this run, above `much` the run forgets its own beginning: a factor on weight decay brings D into
[little, much]. While it is tuned it keeps D within [least, most], unless the user gave bounds of their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hypergrad.core.readout import Readout
from hypergrad.online.hyper_vector import HyperVector
from hypergrad.online.policies.momentum_start import largest_momentum
from hypergrad.online.policies.policy import Policy
from hypergrad.optimizers.binding import State, Values
from hypergrad.optimizers.transition import Tangent, Transition


class Sized(NamedTuple):
    """Number j times `factor`, then kept within these factors of that; None: no bounds."""

    j: int
    factor: float
    bounds: tuple[float, float] | None


@dataclass(frozen=True)
class WeightDecaySizing(Policy):
    """At the end of lr's warm start, and where the phase begins in which weight decay is tuned."""

    little: float = 0.1
    much: float = 0.5
    least: float = 0.01
    most: float = 50.0

    def factor(self, decayed: float) -> float:
        """The factor on weight decay that brings D = `decayed` into [little, much].

        Example:
            >>> factor = WeightDecaySizing().factor
            >>> factor(0.3), factor(5.0), factor(0.01)
            (1.0, 0.1, 10.0)
        """
        if not (decayed > 0 and math.isfinite(decayed)):
            return 1.0
        return min(max(decayed, self.little), self.much) / decayed

    def sized(
        self,
        vector: HyperVector,
        i: int,
        state: State,
        g: Tensor,
        active: tuple[bool, ...],
        values: Values,
        slopes: Tensor,
        left: float,
        readout: Readout,
    ) -> list[Sized]:
        """The weight decays of optimizer i whose start is a hint, sized by the step that it is about to take.

        Args:
            slopes: dx/dφ [k] of this step's values.
            left: Σ_s shape_s / shape_t over the steps s from this one, t, to the last.
            readout: a new one.
        """
        transition = vector.transition
        mine = [x == i for x in transition.optimizer_of_group]
        momenta = [x if m else None for x, m in zip(values.get("momentum", []), mine)]
        momentum = largest_momentum({"momentum": momenta}, transition.rules)
        hints = [j for j in range(len(vector)) if self._is_hint(vector, j, mine)]
        sums = self._along_weights(transition, vector, state, g, active, values, slopes)
        for j in hints:
            readout.ask(f"{j}", sums[j])
        found = []
        for j, (product, square) in zip(hints, readout.fetch().values(), strict=True):
            rate = -product / max(square, 1e-300)
            decayed = rate / (1 - momentum) * left
            factor = self.factor(decayed)
            bounds = None
            if j in vector.moving and 0 < decayed < math.inf and vector.kinds[j].bounds is None:
                bounds = self.least / (factor * decayed), self.most / (factor * decayed)
            found.append(Sized(j, factor, bounds))
        return found

    @staticmethod
    def _is_hint(vector: HyperVector, j: int, mine: Sequence[bool]) -> bool:
        entry = vector.entries[j]
        hint = entry.name == "weight_decay" and not vector.given[j]
        return hint and entry.group is not None and mine[entry.group]

    @staticmethod
    def _along_weights(
        transition: Transition,
        vector: HyperVector,
        state: State,
        g: Tensor,
        active: Any,
        values: Values,
        slopes: Tensor,
    ) -> Tensor:
        """θᵀz and θᵀθ [k, 2] over the weights where z is not 0, z what each number alone does to θ in this step.

        Momentum adds to z later.
        """
        seeds, _ = vector.directions.seeds(0, slopes.to(state.theta))
        nothing = state.theta.new_zeros(1, 1)  # tangents of 0 that take no memory
        k = len(vector.directions)
        zero = Tangent(
            nothing.expand(k, len(state.theta)), {name: nothing.expand(k, x.numel()) for name, x in state.slots.items()}
        )
        sums = state.theta.new_zeros(k, 2)
        for span, dp, _ in transition.jvp_by_range(state, g, active, values, zero, zero.theta, seeds):
            for j, z in enumerate(span.flat(dp)):
                theta = torch.where(z == 0, 0, span.of(state.theta).reshape(-1))
                sums[j] += torch.stack([theta @ z, theta @ theta])
        return sums
