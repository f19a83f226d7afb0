"""Where momentum is large, a product stands for the steps without one too: it is weighted, as far as that is stable.

With products in one step of s, and H z taken for 0 in the steps between (plan.py), tangents lose by curvature an s-th of what
they should. With a momentum of 0.9 that does no harm. With a larger one tangents grow until curvature stops them, which then
takes s times as long: what noise adds to the weights is counted for too long, lr is moved far down, and momentum, if it is
tuned, to 1 (Fashion-MNIST from 37 starts: the log, twelfth session). So where momentum, or β₁, of a group is above HEAVY

    dg = c H z        c = min(max(−zᵀu/uᵀu, 1), s)        u = v (1 + m + … + mˢ⁻¹)

for each number, m being the largest momentum or β₁, v what H z itself adds to z in this step, and so u what it has added, through
velocity, when the next product comes. s would make up for the steps between, and −zᵀu/uᵀu is the c with the smallest |z + c u|:
in directions of large curvature, where s is too much, tangents shrink and do not swing. It takes the optimizer's part of a step
once more in steps with products, and memory for the tangents of one number more, after the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hypergrad.optimizers.binding import State, Values
from hypergrad.optimizers.group_values import part_of
from hypergrad.optimizers.rule import Tensors
from hypergrad.optimizers.transition import Tangent, Transition

HEAVY = 0.9  # momentum above this


def heaviest(values: Values) -> float:
    """The largest momentum or β₁ of a group; 0 where there is none.

    Args:
        values: numbers of the param groups; None where a group has none.

    Example:
        >>> heaviest({"lr": [0.1], "momentum": [0.9]}), heaviest({"betas": [None, (0.95, 0.999)]}), heaviest({})
        (0.9, 0.95, 0.0)
    """
    names = ("momentum", "momentum"), ("betas", "beta1")
    found = [part_of(x, name, part) for name, part in names for x in values.get(name, [])]
    return max((float(x) for x in found if x is not None), default=0.0)


def weighted(
    dg: Tensor,
    stride: int,
    transition: Transition,
    step: tuple[State, Tensor, tuple[bool, ...], Values],
    tangent: Tangent,
    seeds: Sequence[Tensors],
) -> Tensor:
    """c times the tangent of the gradient [k, n].

    Args:
        stride: s.
        step: state, gradient, active optimizers and values of the step that it is for.
        tangent: dθ/dφ and ds/dφ before it.
        seeds: tangents of the groups' scalars in it, for their shapes.
    """
    nothing = [{name: torch.zeros_like(x[:1]) for name, x in group.items()} for group in seeds]
    weights: list[Tensor] = []
    for j in range(len(dg)):  # a number at a time: memory for one
        zero = Tangent.zeros(step[0], 1)
        v = transition.jvp(*step, zero, dg[j : j + 1], nothing, in_place=True).theta[0]
        weights.append(-(tangent.theta[j] @ v) / (v @ v))
    m = heaviest(step[3])
    c = torch.stack(weights) / sum(m**i for i in range(stride))
    c = c.nan_to_num(1.0).clamp(1.0, float(stride))
    return dg * c.unsqueeze(-1)
