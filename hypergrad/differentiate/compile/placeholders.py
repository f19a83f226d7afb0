"""The arguments of a traced step, and a trajectory of one step that is made of them.

While a step is traced, tracing tensors stand in the model for its parameters (tied ones too) and buffers; the model is put back
as it was. Numbers of the step are `SymbolicFloat`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from hypergrad.differentiate.compile.symbolic_floats import Book, Environment
from hypergrad.differentiate.trajectory import Trajectory
from hypergrad.optimizers.binding import State, Values

REMEDY = "Use compile=False."
UNTRACEABLE = frozenset({"Adafactor", "Lamb", "Muon", "NAdam"})  # rules whose code asks for values of tensors


@dataclass
class Batch:
    """A batch taken apart: its tensors; their shapes and all else that is in it, as a key; its structure."""

    tensors: list[Tensor]
    key: Any
    spec: Any

    @staticmethod
    def of(batch: Any) -> Batch:
        leaves, spec = _flat(batch)
        for x in leaves:
            if not (x is None or isinstance(x, (Tensor, bool, int, float, str))):
                raise TypeError(
                    "compile=True: batches must be made of tensors, numbers and strings in tuples, lists and dicts; there is a "
                    f"{type(x).__name__} in one. {REMEDY}"
                )
        key = tuple(
            (x.shape, x.dtype, x.device, x.stride(), x.requires_grad) if isinstance(x, Tensor) else (type(x), x)
            for x in leaves
        )
        return Batch([x for x in leaves if isinstance(x, Tensor)], (key, spec), spec)

    def of_tensors(self, tensors: Sequence[Tensor]) -> Any:
        """The same batch of other tensors."""
        take = iter(tensors)
        leaves = [next(take) if len(entry) > 2 else entry[1] for entry in self.key[0]]
        return tuple(leaves) if self.spec is None else tree_unflatten(leaves, self.spec)


def _flat(batch: Any) -> tuple[list[Any], Any]:
    """The leaves and the structure of a batch; None is that of a plain tuple of tensors, which needs no tree."""
    if type(batch) is tuple and all(type(x) is Tensor for x in batch):
        return list(batch), None
    return tree_flatten(batch)


def environment(state: State, values: Values) -> Environment:
    """The numbers of a step."""
    env: dict[Any, float] = {("count", i): float(c) for i, c in enumerate(state.counts)}
    for name, column in values.items():
        for group, value in enumerate(column):
            if isinstance(value, tuple):
                env.update({(name, group, part): x for part, x in enumerate(value)})
            elif value is not None:
                env[name, group, 0] = value
    return env


def lifted(values: Values, book: Book) -> Values:
    """The same numbers as arguments of the graph."""

    def lift(name: str, group: int, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(book.number(x, (name, group, part)) for part, x in enumerate(value))
        return None if value is None else book.number(value, (name, group, 0))

    return {name: [lift(name, group, x) for group, x in enumerate(column)] for name, column in values.items()}


def arguments(trajectory: Trajectory, state: State, batch: Batch, more: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that a step is a function of."""
    hypers = [x.detach() for x in trajectory.problem.hypers.values()]
    return [state.theta, *state.slots.values(), *trajectory.problem.buffers, *hypers, *batch.tensors, *more]


@contextmanager
def standing_in(
    trajectory: Trajectory, state: State, t: int, batch: Batch, tensors: Sequence[Tensor], book: Book
) -> Iterator[tuple[Trajectory, State, list[Tensor]]]:
    """A trajectory of step t alone, its state and the further tensors, made of `tensors` in the order of `arguments`."""
    take = iter(tensors)
    problem, transition = copy.copy(trajectory.problem), copy.copy(trajectory.transition)
    directions = copy.copy(trajectory.directions)
    theta, slots = next(take), {name: next(take) for name in state.slots}
    buffers = [next(take).clone() for _ in problem.places]
    problem.hypers = {name: next(take).detach().requires_grad_() for name in problem.hypers}
    problem.extra = (problem.hypers,) if problem.extra else ()
    found = batch.of_tensors([next(take) for _ in batch.tensors])
    pairs = zip(transition.split(theta), transition.params, strict=True)
    params = [x.detach().requires_grad_(p.requires_grad) for x, p in pairs]
    problem.params = transition.params = params
    transition._plans = {}
    directions.transition, directions.fine = transition, copy.copy(directions.fine)
    directions.fine.transition = transition
    counts: Any = tuple(book.number(float(c), ("count", i)) for i, c in enumerate(state.counts))
    values = lifted(trajectory.values[t], book)
    one = replace(
        trajectory, problem=problem, transition=transition, directions=directions, batches=[found], values=[values]
    )
    with _in_model(trajectory, params, buffers):
        yield one, State(theta, slots, counts), list(take)


@contextmanager
def _in_model(trajectory: Trajectory, params: Sequence[Tensor], buffers: Sequence[Tensor]) -> Iterator[None]:
    instead = {id(p): x for p, x in zip(trajectory.transition.params, params, strict=True)}
    places: list[tuple[dict[str, Any], str, Any]] = [
        (module._parameters, name, p)
        for module in trajectory.problem.model.modules()
        for name, p in module._parameters.items()
        if id(p) in instead
    ]
    news = [instead[id(p)] for *_, p in places] + list(buffers)
    places += [(module._buffers, name, module._buffers[name]) for module, name in trajectory.problem.places]
    try:
        for (where, name, _), x in zip(places, news, strict=True):
            where[name] = x
        yield
    finally:
        for where, name, x in places:
            where[name] = x


def static_key(trajectory: Trajectory) -> tuple[Any, ...]:
    """What a graph depends on besides tensors, numbers and batches, as far as it can be seen."""
    problem, transition = trajectory.problem, trajectory.transition
    return (
        tuple((p.shape, p.dtype, p.device, p.requires_grad) for p in transition.params),
        tuple((b.shape, b.stride(), b.dtype) for b in problem.buffers),
        tuple((name, x.shape, x.stride()) for name, x in problem.hypers.items()),
        type(transition),
        tuple(transition.rules),
        tuple(transition.group_of),
        transition.wanted,
        None if transition.clip is None else transition.clip.name,
        trajectory.directions.wrt,
        tuple(trajectory.directions.fine.per.items()),
        tuple(module.training for module in problem.model.modules()),
        torch.get_num_threads(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
    )


def check_suited(trajectory: Trajectory, mode: str) -> None:
    """Raise where a trajectory cannot be traced, as far as that can be seen beforehand."""
    transition = trajectory.transition
    if mode == "implicit":
        raise NotImplementedError(f"compile=True is for mode='unrolled' and mode='forward'. {REMEDY}")
    if mode == "forward" and (trajectory.directions.fine.per or trajectory.directions.steps is not None):
        raise NotImplementedError(
            f"compile=True with mode='forward' differentiates per group, not per step: use mode='unrolled'. {REMEDY}"
        )
    for i in transition.fallbacks:
        name = type(transition.optimizers[i]).__name__
        raise NotImplementedError(
            f"compile=True: {name} has no update rule here, and its own step is not traced. {REMEDY}"
        )
    for name in {type(rule).__name__ for rule in transition.rules} & UNTRACEABLE:
        raise NotImplementedError(
            f"compile=True does not take {name}: its update rule reads values of tensors in Python. {REMEDY}"
        )
    if transition.clip is not None and transition.clip.name == "clip_norm":
        raise NotImplementedError(
            f"compile=True does not take clip_norm: whether a gradient is clipped is a branch on its value. {REMEDY}"
        )
    if any(getattr(p, "_backward_hooks", None) for p in transition.params):
        raise NotImplementedError(f"compile=True: parameters have hooks, which a graph would leave out. {REMEDY}")
