"""Forward mode: tangents of the whole state, pushed along with the training steps.

With the step s' = Φ(s, h) made of g = ∇_θ ℓ(θ, h) and s' = U(s, g, h), the tangent z = ds/dh_j follows

    dg = H z_θ + (∂g/∂h) ḣ          one Hessian product a direction; all directions share one graph
    z' = (∂U/∂s) z + (∂U/∂g) dg + (∂U/∂h) ḣ

and the hypergradient is ∂L/∂θ · z_θ + ∂L/∂h · ḣ. Memory: a few copies of θ a direction, whatever the number of steps.
(Franceschi et al. 2017, arXiv 1703.01785, section 3.2.)
"""

from __future__ import annotations

from hypergrad.differentiate.diagnostics import Meter
from hypergrad.differentiate.one_step import pushed
from hypergrad.differentiate.trajectory import Result, Stretch, evaluation
from hypergrad.optimizers.binding import State
from hypergrad.optimizers.transition import Tangent


def forward(stretch: Stretch) -> Result:
    """Hypergradient of a stretch of training by forward mode."""
    transition, directions = stretch.transition, stretch.directions
    directions.fine.check_forward(directions.shapes)
    state = transition.read()
    tangent = Tangent.zeros(state, len(directions))
    value, total = state.theta.new_zeros(()), state.theta.new_zeros(len(directions))
    direct = directions.zeros()
    alive = [False] * len(directions)  # whether a direction's tangent of θ has become other than zero
    with evaluation(stretch) as meter:
        for t in range(len(stretch.batches) + 1):
            if t in stretch.val_steps:
                share = stretch.validate(t, state)
                value, total = value + share.value, total + share.along(tangent)
                stretch.add_direct(direct, share.direct)
            if t == len(stretch.batches):
                break
            if stretch.compiled is not None:
                state, tangent = stretch.compiled.push(state, t, tangent, meter)
                if t + 1 in stretch.val_steps:
                    transition.load(state.theta)
            else:
                alive = _alive(stretch, t, tangent, alive)
                state, tangent = _pushed(stretch, state, t, tangent, alive, meter)
                transition.load(state.theta)
            meter.norm(tangent.theta)
        gradients = {name: x + direct[name] for name, x in directions.pack(total).items()}
        return Result(value, gradients, meter.stats(len(stretch.batches), usual=len(stretch.batches)))


def _alive(stretch: Stretch, t: int, tangent: Tangent, known: list[bool]) -> list[bool]:
    """Which directions' tangents are not zero. One that is not is so for good: after the first steps nothing is read."""
    begun = [entry.step is None or entry.step < t for entry in stretch.directions.entries]
    if t == 0 or all(a or not b for a, b in zip(known, begun, strict=True)):
        return known
    return (tangent.theta != 0).any(dim=1).tolist()


def _pushed(
    stretch: Stretch, state: State, t: int, tangent: Tangent, alive: list[bool], meter: Meter
) -> tuple[State, Tangent]:
    """State and tangents after step t. A direction that is still zero costs nothing."""
    directions = stretch.directions
    lin = stretch.problem.linearize(stretch.batches[t])
    extras = [directions.into_loss(j, t) for j in range(len(directions))]
    push = pushed(stretch, state, t, lin, tangent, extras, alive, *directions.seeds(t))
    meter.gradients += 1
    meter.products += sum(a or e is not None for a, e in zip(alive, extras, strict=True))
    meter.look_for_ill_conditioning(stretch, state, push.g, t)
    return push.state, push.tangent
