"""Unrolled mode: the adjoint of the recorded steps, backwards, every hyperparameter at once.

With λ = dL/ds after a step, the same before it and the hypergradient's share of that step are

    λ_s, λ_g, λ_h = Uᵀ λ             analytically, from the state before the step and its gradient
    λ_θ += H λ_g     λ_h += (∂g/∂h)ᵀ λ_g        one Hessian product for all of them

A state is kept every c steps (default √K), and the steps between are replayed with the same code, random numbers and
buffers, so that memory is about 2√K states. (Maclaurin et al. 2015, arXiv 1502.03492; Griewank & Walther 2000.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hypergrad.graph import Linearization
from hypergrad.modes.stretch import Meter, Result, Stretch, evaluation
from hypergrad.problem import Rng, Saved
from hypergrad.updates.binding import State
from hypergrad.updates.rule import Tensors, parts
from hypergrad.updates.transition import CLIPS, Tangent

REPLAY_RTOL = 1e-3  # bit-identical on CPU; kernels on a GPU may add up in another order


@dataclass
class Snapshot:
    state: State
    buffers: list[Saved]


@dataclass
class Tape:
    """What a replay needs: states every c steps, and every step's random numbers.

    Snapshot i was taken before step i·c; the last one is the state after the last step.
    """

    every: int
    snapshots: list[Snapshot] = field(default_factory=list)
    rng: list[Rng] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)  # shares of the objective, where they were looked at

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


def unrolled(stretch: Stretch, every: int | None = None, below: float | None = None) -> Result:
    """Hypergradient of a stretch of training by the adjoint.

    Args:
        every: steps between snapshots, default √K.
        below: where the validation loss is not at most this, there is no way back, and gradients are NaN.
    """
    if every is not None and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
        raise ValueError(f"every must be a whole number of steps from 1, got {every!r}.")
    with evaluation(stretch) as meter:
        tape = record(stretch, every or default_every(len(stretch.batches)), meter, below is not None)
        value = sum(tape.values, stretch.transition.params[0].new_zeros(()))
        if below is not None and not float(value) <= below:
            nothing = {name: torch.full_like(g, math.nan) for name, g in stretch.directions.zeros().items()}
            return Result(value, nothing, meter.stats(len(stretch.batches)))
        return adjoint(stretch, tape, meter)


def record(stretch: Stretch, every: int, meter: Meter, watch: bool = False) -> Tape:
    """Train through the stretch on the user's model, in place, and keep what a replay needs. `watch`: and the objective."""
    watched = stretch.val_steps if watch else ()
    tape, state = Tape(every), stretch.transition.read()
    for t in range(len(stretch.batches)):
        if t in watched:
            tape.values.append(stretch.validate(t, state).value)
        if t % every == 0:
            tape.snapshots.append(Snapshot(state, stretch.problem.read_buffers()))
        tape.rng.append(stretch.problem.rng())
        state, loss = train(stretch, state, t, meter)
        tape.losses.append(loss)
    tape.snapshots.append(Snapshot(state, stretch.problem.read_buffers()))
    if len(stretch.batches) in watched:
        tape.values.append(stretch.validate(len(stretch.batches), state).value)
    return tape


def train(stretch: Stretch, state: State, t: int, meter: Meter) -> tuple[State, Tensor]:
    """One training step from a state whose parameters and buffers are in the model. The next state, and the loss."""
    lin = stretch.problem.linearize(stretch.batches[t], products=False)
    g = stretch.gradient(lin)
    meter.look_for_ill_conditioning(stretch, state, g, t)
    state = stretch.transition.step(state, g, lin.active, stretch.values[t])
    stretch.transition.load(state.theta)
    meter.gradients += 1
    return state, lin.loss


def replay(stretch: Stretch, tape: Tape, segment: int, meter: Meter) -> list[Snapshot]:
    """The states before each step of a segment, from its snapshot."""
    first, last = segment * tape.every, min((segment + 1) * tape.every, len(stretch.batches))
    states = [tape.snapshots[segment]]
    restore(stretch, states[0])
    for t in range(first, last - 1):
        tape.rng[t].restore()
        state, loss = train(stretch, states[-1].state, t, meter)
        tape.verify(t, loss)
        states.append(Snapshot(state, stretch.problem.read_buffers()))
    return states


def restore(stretch: Stretch, at: Snapshot) -> None:
    stretch.transition.load(at.state.theta)
    stretch.problem.write_buffers(at.buffers)


def adjoint(stretch: Stretch, tape: Tape, meter: Meter) -> Result:
    """Run the adjoint over a recorded stretch. The model's state on return is unspecified."""
    total = Total(stretch)
    restore(stretch, tape.snapshots[-1])
    lam = Tangent.zeros(tape.snapshots[-1].state)
    lam = total.validate(len(stretch.batches), lam, tape.snapshots[-1].state)
    for segment in reversed(range(len(tape.snapshots) - 1)):
        states = replay(stretch, tape, segment, meter)
        while states:
            at, t = states.pop(), segment * tape.every + len(states)
            restore(stretch, at)
            tape.rng[t].restore()
            lam = pull(stretch, at.state, t, lam, total, meter, tape)
            meter.norm(lam.theta)
            if t in stretch.val_steps:
                restore(stretch, at)
                lam = total.validate(t, lam, at.state)
        tape.snapshots[segment + 1 :] = []
    return Result(total.value, total.gradients, meter.stats(len(stretch.batches)), stretch.initial(lam))


def pull(
    stretch: Stretch, state: State, t: int, lam: Tangent, total: Total, meter: Meter, tape: Tape | None = None
) -> Tangent:
    """The adjoint before step t from that after it."""
    lin = stretch.problem.linearize(stretch.batches[t])
    if tape is not None:
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
    fine = stretch.directions.fine.shares(state, g, lin.active, stretch.values[t], lam)
    lam, lam_g, lam_h, lam_clip = transition.vjp(state, g, lin.active, stretch.values[t], lam)
    extra = None if stats is None or lin.decay is None else [None] * len(stretch.problem.hypers) + [stats]
    rows = lin.product(transition.split(lam_g), extra, into_extra=True, retain=retain)
    meter.products += 1
    n = len(transition.params)
    total.add(t, lam_h, lam_clip, rows[n:], fine)
    stats = stats if stats is None or lin.decay is None else stats * lin.decay  # b' = d ∘ b + S(θ)
    return Tangent(lam.theta + transition.flatten(rows[:n]), lam.slots, stats)


class Total:
    """The objective and its gradient arrays, summed over steps."""

    def __init__(self, stretch: Stretch):
        self.stretch = stretch
        self.value = stretch.transition.params[0].new_zeros(()).detach()
        self.gradients = stretch.directions.zeros()

    def validate(self, t: int, lam: Tangent, state: State) -> Tangent:
        if t not in self.stretch.val_steps:
            return lam
        share = self.stretch.validate(t, state)
        self.value = self.value + share.value
        self.stretch.add_direct(self.gradients, share.direct)
        return share.added_to(lam)

    def add(
        self, t: int, lam_h: list[Tensors], lam_clip: Tensor | None, of_hypers: list[Any], fine: Tensors | None = None
    ) -> None:
        """Step t's share. `fine`: of the numbers that are differentiated per parameter or element, by the rule's name."""
        directions, fine = self.stretch.directions, fine or {}
        scheduled = directions.schedules.pull(t, lambda name: self._shares(name, lam_h, lam_clip))
        in_loss = dict(zip(self.stretch.problem.hypers, of_hypers, strict=False))
        for name, array in self.gradients.items():
            target = array if directions.steps is None else array[t]
            if name in self.stretch.problem.hypers:
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
        if name in self.stretch.directions.ungrouped:  # the average's decay
            return torch.as_tensor(lam_h[0].get(name, 0)).to(self.value)
        rows = [[torch.as_tensor(lam.get(part, 0)).to(self.value) for part in parts(name)] for lam in lam_h]
        return torch.stack([torch.stack(row) for row in rows]).squeeze(-1)
