"""Unrolled mode: the adjoint of the recorded steps, backwards, every hyperparameter at once.

With λ = dL/ds after a step, the same before it and the hypergradient's share of that step are

    λ_s, λ_g, λ_h = Uᵀ λ             analytically, from the state before the step and its gradient
    λ_θ += H λ_g     λ_h += (∂g/∂h)ᵀ λ_g        one Hessian product for all of them

Where the graphs of all steps fit into a budget of memory they are kept: one gradient a step. Otherwise a state is kept every c
steps (default √K), and the steps between are replayed with the same code, random numbers and buffers, so that memory is about
2√K states. (Maclaurin et al. 2015, arXiv 1502.03492; Griewank & Walther 2000.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hypergrad.graph import Linearization
from hypergrad.modes.stretch import Meter, Result, Stretch, evaluation
from hypergrad.problem import Rng, Saved
from hypergrad.updates.binding import State
from hypergrad.updates.rule import Tensors, parts
from hypergrad.updates.transition import CLIPS, Tangent

GRAPH_MEMORY = 2**30  # bytes
REPLAY_RTOL = 1e-3  # bit-identical on CPU; kernels on a GPU may add up in another order


@dataclass
class Snapshot:
    state: State
    buffers: list[Saved]


@dataclass
class Tape:
    """What a replay needs: states every c steps, and every step's random numbers; or every step's graph.

    Snapshot i was taken before step i·c; the last one is the state after the last step.
    """

    every: int
    graphs: list[Linearization] = field(default_factory=list)
    snapshots: list[Snapshot] = field(default_factory=list)
    rng: list[Rng] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)

    def verify(self, t: int, loss: Tensor) -> None:
        """Raise where step t, played again, does not have the loss it had."""
        if t < len(self.losses) and not torch.allclose(loss, self.losses[t], rtol=REPLAY_RTOL, atol=0, equal_nan=True):
            raise ValueError(
                f"step {t} is not deterministic: its loss was {float(self.losses[t]):.9g}, played again {float(loss):.9g}. Draw "
                "random numbers in the loss from torch's global generator (which is put back), not from numpy or a generator of "
                "your own, or use mode='forward', which plays nothing again."
            )


def default_every(steps: int) -> int:
    return max(1, math.isqrt(steps))


def unrolled(stretch: Stretch, every: int | None = None, graph_memory: int = GRAPH_MEMORY) -> Result:
    """Hypergradient of a stretch of training by the adjoint.

    Args:
        every: steps between snapshots. None: graphs are kept where they fit; else √K.
        graph_memory: bytes that graphs may take up.
    """
    if every is not None and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
        raise ValueError(f"every must be a whole number of steps from 1, got {every!r}.")
    if not isinstance(graph_memory, (int, float)) or isinstance(graph_memory, bool) or not graph_memory >= 0:
        raise ValueError(f"graph_memory must be a number of bytes from 0, got {graph_memory!r}.")
    with evaluation(stretch) as meter:
        tape = record(stretch, every, meter, graph_memory)
        if not tape.graphs:
            return adjoint(stretch, tape, meter)
        without = replace(tape, graphs=[], snapshots=list(tape.snapshots))
        try:
            return adjoint(stretch, tape, meter)
        except RuntimeError as error:  # what a step's graph keeps was written over by a later step: play it again
            if "modified by an inplace operation" not in str(error):
                raise
        return adjoint(stretch, without, meter)


def record(stretch: Stretch, every: int | None, meter: Meter, graph_memory: float = 0) -> Tape:
    """Train through the stretch on the user's model, in place, and keep what the adjoint needs."""
    steps, transition, problem = len(stretch.batches), stretch.transition, stretch.problem
    keep = every is None and graph_memory > 0
    tape, state = Tape(1 if keep else every or default_every(steps)), transition.read()
    for t in range(steps):
        if t % tape.every == 0:
            tape.snapshots.append(Snapshot(state, problem.read_buffers()))
        tape.rng.append(problem.rng())
        lin = problem.linearize(stretch.batches[t], products=keep)
        if t == 0 and keep and steps * (lin.nbytes() + state.nbytes()) > graph_memory:
            keep, tape.every = False, default_every(steps)
        if keep:
            tape.graphs.append(lin)
        state = advance(stretch, state, t, lin, meter, graphs_stay=keep)
        tape.losses.append(lin.loss)
    tape.snapshots.append(Snapshot(state, problem.read_buffers()))
    return tape


def train(stretch: Stretch, state: State, t: int, meter: Meter) -> tuple[State, Linearization]:
    """One training step from a state whose parameters and buffers are in the model. The next state, and the gradient."""
    lin = stretch.problem.linearize(stretch.batches[t], products=False)
    return advance(stretch, state, t, lin, meter), lin


def advance(
    stretch: Stretch, state: State, t: int, lin: Linearization, meter: Meter, graphs_stay: bool = False
) -> State:
    """The optimizer's step with the gradient in hand, and the next state in the model."""
    g = stretch.gradient(lin)
    meter.look_for_ill_conditioning(stretch, state, g, t)
    state = stretch.transition.step(state, g, lin.active, stretch.values[t])
    stretch.transition.load(state.theta, silently=graphs_stay)
    meter.gradients += 1
    return state


def replay(stretch: Stretch, tape: Tape, segment: int, meter: Meter) -> list[Snapshot]:
    """The states before each step of a segment, from its snapshot."""
    first, last = segment * tape.every, min((segment + 1) * tape.every, len(stretch.batches))
    states = [tape.snapshots[segment]]
    if first < last - 1:
        restore(stretch, states[0])
    for t in range(first, last - 1):
        tape.rng[t].restore()
        state, lin = train(stretch, states[-1].state, t, meter)
        tape.verify(t, lin.loss)
        states.append(Snapshot(state, stretch.problem.read_buffers()))
    return states


def restore(stretch: Stretch, at: Snapshot, graphs_stay: bool = False) -> None:
    stretch.transition.load(at.state.theta, silently=graphs_stay)
    stretch.problem.write_buffers(at.buffers, silently=graphs_stay)


def adjoint(stretch: Stretch, tape: Tape, meter: Meter) -> Result:
    """Run the adjoint over a recorded stretch. The model's state on return is unspecified."""
    total, kept = Total(stretch), bool(tape.graphs)
    restore(stretch, tape.snapshots[-1], kept)
    lam = Tangent.zeros(tape.snapshots[-1].state)
    lam = total.validate(len(stretch.batches), lam)
    for segment in reversed(range(len(tape.snapshots) - 1)):
        states = replay(stretch, tape, segment, meter)
        while states:
            at, t = states.pop(), segment * tape.every + len(states)
            restore(stretch, at, kept)
            tape.rng[t].restore()
            lin = tape.graphs.pop() if kept else None
            lam = pull(stretch, at.state, t, lam, total, meter, tape, lin)
            meter.norm(lam.theta)
            if t in stretch.val_steps:
                restore(stretch, at, kept)
                lam = total.validate(t, lam)
        tape.snapshots[segment + 1 :] = []
    return Result(total.value, total.gradients, meter.stats(len(stretch.batches)))


def pull(
    stretch: Stretch,
    state: State,
    t: int,
    lam: Tangent,
    total: Total,
    meter: Meter,
    tape: Tape,
    lin: Linearization | None = None,
) -> Tangent:
    """The adjoint before step t from that after it; `lin`: the step's gradient, where its graph was kept."""
    if lin is None:
        lin = stretch.problem.linearize(stretch.batches[t])
        tape.verify(t, lin.loss)
        meter.gradients += 1
    return pull_through(stretch, state, t, lin, lam, total, meter)


def pull_through(
    stretch: Stretch,
    state: State,
    t: int,
    lin: Linearization,
    lam: Tangent,
    total: Total,
    meter: Meter,
    retain: bool = False,
) -> Tangent:
    """The same through a gradient stage in hand. `retain`: keep its graph for one more."""
    transition, g, stats = stretch.transition, stretch.gradient(lin), lam.stats
    lam, lam_g, lam_h, lam_clip = transition.vjp(state, g, lin.active, stretch.values[t], lam)
    extra = None if stats is None or lin.decay is None else [None] * len(stretch.problem.hypers) + [stats]
    rows = lin.product(transition.split(lam_g), extra, into_extra=True, retain=retain)
    meter.products += 1
    n = len(transition.params)
    total.add(t, lam_h, lam_clip, rows[n:])
    stats = stats if stats is None or lin.decay is None else stats * lin.decay  # b' = d ∘ b + S(θ)
    return Tangent(lam.theta + transition.flatten(rows[:n]), lam.slots, stats)


class Total:
    """The objective and its gradient arrays, summed over steps."""

    def __init__(self, stretch: Stretch):
        self.stretch = stretch
        self.value = stretch.transition.params[0].new_zeros(()).detach()
        self.gradients = stretch.directions.zeros()

    def validate(self, t: int, lam: Tangent) -> Tangent:
        if t not in self.stretch.val_steps:
            return lam
        share, stats = self.stretch.validate(t), lam.stats
        self.value = self.value + share.value
        self.stretch.add_direct(self.gradients, share.direct)
        if share.stats is not None:
            stats = share.stats if stats is None else stats + share.stats
        return Tangent(lam.theta + share.theta, lam.slots, stats)

    def add(self, t: int, lam_h: list[Tensors], lam_clip: Tensor | None, of_hypers: list[Any]) -> None:
        for name, array in self.gradients.items():
            target = array if self.stretch.directions.steps is None else array[t]
            if name in self.stretch.problem.hypers:
                g = of_hypers[list(self.stretch.problem.hypers).index(name)]
                if g is not None:
                    target += g
            elif name in CLIPS:
                target += 0 if lam_clip is None else lam_clip
            else:
                for group, lam in enumerate(lam_h):
                    shares = [lam.get(part, 0) for part in parts(name)]
                    target[group] += torch.stack([torch.as_tensor(x).to(target) for x in shares]).view(
                        target[group].shape
                    )
