"""Steps of a trajectory by the eager code: the user's loss, double backward and the update rules, one step at a time."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hypergrad.core.graph import Linearization
from hypergrad.core.restore import Rng
from hypergrad.differentiate.checkpoints import Checkpoint
from hypergrad.differentiate.diagnostics import Diagnostics
from hypergrad.differentiate.offload import Stacks
from hypergrad.differentiate.one_step import StepVJP, nonzero_tangents, step_jvp, step_vjp
from hypergrad.differentiate.tape import TapePlan
from hypergrad.differentiate.trajectory import Trajectory
from hypergrad.optimizers.binding import State
from hypergrad.optimizers.transition import Tangent


class EagerStepper:
    """See `Stepper`. Parameters are in the model before and after a step; kept of a step is the graph of its gradient."""

    def __init__(self, trajectory: Trajectory):
        self.trajectory = trajectory
        self.graphs: dict[int, Linearization] = {}
        self.first: Linearization | None = None  # step 0's gradient, from `plan` until that step is taken
        self.nonzero: list[bool] = []  # whether a direction's tangent of θ has become other than zero

    def plan(self, at: Checkpoint, rng: Rng, stacks: Stacks, every: int | None, graph_memory: float) -> TapePlan:
        """Graphs of all steps where they fit, measured by step 0's; else of as many replayed steps of a segment as fit."""
        trajectory, steps = self.trajectory, len(self.trajectory.batches)
        if every is not None:
            return TapePlan(every)
        every = stacks.default_every(steps, at.nbytes())
        if not graph_memory > 0:
            return TapePlan(every)
        self.first = lin = trajectory.problem.linearize(trajectory.batches[0])
        if (every == 1 or not stacks.offloads) and steps * (lin.nbytes() + at.state.nbytes()) <= graph_memory:
            return TapePlan(1, whole=True)
        if lin.exact:
            return TapePlan(every, replayed=min(int(graph_memory // lin.nbytes()), every - 1))
        self.restore(at)  # once more, for a gradient that is a replay's to the last bit
        rng.restore()
        self.first = trajectory.problem.linearize(trajectory.batches[0], products=False)
        return TapePlan(every)

    def step(self, state: State, t: int, diagnostics: Diagnostics, keep: bool = False) -> tuple[State, Tensor]:
        trajectory = self.trajectory
        lin, self.first = self.first, None
        if lin is None:
            lin = trajectory.problem.linearize(trajectory.batches[t], products=keep)
        if keep:
            self.graphs[t] = lin
        g = trajectory.gradient(lin)
        diagnostics.observe_conditioning(trajectory.ill_conditioned_decay(state, g, t))
        state = trajectory.transition.step(state, g, lin.active, trajectory.values[t])
        trajectory.transition.load(state.theta, silently=keep)
        diagnostics.gradients += 1
        return state, lin.loss

    def vjp(self, at: Checkpoint, t: int, lam: Tangent, rng: Rng, diagnostics: Diagnostics) -> StepVJP:
        rng.restore()
        self.restore(at)
        lin = self.graphs.pop(t, None)
        if lin is not None:
            try:
                return self._vjp_through(lin, at.state, t, lam, diagnostics)
            except RuntimeError as error:  # a later step overwrote what the graph keeps: compute this one again
                if "modified by an inplace operation" not in str(error):
                    raise
                rng.restore()
        lin = self.trajectory.problem.linearize(self.trajectory.batches[t])
        diagnostics.gradients += 1
        return self._vjp_through(lin, at.state, t, lam, diagnostics)._replace(loss=lin.loss)

    def _vjp_through(self, lin: Linearization, state: State, t: int, lam: Tangent, diagnostics: Diagnostics) -> StepVJP:
        out = step_vjp(self.trajectory, state, t, lin, lam, self.trajectory.gradient(lin))
        diagnostics.products += 1
        return out

    def jvp(self, state: State, t: int, tangent: Tangent, diagnostics: Diagnostics) -> tuple[State, Tangent]:
        """A direction whose tangent is still zero costs nothing."""
        trajectory, directions = self.trajectory, self.trajectory.directions
        self.nonzero = nonzero_tangents(trajectory, t, tangent, self.nonzero)
        lin = trajectory.problem.linearize(trajectory.batches[t])
        extras = [directions.into_loss(j, t) for j in range(len(directions))]
        out = step_jvp(trajectory, state, t, lin, tangent, extras, self.nonzero, *directions.seeds(t))
        diagnostics.gradients += 1
        diagnostics.products += sum(a or e is not None for a, e in zip(self.nonzero, extras, strict=True))
        diagnostics.observe_conditioning(trajectory.ill_conditioned_decay(state, out.g, t))
        trajectory.transition.load(out.state.theta)
        return out.state, out.tangent

    def load(self, state: State) -> None:
        """Nothing to do: `step` and `jvp` have."""

    def restore(self, at: Checkpoint) -> None:
        self.trajectory.restore(at, silently=bool(self.graphs))

    def stats(self) -> dict[str, Any]:
        return {}
