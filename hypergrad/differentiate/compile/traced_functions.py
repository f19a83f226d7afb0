"""The functions that `compile=True` traces: a step, its vjp and its jvp. Their values are nested tensors (see graphs.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hypergrad.differentiate.compile.graphs import TracedFunction
from hypergrad.differentiate.one_step import StepJVP, StepVJP, step_jvp, step_vjp
from hypergrad.differentiate.trajectory import Trajectory
from hypergrad.optimizers.binding import State
from hypergrad.optimizers.rule import Tensors
from hypergrad.optimizers.transition import Tangent


def step(trajectory: Trajectory, state: State, more: list[Tensor]) -> dict[str, Any]:
    lin = trajectory.problem.linearize(trajectory.batches[0], products=False)
    g = trajectory.gradient(lin)
    new = trajectory.transition.step(state, g, lin.active, trajectory.values[0])
    out = {"loss": lin.loss, "g": g, "theta": new.theta, "slots": new.slots}
    return out | {"buffers": list(trajectory.problem.buffers), "counts": new.counts}


def nested_vjp(out: StepVJP, loss: Tensor) -> dict[str, Any]:
    return {
        "theta": out.lam.theta,
        "slots": out.lam.slots,
        "stats": out.lam.stats,
        "groups": out.of_groups,
        "clip": out.of_clip,
        "hypers": out.of_hypers,
        "fine": out.fine,
        "loss": loss,
    }


def vjp(lam: Tangent) -> TracedFunction:
    names, followed = list(lam.slots), lam.stats is not None

    def traced(trajectory: Trajectory, state: State, more: list[Tensor]) -> dict[str, Any]:
        g, theta, *rest = more
        after = Tangent(theta, dict(zip(names, rest, strict=False)), rest[-1] if followed else None)
        lin = trajectory.problem.linearize(trajectory.batches[0])
        out = step_vjp(trajectory, state, 0, lin, after, g)
        return nested_vjp(out, lin.loss) | {"norm": torch.linalg.vector_norm(out.lam.theta)}

    return traced


class Arguments(NamedTuple):
    """Arguments of `step_jvp` after `lin`."""

    tangent: Tangent
    extras: list[list[Tensor | None] | None]
    nonzero: tuple[bool, ...]
    seeds: list[Tensors]
    clip_seed: Tensor | None

    def key(self) -> Any:
        shapes = tuple(None if e is None else tuple(x is None for x in e) for e in self.extras)
        seeds = tuple(tuple(x) for x in self.seeds)
        return (
            self.nonzero,
            shapes,
            seeds,
            self.clip_seed is None,
            tuple(self.tangent.slots),
            self.tangent.stats is None,
        )

    def tensors(self) -> list[Tensor]:
        rows = [x for extra in self.extras if extra is not None for x in extra]
        columns = [x for column in self.seeds for x in column.values()]
        z = self.tangent
        found = [z.theta, *z.slots.values(), z.stats, *rows, *columns, self.clip_seed]
        return [x for x in found if x is not None]

    def of(self, tensors: Sequence[Tensor]) -> Arguments:
        """The same with other tensors."""
        take = iter(tensors)
        theta, slots = next(take), {name: next(take) for name in self.tangent.slots}
        stats = None if self.tangent.stats is None else next(take)
        extras = [None if e is None else [None if x is None else next(take) for x in e] for e in self.extras]
        seeds = [{name: next(take) for name in column} for column in self.seeds]
        clip_seed = None if self.clip_seed is None else next(take)
        return Arguments(Tangent(theta, slots, stats), extras, self.nonzero, seeds, clip_seed)


def nested_jvp(out: StepJVP, loss: Tensor) -> dict[str, Any]:
    return {
        "loss": loss,
        "g": out.g,
        "theta": out.state.theta,
        "slots": out.state.slots,
        "z": out.tangent.theta,
        "z_slots": out.tangent.slots,
        "z_stats": out.tangent.stats,
    }


def jvp(arguments: Arguments) -> TracedFunction:
    def traced(trajectory: Trajectory, state: State, more: list[Tensor]) -> dict[str, Any]:
        lin = trajectory.problem.linearize(trajectory.batches[0])
        out = step_jvp(trajectory, state, 0, lin, *arguments.of(more))
        buffers = list(trajectory.problem.buffers)
        return nested_jvp(out, lin.loss) | {"buffers": buffers, "counts": out.state.counts}

    return traced
