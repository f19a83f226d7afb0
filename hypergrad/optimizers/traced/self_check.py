"""Is the traced step of an optimizer differentiated in full? Finite differences of its plain step, in float64, tell.

A step in Python can lose the graph without an error (`float(x)`, numpy, `x.tolist()`). So before an optimizer class is
used, its Jacobian is compared (see jacobian_check.py) at steps 1, 2 and 8 of a small run: with random gradients, on small
parameters if the optimizer has not stepped yet, else on its own smallest ones with their state. Nothing of the user's is
written to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hypergrad.optimizers.group_values import floats
from hypergrad.optimizers.rule import parts
from hypergrad.optimizers.traced.jacobian_check import Dependencies, Lost, compare, randn
from hypergrad.optimizers.traced.memory import Memory, split
from hypergrad.optimizers.traced.own_step import Inputs, unrounded_step

CHECKED_AT = (0, 1, 7)  # steps of the small run
LARGEST = 4  # of a dimension of the small parameters

Names = frozenset[str]
_KNOWN: dict[Any, Names] = {}  # what passed the check
_WRITTEN: dict[type, Names] = {}  # names in param_groups that a step of this class writes to


def hyperparameters_of(optimizer: torch.optim.Optimizer, tuned: Names) -> Names:
    """The names in param_groups that are hyperparameters of the optimizer's own step.

    Raises:
        NotImplementedError: where a derivative is lost, with the name of the channel.
    """
    key = _key(optimizer, tuned)
    if key in _KNOWN:
        return _KNOWN[key]
    names = _checked(optimizer, tuned)
    return _KNOWN.setdefault(_key(optimizer, tuned), names)


def candidates(optimizer: torch.optim.Optimizer, tuned: Names) -> Names:
    """Names of floats (also None or whole in some groups) and of pairs (betas) in the param groups."""
    found = set()
    for name in {name for group in optimizer.param_groups for name in group}:
        column = [group[name] for group in optimizer.param_groups if name in group]
        many = len(parts(name))
        if many > 1:
            fits = all(_is_tuple(x, many) for x in column)
        else:
            numbers = all(x is None or type(x) is int or _is_number(x) for x in column)
            fits = numbers and (name in tuned or any(map(_is_number, column)))
        if fits:
            found.add(name)
    return frozenset(found)


def _is_number(x: Any) -> bool:
    return isinstance(x, float) or (isinstance(x, Tensor) and x.numel() == 1 and x.is_floating_point())


def _is_tuple(x: Any, n: int) -> bool:
    return isinstance(x, (tuple, list)) and len(x) == n and all(isinstance(y, (int, float)) for y in x)


def _key(optimizer: torch.optim.Optimizer, tuned: Names) -> Any:
    """Class, flags, what is tuned, and the layout of parameters and state."""
    names, groups = candidates(optimizer, tuned), optimizer.param_groups
    written = _WRITTEN.get(type(optimizer), frozenset())
    flags = [_flags(place, written) for place in (*groups, vars(optimizer))]
    zero = [[name for name in sorted(tuned & names) if not group.get(name)] for group in groups]
    layout = [[tuple(p.shape) for p in group["params"]] for group in groups]
    reals = sorted(split(optimizer, names).reals)
    return type(optimizer), tuned, str((flags, zero, layout, reals))


def _flags(place: Mapping[str, Any], written: Names) -> list[tuple[str, str]]:
    """The values of flags, the types of all else. What a step writes to is no flag."""
    plain = (bool, int, str, type(None))
    return sorted(
        (k, repr(x) if isinstance(x, plain) else type(x).__name__) for k, x in place.items() if k not in written
    )


def _checked(optimizer: torch.optim.Optimizer, tuned: Names) -> Names:
    who = f"{type(optimizer).__module__}.{type(optimizer).__name__}"
    try:
        return _check(optimizer, tuned)
    except Lost as error:
        raise NotImplementedError(f"{who} has no update rule here, and through its own step {error}") from None
    except Exception as error:
        raise NotImplementedError(
            f"{who} has no update rule here, and its own step cannot be differentiated: {type(error).__name__}: {error}"
        ) from error


def _check(optimizer: torch.optim.Optimizer, tuned: Names) -> Names:
    random = torch.Generator().manual_seed(0)
    inputs = _small(optimizer, candidates(optimizer, tuned), random)
    written: set[str] = set()
    with _in_float64(inputs.params[0].device):
        probe = inputs
        for _ in range(CHECKED_AT[-1] + 1):  # which names does it write to?
            probe = _gradients(probe, random)
            outcome = unrounded_step(probe)
            written |= outcome.written
            probe = replace(probe, params=outcome.params, memory=outcome.memory)
        _WRITTEN[type(optimizer)] = frozenset(written) | _WRITTEN.get(type(optimizer), frozenset())
        for name in sorted(written & tuned):
            raise Lost(f"`{name}` is state rather than a hyperparameter: a step writes to it. Leave it out.")
        inputs = _small(optimizer, inputs.names - written, random)
        dependencies = Dependencies()
        for t in range(CHECKED_AT[-1] + 1):
            inputs = _gradients(inputs, random)
            outcome = unrounded_step(inputs)
            if t in CHECKED_AT:
                compare(inputs, tuned, random, dependencies)
            inputs = replace(inputs, params=outcome.params, memory=outcome.memory)
        dependencies.raise_lost()
    return frozenset(inputs.names)


@contextmanager
def _in_float64(device: torch.device) -> Iterator[None]:
    """torch.optim keeps some numbers in torch's default dtype. Random numbers are put back at the end."""
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            yield
    finally:
        torch.set_default_dtype(default)


def _gradients(inputs: Inputs, random: torch.Generator) -> Inputs:
    return replace(inputs, grads=[randn(p, random) for p in inputs.params])


def _double(x: Any) -> Any:
    return x.detach().double() if isinstance(x, Tensor) else x


def _small(optimizer: torch.optim.Optimizer, names: Names, random: torch.Generator) -> Inputs:
    """A small copy of the optimizer, in float64: of each group, the smallest parameter of each number of dimensions."""
    stepped = len(optimizer.state) > 0
    twin, live, params = object.__new__(type(optimizer)), [], []
    vars(twin).update(vars(optimizer))
    twin.param_groups = []
    for group in optimizer.param_groups:
        chosen = {p.dim(): p for p in sorted(group["params"], key=lambda p: -p.numel())}
        mine = [p for p in group["params"] if any(p is q for q in chosen.values())]
        numbers = {name: float(x) for name, x in group.items() if name in names and isinstance(x, Tensor)}
        twin.param_groups.append({**group, **numbers, "params": mine})
        live += mine
    state, twin.state = twin.state, {p: s for p, s in twin.state.items() if not isinstance(p, Tensor)}  # type: ignore
    twin.state.update({p: state[p] for p in live if p in state})
    memory = split(twin, names)
    memory = Memory({k: _double(x) for k, x in memory.reals.items()}, memory.rest)
    for p in live:
        shape = p.shape if stepped else [min(n, LARGEST) for n in p.shape]
        fresh = torch.empty(shape, dtype=torch.float64, device=p.device)
        params.append(_double(p) if stepped else randn(fresh, random))
    groups = twin.param_groups
    values = {(g, name): group[name] for g, group in enumerate(groups) for name in names if name in group}
    values = {key: floats(x) for key, x in values.items()}
    return Inputs(type(optimizer), live, params, [None] * len(params), memory, values, names)
