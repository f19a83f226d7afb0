"""Unrolled mode: the adjoint of the recorded steps, backwards, every hyperparameter at once.

With λ = dL/ds after a step, the same before it and the hypergradient's share of that step are

    λ_s, λ_g, λ_h = Uᵀ λ             analytically, from the state before the step and its gradient
    λ_θ += H λ_g     λ_h += (∂g/∂h)ᵀ λ_g        one Hessian product for all of them

Where the graphs of all steps fit into a budget of memory they are kept: one gradient a step. Otherwise a state is kept every c
steps (default √K), and the steps between are replayed with the same code, random numbers and buffers, so that memory is about
2√K states, of which all but a few may be offloaded (offload.py). Of the replayed steps as many graphs are kept as fit, which
saves each its third gradient. Losses and a digest of θ per segment tell whether the replay was the same. (Maclaurin et al.
2015, arXiv 1502.03492; Griewank & Walther 2000.)
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from hypergrad.core.restore import Rng
from hypergrad.differentiate.checkpoints import Checkpoint, Stack
from hypergrad.differentiate.diagnostics import Diagnostics
from hypergrad.differentiate.evaluation import evaluation
from hypergrad.differentiate.offload import Stacks, fetch
from hypergrad.differentiate.stepper import Stepper
from hypergrad.differentiate.tape import Tape
from hypergrad.differentiate.total import Total
from hypergrad.differentiate.trajectory import Result, Trajectory
from hypergrad.optimizers.binding import State
from hypergrad.optimizers.transition import Tangent

GRAPH_MEMORY = 2**30  # bytes


def unrolled(
    trajectory: Trajectory,
    stepper: Stepper,
    every: int | None = None,
    graph_memory: float = GRAPH_MEMORY,
    offload: str | Path | None = None,
    below: float | None = None,
) -> Result:
    """Hypergradient of a trajectory of training by the adjoint.

    Args:
        every: steps between checkpoints; no graphs are kept then. None: graphs of all steps where they fit; else √K.
        graph_memory: bytes that graphs may take up: those of all steps, or as many as fit of the steps that are replayed.
        offload: where checkpoints go besides the newest few (see offload.py).
        below: where the validation loss is not at most this, the adjoint is not computed, and gradients are NaN.
    """
    if every is not None and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
        raise ValueError(f"every must be a whole number of steps from 1, got {every!r}.")
    if not isinstance(graph_memory, (int, float)) or isinstance(graph_memory, bool) or not graph_memory >= 0:
        raise ValueError(f"graph_memory must be a number of bytes from 0, got {graph_memory!r}.")
    with Stacks(offload, trajectory.problem.device) as stacks, evaluation(trajectory) as diagnostics:
        run = Recording(trajectory, stepper, diagnostics, below is not None)
        tape = run.record(stacks, every, graph_memory)
        if below is not None and not float(run.objective()) <= below:
            diagnostics.differentiated = False
            nothing = {name: torch.full_like(g, math.nan) for name, g in trajectory.directions.zeros().items()}
            return Result(run.objective(), nothing, diagnostics.stats(len(trajectory.batches)))
        return adjoint(trajectory, stepper, tape, diagnostics)


class Recording:
    """Training through the trajectory on the user's model, in place. `validates`: with the objective on the way."""

    def __init__(self, trajectory: Trajectory, stepper: Stepper, diagnostics: Diagnostics, validates: bool):
        self.trajectory, self.stepper, self.diagnostics = trajectory, stepper, diagnostics
        self.val_steps = trajectory.val_steps if validates else ()
        self.values: list[Tensor] = []  # shares of the objective

    def record(self, stacks: Stacks, every: int | None, graph_memory: float) -> Tape:
        """Train, and keep what the adjoint needs."""
        problem, stepper, steps = self.trajectory.problem, self.stepper, len(self.trajectory.batches)
        state, buffers = self.trajectory.transition.read(), problem.read_buffers()
        at, rng = self._before(0, state)
        tape = Tape(*stepper.plan(at, rng, stacks, every, graph_memory), stacks.new(), stacks.of_a_segment)
        for t in range(steps):
            if t > 0:
                at, rng = self._before(t, state)
            tape.before_step(at, rng, last=t == steps - 1)
            state, loss = stepper.step(state, t, self.diagnostics, keep=tape.whole)
            tape.after_step(loss)
        tape.end(Checkpoint(state, problem.read_buffers()))
        stepper.load(state)
        self.diagnostics.moved = problem.unfollowed_since(buffers)
        self._validate(steps, state)
        return tape

    def _before(self, t: int, state: State) -> tuple[Checkpoint, Rng]:
        """What step t starts from."""
        self._validate(t, state)
        return Checkpoint(state, self.trajectory.problem.read_buffers()), self.trajectory.problem.rng()

    def _validate(self, t: int, state: State) -> None:
        if t in self.val_steps:
            self.stepper.load(state)
            self.values.append(self.trajectory.validate(t, state).value)

    def objective(self) -> Tensor:
        return sum(self.values, self.trajectory.transition.params[0].new_zeros(()))


def adjoint(trajectory: Trajectory, stepper: Stepper, tape: Tape, diagnostics: Diagnostics) -> Result:
    """Run the adjoint over a recorded trajectory. The model's state on return is unspecified."""
    total, at = Total(trajectory), tape.checkpoints.pop()
    diagnostics.extra["replayed_exactly"] = True
    stepper.restore(at)
    lam = total.validate(len(trajectory.batches), Tangent.zeros(at.state), at.state)
    for segment in reversed(range(len(tape.checkpoints))):
        states = replay(trajectory, stepper, tape, segment, diagnostics)
        while len(states):
            at, t = states.pop(), segment * tape.every + len(states)
            fetch(states if len(states) else tape.checkpoints)
            step = stepper.vjp(at, t, lam, tape.rng[t], diagnostics)
            tape.replayed_step(t, step.loss)
            total.add(t, step)
            diagnostics.norm(step.lam.theta, step.norm)
            lam = step.lam
            if t in trajectory.val_steps:
                stepper.restore(at)
                lam = total.validate(t, lam, at.state)
        tape.verify()
    diagnostics.extra["replay_mismatch"] = tape.mismatch
    return Result(total.value, total.gradients, diagnostics.stats(len(trajectory.batches)), trajectory.initial(lam))


def replay(trajectory: Trajectory, stepper: Stepper, tape: Tape, segment: int, diagnostics: Diagnostics) -> Stack:
    """The states before each step of a segment, from its checkpoint."""
    states, at, steps = tape.new_stack(), tape.checkpoints.pop(), tape.steps_of(segment)
    if len(steps) > 1:
        stepper.restore(at)
    for t in steps[:-1]:
        states.append(at)
        tape.rng[t].restore()
        state, loss = stepper.step(at.state, t, diagnostics, keep=steps[-1] - t <= tape.replayed)
        tape.replayed_step(t, loss)
        at = Checkpoint(state, trajectory.problem.read_buffers())
    if not tape.same(segment, at):
        diagnostics.not_replayed(steps[-1])
    states.append(at)
    return states
