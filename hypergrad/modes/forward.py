"""Forward mode: tangents of the whole state, pushed along with the training steps.

With the step s' = Φ(s, h) made of g = ∇_θ ℓ(θ, h) and s' = U(s, g, h), the tangent z = ds/dh_j follows

    dg = H z_θ + (∂g/∂h) ḣ          one Hessian product a direction; all directions share one graph
    z' = (∂U/∂s) z + (∂U/∂g) dg + (∂U/∂h) ḣ

and the hypergradient is ∂L/∂θ · z_θ + ∂L/∂h · ḣ. Memory: a few copies of θ a direction, whatever the number of steps.
(Franceschi et al. 2017, arXiv 1703.01785, section 3.2.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from hypergrad.graph import Linearization
from hypergrad.modes.stretch import Meter, Result, Stretch, evaluation
from hypergrad.updates.transition import Tangent


def forward(stretch: Stretch) -> Result:
    """Hypergradient of a stretch of training by forward mode."""
    problem, transition, directions = stretch.problem, stretch.transition, stretch.directions
    directions.fine.check_forward(directions.shapes)
    state = transition.read()
    tangent = Tangent.zeros(state, len(directions))
    value, total = state.theta.new_zeros(()), state.theta.new_zeros(len(directions))
    direct = directions.zeros()
    with evaluation(stretch) as meter:
        for t in range(len(stretch.batches) + 1):
            if t in stretch.val_steps:
                share = stretch.validate(t, state)
                value, total = value + share.value, total + share.along(tangent)
                stretch.add_direct(direct, share.direct)
            if t == len(stretch.batches):
                break
            lin = problem.linearize(stretch.batches[t])
            dg, dstats = _gradient_tangent(stretch, lin, tangent, t, meter)
            g, values = stretch.gradient(lin), stretch.values[t]
            meter.look_for_ill_conditioning(stretch, state, g, t)
            seeds, clip_seed = directions.seeds(t)
            tangent = transition.jvp(state, g, lin.active, values, tangent, dg, seeds, clip_seed)
            tangent = directions.fine.pushed(tangent, directions.fine_rows(t), state, g, lin.active, values)
            tangent.stats = dstats
            state = transition.step(state, g, lin.active, values)
            del lin  # its graph, before the next one is built
            transition.load(state.theta)
            meter.norm(tangent.theta)
        gradients = {name: x + direct[name] for name, x in directions.pack(total).items()}
        return Result(value, gradients, meter.stats(len(stretch.batches)))


def _gradient_tangent(
    stretch: Stretch, lin: Linearization, tangent: Tangent, t: int, meter: Meter
) -> tuple[Tensor, Tensor | None]:
    """dg [k, n], and the tangent of the running statistics after the step. A direction that is still zero costs nothing."""
    transition, directions, z, u = stretch.transition, stretch.directions, tangent.theta, lin.decay is not None
    meter.gradients += 1
    dg, dstats, n = torch.zeros_like(z), None, len(transition.params)
    if lin.decay is not None:  # b' = d ∘ b + S(θ)
        dstats = z.new_zeros(len(directions), len(lin.decay)) if tangent.stats is None else tangent.stats * lin.decay
    alive = (z != 0).any(dim=1).tolist()
    for j in range(len(directions)):
        extra = directions.into_loss(j, t)
        if alive[j] or extra is not None:
            meter.products += 1
            extra = None if extra is None else extra + [None] * u
            rows = lin.jvp(transition.split(z[j]), extra, into_extra=u)
            dg[j] = transition.flatten(rows[:n])
            if dstats is not None and rows[-1] is not None:
                dstats[j] += rows[-1]
    return dg, dstats
