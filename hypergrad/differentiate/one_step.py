"""The vjp and the jvp of one training step, as functions of a state: what steppers run, and what `compile=True` traces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hypergrad.core.graph import Linearization
from hypergrad.differentiate.trajectory import Trajectory
from hypergrad.optimizers.binding import State
from hypergrad.optimizers.rule import Tensors
from hypergrad.optimizers.transition import Tangent


class StepVJP(NamedTuple):
    """The adjoint before a step, and that step's share of the hypergradient."""

    lam: Tangent
    of_groups: list[Tensors]
    of_clip: Tensor | None
    of_hypers: list[Tensor | None]
    fine: Tensors  # of numbers that are differentiated per parameter or element, by the rule's name
    loss: Tensor | None = None  # of the step, where it was computed again
    norm: Tensor | None = None  # ‖λ_θ‖, where it was computed already


def step_vjp(
    trajectory: Trajectory, state: State, t: int, lin: Linearization, lam: Tangent, g: Tensor, retain: bool = False
) -> StepVJP:
    """The adjoint before step t from that after it; g is its flat gradient. `retain`: keep the graph for one more."""
    transition, stats, values = trajectory.transition, lam.stats, trajectory.values[t]
    fine = trajectory.directions.fine.shares(state, g, lin.active, values, lam)
    lam, lam_g, of_groups, of_clip = transition.vjp(state, g, lin.active, values, lam)
    extra = None if stats is None or lin.decay is None else [None] * len(trajectory.problem.hypers) + [stats]
    rows = lin.product(transition.split(lam_g), extra, into_extra=True, retain=retain)
    n, k = len(transition.params), len(trajectory.problem.hypers)
    stats = stats if stats is None or lin.decay is None else stats * lin.decay  # b' = d ∘ b + S(θ)
    before = Tangent(lam.theta + transition.flatten(rows[:n]), lam.slots, stats)
    return StepVJP(before, of_groups, of_clip, rows[n : n + k], fine)


class StepJVP(NamedTuple):
    """The state and its tangents after one step."""

    state: State
    tangent: Tangent
    g: Tensor


def step_jvp(
    trajectory: Trajectory,
    state: State,
    t: int,
    lin: Linearization,
    tangent: Tangent,
    extras: Sequence[list[Tensor | None] | None],
    nonzero: Sequence[bool],
    seeds: list[Tensors],
    clip_seed: Tensor | None,
) -> StepJVP:
    """Tangents [k, n] after step t from those before it.

    Args:
        extras: each direction among the tensors in the loss, see `Directions.into_loss`.
        nonzero: False where a tangent of θ is still zero: it costs nothing.
        seeds, clip_seed: of `Directions.seeds`.
    """
    transition, fine, values = trajectory.transition, trajectory.directions.fine, trajectory.values[t]
    z, u, n = tangent.theta, lin.decay is not None, len(transition.params)
    dg, dstats = torch.zeros_like(z), None
    if lin.decay is not None:  # b' = d ∘ b + S(θ)
        dstats = z.new_zeros(len(z), len(lin.decay)) if tangent.stats is None else tangent.stats * lin.decay
    for j, extra in enumerate(extras):
        if nonzero[j] or extra is not None:
            rows = lin.jvp(transition.split(z[j]), None if extra is None else extra + [None] * u, into_extra=u)
            dg[j] = transition.flatten(rows[:n])
            if dstats is not None and rows[-1] is not None:
                dstats[j] += rows[-1]
    g = trajectory.gradient(lin)
    out = transition.jvp(state, g, lin.active, values, tangent, dg, seeds, clip_seed)
    out = fine.add_own(out, trajectory.directions.fine_rows(t), state, g, lin.active, values)
    out.stats = dstats
    return StepJVP(transition.step(state, g, lin.active, values), out, g)


def nonzero_tangents(trajectory: Trajectory, t: int, tangent: Tangent, known: list[bool]) -> list[bool]:
    """Which directions' tangents of θ are not zero before step t. `known`: the same before step t − 1.

    A tangent that is not zero is taken to stay so: after the first steps nothing is read from the device.
    """
    entries = trajectory.directions.entries
    if t == 0:
        return [False] * len(entries)
    begun = [entry.step is None or entry.step < t for entry in entries]
    if all(a or not b for a, b in zip(known, begun, strict=True)):
        return known
    return (tangent.theta != 0).any(dim=1).tolist()
