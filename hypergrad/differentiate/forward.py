"""Forward mode: tangents of the whole state, step_jvp along with the training steps.

With the step s' = Φ(s, h) made of g = ∇_θ ℓ(θ, h) and s' = U(s, g, h), the tangent z = ds/dh_j follows

    dg = H z_θ + (∂g/∂h) ḣ          one Hessian product a direction; all directions share one graph
    z' = (∂U/∂s) z + (∂U/∂g) dg + (∂U/∂h) ḣ

and the hypergradient is ∂L/∂θ · z_θ + ∂L/∂h · ḣ. Memory: a few copies of θ a direction, whatever the number of steps.
(Franceschi et al. 2017, arXiv 1703.01785, section 3.2.)
"""

from __future__ import annotations

from hypergrad.differentiate.diagnostics import Diagnostics
from hypergrad.differentiate.one_step import step_jvp
from hypergrad.differentiate.trajectory import Result, Trajectory, evaluation
from hypergrad.optimizers.binding import State
from hypergrad.optimizers.transition import Tangent


def forward(trajectory: Trajectory) -> Result:
    """Hypergradient of a trajectory of training by forward mode."""
    transition, directions = trajectory.transition, trajectory.directions
    directions.fine.check_forward(directions.shapes)
    state = transition.read()
    tangent = Tangent.zeros(state, len(directions))
    value, total = state.theta.new_zeros(()), state.theta.new_zeros(len(directions))
    direct = directions.zeros()
    alive = [False] * len(directions)  # whether a direction's tangent of θ has become other than zero
    with evaluation(trajectory) as diagnostics:
        for t in range(len(trajectory.batches) + 1):
            if t in trajectory.val_steps:
                share = trajectory.validate(t, state)
                value, total = value + share.value, total + share.along(tangent)
                trajectory.add_direct(direct, share.direct)
            if t == len(trajectory.batches):
                break
            if trajectory.compiled is not None:
                state, tangent = trajectory.compiled.push(state, t, tangent, diagnostics)
                if t + 1 in trajectory.val_steps:
                    transition.load(state.theta)
            else:
                alive = _alive(trajectory, t, tangent, alive)
                state, tangent = _pushed(trajectory, state, t, tangent, alive, diagnostics)
                transition.load(state.theta)
            diagnostics.norm(tangent.theta)
        gradients = {name: x + direct[name] for name, x in directions.pack(total).items()}
        return Result(value, gradients, diagnostics.stats(len(trajectory.batches), usual=len(trajectory.batches)))


def _alive(trajectory: Trajectory, t: int, tangent: Tangent, known: list[bool]) -> list[bool]:
    """Which directions' tangents are not zero. One that is not is so for good: after the first steps nothing is read."""
    begun = [entry.step is None or entry.step < t for entry in trajectory.directions.entries]
    if t == 0 or all(a or not b for a, b in zip(known, begun, strict=True)):
        return known
    return (tangent.theta != 0).any(dim=1).tolist()


def _pushed(
    trajectory: Trajectory, state: State, t: int, tangent: Tangent, alive: list[bool], diagnostics: Diagnostics
) -> tuple[State, Tangent]:
    """State and tangents after step t. A direction that is still zero costs nothing."""
    directions = trajectory.directions
    lin = trajectory.problem.linearize(trajectory.batches[t])
    extras = [directions.into_loss(j, t) for j in range(len(directions))]
    push = step_jvp(trajectory, state, t, lin, tangent, extras, alive, *directions.seeds(t))
    diagnostics.gradients += 1
    diagnostics.products += sum(a or e is not None for a, e in zip(alive, extras, strict=True))
    diagnostics.look_for_ill_conditioning(trajectory, state, push.g, t)
    return push.state, push.tangent
