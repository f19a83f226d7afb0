"""The arguments of a traced step, and a trajectory of one step that is made of placeholders for them.

While a step is traced, the model holds tracing tensors in place of its parameters (tied ones too) and buffers; its own are put
back. Numbers of the step are `SymbolicFloat`.
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

from hypergrad.core.problem import Problem
from hypergrad.core.restore import Slot, swapped
from hypergrad.differentiate.compile.symbolic_floats import Environment, Registry
from hypergrad.differentiate.trajectory import Trajectory
from hypergrad.optimizers.binding import State, Values

REMEDY = "Use compile=False."
UNTRACEABLE = frozenset({"Adafactor", "Lamb", "Muon", "NAdam"})  # rules whose code reads values of tensors


@dataclass
class Batch:
    """A batch as its tensors; a key of their shapes and of all else that is in it; and its structure."""

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
        """The same batch with other tensors."""
        take = iter(tensors)
        leaves = [next(take) if len(entry) > 2 else entry[1] for entry in self.key[0]]
        return tuple(leaves) if self.spec is None else tree_unflatten(leaves, self.spec)


def _flat(batch: Any) -> tuple[list[Any], Any]:
    """The leaves and the structure of a batch. The structure of a plain tuple of tensors is None: it needs no tree."""
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


def symbolic(values: Values, registry: Registry) -> Values:
    """The same numbers as arguments of the graph."""

    def number(name: str, group: int, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(registry.number(x, (name, group, part)) for part, x in enumerate(value))
        return None if value is None else registry.number(value, (name, group, 0))

    return {name: [number(name, group, x) for group, x in enumerate(column)] for name, column in values.items()}


def arguments(trajectory: Trajectory, state: State, batch: Batch, more: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that a step is a function of."""
    hypers = [x.detach() for x in trajectory.problem.hypers.values()]
    return [state.theta, *state.slots.values(), *trajectory.problem.buffers, *hypers, *batch.tensors, *more]


@contextmanager
def placeholders(
    trajectory: Trajectory, state: State, t: int, batch: Batch, tensors: Sequence[Tensor], registry: Registry
) -> Iterator[tuple[Trajectory, State, list[Tensor]]]:
    """A trajectory of step t alone, its state and the further tensors, made of `tensors` in the order of `arguments`."""
    take = iter(tensors)
    problem, transition = copy.copy(trajectory.problem), copy.copy(trajectory.transition)
    directions = copy.copy(trajectory.directions)
    theta, slots = next(take), {name: next(take) for name in state.slots}
    buffers = [next(take).clone() for _ in problem.buffers]
    problem.cut, own = False, problem.hypers
    problem.hypers = {name: next(take).detach().requires_grad_() for name in own}
    problem.extra = ({**problem.loss_tensors.given, **_in_place_of(problem)},) if problem.extra else ()
    found = batch.of_tensors([next(take) for _ in batch.tensors])
    pairs = zip(transition.split(theta), transition.params, strict=True)
    params = [x.detach().requires_grad_(p.requires_grad) for x, p in pairs]
    problem.params = transition.params = params
    transition._plans = {}
    directions.transition, directions.fine = transition, copy.copy(directions.fine)
    directions.fine.transition = transition
    counts: Any = tuple(registry.number(float(c), ("count", i)) for i, c in enumerate(state.counts))
    values = symbolic(trajectory.values[t], registry)
    one = replace(
        trajectory, problem=problem, transition=transition, directions=directions, batches=[found], values=[values]
    )
    instead = {id(p): x for p, x in zip(trajectory.transition.params, params, strict=True)}
    instead |= {id(x): problem.hypers[name] for name, x in own.items()}
    held = [*_param_slots(trajectory, instead), *zip(problem.held_buffers.slots, buffers, strict=True)]
    with swapped([slot for slot, _ in held], [x for _, x in held]):
        yield one, State(theta, slots, counts), list(take)


def _in_place_of(problem: Problem) -> dict[str, Tensor]:
    """The placeholders of tensors that the loss is given by name; nets hold theirs themselves."""
    return {name: problem.hypers[name] for name, x in problem.loss_tensors.given.items() if isinstance(x, Tensor)}


def _param_slots(trajectory: Trajectory, instead: dict[int, Tensor]) -> list[tuple[Slot, Tensor]]:
    """Where modules hold the optimizer's parameters and `hypers`, with what takes each one's place."""
    problem = trajectory.problem
    modules = dict.fromkeys(m for owner in (problem.model, *problem.loss_tensors.nets) for m in owner.modules())
    return [
        ((module._parameters, name), instead[id(p)])
        for module in modules
        for name, p in module._parameters.items()
        if id(p) in instead
    ]


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
        tuple(module.training for owner in (problem.model, *problem.loss_tensors.nets) for module in owner.modules()),
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
    problem = trajectory.problem
    held = {id(p) for owner in (problem.model, *problem.loss_tensors.nets) for p in owner.parameters()}
    loose = [name for name, x in problem.hypers.items() if id(x) not in held]
    if loose and not problem.extra and not trajectory.directions.schedules.functions:
        raise NotImplementedError(
            f"compile=True: the loss reads hypers[{loose[0]!r}] from a closure, where a graph takes it for a constant. Let it "
            f"take a third argument, loss(model, batch, hypers), and read it there. {REMEDY}"
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
