"""Forward mode: tangents of the whole state, carried along with the training steps.

With the step s' = Φ(s, h) made of g = ∇_θ ℓ(θ, h) and s' = U(s, g, h), the tangent z = ds/dh_j follows

    dg = H z_θ + (∂g/∂h) ḣ          one Hessian product a direction; all directions share one graph
    z' = (∂U/∂s) z + (∂U/∂g) dg + (∂U/∂h) ḣ

and the hypergradient is ∂L/∂θ · z_θ + ∂L/∂h · ḣ. Memory: a few copies of θ a direction, whatever the number of steps.
(Franceschi et al. 2017, arXiv 1703.01785, section 3.2.)
"""

from __future__ import annotations

from hypergrad.differentiate.evaluation import evaluation
from hypergrad.differentiate.stepper import Stepper
from hypergrad.differentiate.trajectory import Result, Trajectory
from hypergrad.optimizers.transition import Tangent


def forward(trajectory: Trajectory, stepper: Stepper) -> Result:
    """Hypergradient of a trajectory of training by forward mode."""
    directions = trajectory.directions
    directions.fine.check_forward(directions.shapes)
    state = trajectory.transition.read()
    tangent = Tangent.zeros(state, len(directions))
    value, total = state.theta.new_zeros(()), state.theta.new_zeros(len(directions))
    direct = directions.zeros()
    with evaluation(trajectory) as diagnostics:
        for t in range(len(trajectory.batches) + 1):
            if t in trajectory.val_steps:
                stepper.load(state)
                share = trajectory.validate(t, state)
                value, total = value + share.value, total + share.along(tangent)
                trajectory.add_direct(direct, share.direct)
            if t == len(trajectory.batches):
                break
            state, tangent = stepper.jvp(state, t, tangent, diagnostics)
            diagnostics.norm(tangent.theta)
        total = trajectory.problem.processes.mean(total)  # running statistics are each process's own
        gradients = {name: x + direct[name] for name, x in directions.pack(total).items()}
        return Result(value, gradients, diagnostics.stats(len(trajectory.batches), usual=len(trajectory.batches)))
