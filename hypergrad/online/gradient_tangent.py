"""The tangent of a batch's gradient: for each tuned number H z, and what the number itself, in the loss, does to the gradient."""

from __future__ import annotations

from torch import Tensor

from hypergrad.core.graph import Linearization
from hypergrad.online.hyper_vector import HyperVector
from hypergrad.optimizers.transition import Tangent, Transition


def gradient_tangent(
    lin: Linearization,
    vector: HyperVector,
    transition: Transition,
    tangent: Tangent | None,
    n_others: int,
    retain: bool,
) -> tuple[Tensor | None, int]:
    """dg/dφ [k, n] (None: zero), and how many products were formed.

    Args:
        lin: of the loss; its extra leaves are the tensors in the loss, and `n_others` more.
        tangent: dθ/dφ; None: zero.
        retain: keep the graph.
    """
    directions = vector.tuned
    slope = vector.slope()[vector.moving].tolist() if vector.hypers else []
    jobs = []
    for j in range(len(directions)):
        extra = directions.into_loss(j, 0)
        if extra is not None:
            extra = [None if x is None else x * slope[j] for x in extra] + [None] * n_others
        if extra is not None or tangent is not None:
            jobs.append((j, extra))
    dg: Tensor | None = None
    nothing: list[Tensor | None] = [None] * len(transition.params)
    for i, (j, extra) in enumerate(jobs):
        z = nothing if tangent is None else transition.split(tangent.theta[j])
        product = lin.jvp(z, extra, retain=retain or i + 1 < len(jobs))
        if dg is None:  # not before, as the first product takes memory of its own
            dg = transition.params[0].detach().new_zeros(len(directions), sum(transition.sizes))
        transition.flatten(product, out=dg[j])
        del product
    return dg, len(jobs)
