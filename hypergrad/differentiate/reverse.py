"""Unrolled mode: the adjoint of the recorded steps, backwards, every hyperparameter at once.

With λ = dL/ds after a step, the same before it and the hypergradient's share of that step are

    λ_s, λ_g, λ_h = Uᵀ λ             analytically, from the state before the step and its gradient
    λ_θ += H λ_g     λ_h += (∂g/∂h)ᵀ λ_g        one Hessian product for all of them

Where the graphs of all steps fit into a budget of memory they are kept: one gradient a step. Otherwise a state is kept every c
steps (default √K), and the steps between are replayed with the same code, random numbers and buffers, so that memory is about
2√K states, of which all but a few may lie elsewhere (checkpoints.py). Of the replayed steps those graphs are kept that fit, which
spares each its third gradient. Losses and a digest of θ per segment tell whether the replay was the same. (Maclaurin et al.
2015, arXiv 1502.03492; Griewank & Walther 2000.)
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from hypergrad.core.graph import Linearization
from hypergrad.differentiate.checkpoints import Checkpoint, Stack, Stacks, default_every, fetch
from hypergrad.differentiate.compile.compiled import Compiled
from hypergrad.differentiate.diagnostics import Diagnostics
from hypergrad.differentiate.one_step import StepVJP, step_vjp
from hypergrad.differentiate.tape import Tape
from hypergrad.differentiate.trajectory import Result, Trajectory, evaluation
from hypergrad.optimizers.binding import State
from hypergrad.optimizers.rule import Tensors, parts
from hypergrad.optimizers.transition import CLIPS, Tangent

GRAPH_MEMORY = 2**30  # bytes


def unrolled(
    trajectory: Trajectory,
    every: int | None = None,
    graph_memory: float = GRAPH_MEMORY,
    offload: str | Path | None = None,
    below: float | None = None,
) -> Result:
    """Hypergradient of a trajectory of training by the adjoint.

    Args:
        every: steps between checkpoints; no graphs are kept then. None: graphs of all steps where they fit; else √K.
        graph_memory: bytes that graphs may take up: those of all steps, or as many as fit of the steps that are replayed.
        offload: where checkpoints go besides the newest few (see checkpoints.py).
        below: where the validation loss is not at most this, there is no way back, and gradients are NaN.
    """
    if every is not None and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
        raise ValueError(f"every must be a whole number of steps from 1, got {every!r}.")
    if not isinstance(graph_memory, (int, float)) or isinstance(graph_memory, bool) or not graph_memory >= 0:
        raise ValueError(f"graph_memory must be a number of bytes from 0, got {graph_memory!r}.")
    with Stacks(offload, trajectory.problem.device) as stacks, evaluation(trajectory) as diagnostics:
        budget = graph_memory if every is None and trajectory.compiled is None else 0
        keep = budget > 0 and offload is None
        steps, at = len(trajectory.batches), Checkpoint(trajectory.transition.read(), trajectory.problem.read_buffers())
        if (
            every is None and offload is None and trajectory.compiled is not None
        ):  # a state and a gradient of every step
            every = 1 if steps * (at.state.nbytes() + at.state.theta.nbytes) <= graph_memory else None
        tape = Tape(1 if keep else every or stacks.default_every(steps, at.nbytes()), stacks.new(), stacks.of_a_segment)
        del at
        tape.keeps_gradients = tape.every == 1 and offload is None and trajectory.compiled is not None
        record(trajectory, tape, diagnostics, budget, below is not None)
        value = sum(tape.values, trajectory.transition.params[0].new_zeros(()))
        if below is not None and not float(value) <= below:
            nothing = {name: torch.full_like(g, math.nan) for name, g in trajectory.directions.zeros().items()}
            return Result(value, nothing, diagnostics.stats(len(trajectory.batches)))
        return adjoint(trajectory, tape, diagnostics)


def record(
    trajectory: Trajectory, tape: Tape, diagnostics: Diagnostics, graph_memory: float = 0, watch: bool = False
) -> None:
    """Train through the trajectory on the user's model, in place, and keep what the adjoint needs. `watch`: and the objective."""
    steps, problem, watched = len(trajectory.batches), trajectory.problem, trajectory.val_steps if watch else ()
    state, before = trajectory.transition.read(), problem.read_buffers()
    for t in range(steps):
        if t in watched:
            if trajectory.compiled is not None:
                trajectory.transition.load(state.theta)
            tape.values.append(trajectory.validate(t, state).value)
        at = Checkpoint(state, problem.read_buffers())
        if t % tape.every == 0:
            tape.checkpoints.append(at)
        elif (t + 1) % tape.every == 0 or t == steps - 1:
            tape.digests.append(at.digest())
        tape.note_rng(problem.rng())
        if trajectory.compiled is not None:
            state, played = trajectory.compiled.step(state, t, diagnostics)
            tape.losses.append(played.loss)
            if tape.keeps_gradients:
                tape.gradients[t] = played.g
            continue
        if t == 0 and graph_memory > 0:
            lin = sized(trajectory, tape, at, graph_memory)
        else:
            lin = problem.linearize(trajectory.batches[t], products=tape.spare >= steps)
        keep = tape.spare >= steps
        if keep:
            tape.graphs[t] = lin
        state = advance(trajectory, state, t, lin, diagnostics, graphs_stay=keep)
        tape.losses.append(lin.loss)
    tape.checkpoints.append(Checkpoint(state, problem.read_buffers()))
    if trajectory.compiled is not None:
        trajectory.transition.load(state.theta)
    diagnostics.moved = problem.unfollowed_since(before)
    if steps in watched:
        tape.values.append(trajectory.validate(steps, state).value)


def sized(trajectory: Trajectory, tape: Tape, at: Checkpoint, graph_memory: float) -> Linearization:
    """Step 0's gradient. The tape has from here how many steps' graphs are kept: all, or at most those of a segment's replay."""
    lin, steps = trajectory.problem.linearize(trajectory.batches[0]), len(trajectory.batches)
    if tape.every == 1 and steps * (lin.nbytes() + at.state.nbytes()) <= graph_memory:
        tape.spare = steps
        return lin
    if tape.every == 1:
        tape.every = default_every(steps)
    tape.spare = min(int(graph_memory // lin.nbytes()), tape.every - 1) if lin.exact else 0
    if lin.exact:
        return lin
    restore(trajectory, at)  # once more, for a gradient that is a replay's to the last bit
    tape.rng[0].restore()
    return trajectory.problem.linearize(trajectory.batches[0], products=False)


def train(
    trajectory: Trajectory, state: State, t: int, diagnostics: Diagnostics, keep: bool = False
) -> tuple[State, Linearization]:
    """One training step from a state whose parameters and buffers are in the model. The next state, and the gradient.

    `keep`: with its graph, which stays.
    """
    lin = trajectory.problem.linearize(trajectory.batches[t], products=keep)
    return advance(trajectory, state, t, lin, diagnostics, graphs_stay=keep), lin


def advance(
    trajectory: Trajectory,
    state: State,
    t: int,
    lin: Linearization,
    diagnostics: Diagnostics,
    graphs_stay: bool = False,
) -> State:
    """The optimizer's step with the gradient in hand, and the next state in the model."""
    g = trajectory.gradient(lin)
    diagnostics.look_for_ill_conditioning(trajectory, state, g, t)
    state = trajectory.transition.step(state, g, lin.active, trajectory.values[t])
    trajectory.transition.load(state.theta, silently=graphs_stay)
    diagnostics.gradients += 1
    return state


def replay(trajectory: Trajectory, tape: Tape, segment: int, diagnostics: Diagnostics) -> Stack:
    """The states before each step of a segment, from its checkpoint; compiled, also its gradients."""
    first, last = segment * tape.every, min((segment + 1) * tape.every, len(trajectory.batches))
    states, at, compiled = tape.new_stack(), tape.checkpoints.pop(), trajectory.compiled
    if compiled is not None:
        if first not in tape.gradients:
            trajectory.problem.write_buffers(at.buffers)
        for t in range(first, last):
            states.append(at)
            if t in tape.gradients:
                continue
            tape.rng[t].restore()
            if t == last - 1 and not tape.same(segment, at):
                diagnostics.not_replayed(t)
            state, (tape.played[t], tape.gradients[t]) = compiled.step(at.state, t, diagnostics)
            at = Checkpoint(state, trajectory.problem.read_buffers())
        return states
    if first < last - 1:
        restore(trajectory, at)
    for t in range(first, last - 1):
        states.append(at)
        tape.rng[t].restore()
        keep = last - 1 - t <= tape.spare
        state, lin = train(trajectory, at.state, t, diagnostics, keep)
        tape.played[t] = lin.loss
        if keep:
            tape.graphs[t] = lin
        at = Checkpoint(state, trajectory.problem.read_buffers())
    if not tape.same(segment, at):
        diagnostics.not_replayed(last - 1)
    states.append(at)
    return states


def restore(trajectory: Trajectory, at: Checkpoint, graphs_stay: bool = False) -> None:
    trajectory.transition.load(at.state.theta, silently=graphs_stay)
    trajectory.problem.write_buffers(at.buffers, silently=graphs_stay)


def adjoint(trajectory: Trajectory, tape: Tape, diagnostics: Diagnostics) -> Result:
    """Run the adjoint over a recorded trajectory. The model's state on return is unspecified."""
    total, at = Total(trajectory), tape.checkpoints.pop()
    diagnostics.extra["replayed_exactly"] = True
    restore(trajectory, at, bool(tape.graphs))
    lam = total.validate(len(trajectory.batches), Tangent.zeros(at.state), at.state)
    for segment in reversed(range(len(tape.checkpoints))):
        states = replay(trajectory, tape, segment, diagnostics)
        while len(states):
            at, t = states.pop(), segment * tape.every + len(states)
            fetch(states if len(states) else tape.checkpoints)  # it comes while this step is step_vjp back
            tape.rng[t].restore()
            if trajectory.compiled is not None:
                lam = compiled_pull(trajectory, trajectory.compiled, at, t, lam, total, diagnostics, tape)
                continue
            restore(trajectory, at, bool(tape.graphs))
            lam = pull(trajectory, at.state, t, lam, total, diagnostics, tape)
            diagnostics.norm(lam.theta)
            if t in trajectory.val_steps:
                restore(trajectory, at, bool(tape.graphs))
                lam = total.validate(t, lam, at.state)
        tape.verify()
    diagnostics.extra["replay_mismatch"] = tape.mismatch
    return Result(total.value, total.gradients, diagnostics.stats(len(trajectory.batches)), trajectory.initial(lam))


def pull(
    trajectory: Trajectory, state: State, t: int, lam: Tangent, total: Total, diagnostics: Diagnostics, tape: Tape
) -> Tangent:
    """The adjoint before step t from that after it."""
    lin = tape.graphs.pop(t, None)
    if lin is not None:
        try:
            return pull_through(trajectory, state, t, lin, lam, total, diagnostics)
        except RuntimeError as error:  # what the graph keeps was written over by a later step: play this one again
            if "modified by an inplace operation" not in str(error):
                raise
            tape.rng[t].restore()
    lin = trajectory.problem.linearize(trajectory.batches[t])
    tape.played[t] = lin.loss
    diagnostics.gradients += 1
    return pull_through(trajectory, state, t, lin, lam, total, diagnostics)


def compiled_pull(
    trajectory: Trajectory,
    compiled: Compiled,
    at: Checkpoint,
    t: int,
    lam: Tangent,
    total: Total,
    diagnostics: Diagnostics,
    tape: Tape,
) -> Tangent:
    """The same by a graph, and what the loop does after it."""
    trajectory.problem.write_buffers(at.buffers)
    pull, tape.played[t], norm = compiled.pull(at.state, t, tape.gradients.pop(t), lam, diagnostics)
    total.add(t, pull)
    diagnostics.norm(pull.lam.theta, norm)
    if t in trajectory.val_steps:
        restore(trajectory, at)
        return total.validate(t, pull.lam, at.state)
    return pull.lam


def pull_through(
    trajectory: Trajectory,
    state: State,
    t: int,
    lin: Linearization,
    lam: Tangent,
    total: Total,
    diagnostics: Diagnostics,
    retain: bool = False,
) -> Tangent:
    """The same through a gradient stage in hand. `retain`: keep its graph for one more."""
    pull = step_vjp(trajectory, state, t, lin, lam, trajectory.gradient(lin), retain)
    diagnostics.products += 1
    total.add(t, pull)
    return pull.lam


class Total:
    """The objective and its gradient arrays, summed over steps."""

    def __init__(self, trajectory: Trajectory):
        self.trajectory = trajectory
        self.value = trajectory.transition.params[0].new_zeros(()).detach()
        self.gradients = trajectory.directions.zeros()

    def validate(self, t: int, lam: Tangent, state: State) -> Tangent:
        if t not in self.trajectory.val_steps:
            return lam
        share = self.trajectory.validate(t, state)
        self.value = self.value + share.value
        self.trajectory.add_direct(self.gradients, share.direct)
        return share.added_to(lam)

    def add(self, t: int, pull: StepVJP) -> None:
        """Step t's share."""
        directions, fine, lam_h, lam_clip = self.trajectory.directions, pull.fine, pull.of_groups, pull.of_clip
        scheduled = directions.schedules.pull(t, lambda name: self._shares(name, lam_h, lam_clip))
        in_loss = dict(zip(self.trajectory.problem.hypers, pull.of_hypers, strict=True))
        for name, array in self.gradients.items():
            target = array if directions.steps is None else array[t]
            if name in self.trajectory.problem.hypers:
                for g in (in_loss[name], scheduled.get(name)):
                    target += 0 if g is None else g
            elif name in directions.fine.per:
                if fine:
                    target += torch.stack([fine[part] for part in parts(name)], -1).view(target.shape)
            else:
                target += self._shares(name, lam_h, lam_clip).view(target.shape)

    def _shares(self, name: str, lam_h: list[Tensors], lam_clip: Tensor | None) -> Tensor:
        """The derivative in a name: [n_groups], [n_groups, 2] of betas, [] of what belongs to no group."""
        if name in CLIPS:
            return self.value.new_zeros(()) if lam_clip is None else lam_clip
        if name in self.trajectory.directions.ungrouped:  # the average's decay
            return torch.as_tensor(lam_h[0].get(name, 0)).to(self.value)
        rows = [[torch.as_tensor(lam.get(part, 0)).to(self.value) for part in parts(name)] for lam in lam_h]
        return torch.stack([torch.stack(row) for row in rows]).squeeze(-1)
