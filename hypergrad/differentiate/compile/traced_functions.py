"""What `compile=True` traces: a step, its adjoint and its tangents, with nested tensors as their values (see graphs.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hypergrad.differentiate.compile.graphs import Body
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


def of_pull(pull: StepVJP, loss: Tensor) -> dict[str, Any]:
    return {
        "theta": pull.lam.theta,
        "slots": pull.lam.slots,
        "stats": pull.lam.stats,
        "groups": pull.of_groups,
        "clip": pull.of_clip,
        "hypers": pull.of_hypers,
        "fine": pull.fine,
        "loss": loss,
    }


def adjoint(lam: Tangent) -> Body:
    names, followed = list(lam.slots), lam.stats is not None

    def body(trajectory: Trajectory, state: State, more: list[Tensor]) -> dict[str, Any]:
        g, theta, *rest = more
        after = Tangent(theta, dict(zip(names, rest, strict=False)), rest[-1] if followed else None)
        lin = trajectory.problem.linearize(trajectory.batches[0])
        pull = step_vjp(trajectory, state, 0, lin, after, g)
        return of_pull(pull, lin.loss) | {"norm": torch.linalg.vector_norm(pull.lam.theta)}

    return body


class Arguments(NamedTuple):
    """Of `step_jvp`, behind the gradient stage."""

    tangent: Tangent
    extras: list[list[Tensor | None] | None]
    alive: tuple[bool, ...]
    seeds: list[Tensors]
    clip_seed: Tensor | None

    def key(self) -> Any:
        shapes = tuple(None if e is None else tuple(x is None for x in e) for e in self.extras)
        seeds = tuple(tuple(x) for x in self.seeds)
        return self.alive, shapes, seeds, self.clip_seed is None, tuple(self.tangent.slots), self.tangent.stats is None

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
        return Arguments(Tangent(theta, slots, stats), extras, self.alive, seeds, clip_seed)


def of_push(push: StepJVP, loss: Tensor) -> dict[str, Any]:
    return {
        "loss": loss,
        "g": push.g,
        "theta": push.state.theta,
        "slots": push.state.slots,
        "z": push.tangent.theta,
        "z_slots": push.tangent.slots,
        "z_stats": push.tangent.stats,
    }


def tangent(arguments: Arguments) -> Body:
    def body(trajectory: Trajectory, state: State, more: list[Tensor]) -> dict[str, Any]:
        lin = trajectory.problem.linearize(trajectory.batches[0])
        push = step_jvp(trajectory, state, 0, lin, *arguments.of(more))
        buffers = list(trajectory.problem.buffers)
        return of_push(push, lin.loss) | {"buffers": buffers, "counts": push.state.counts}

    return body
