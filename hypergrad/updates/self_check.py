"""Is the traced step of an optimizer differentiated in full? Finite differences of its plain step, in float64, tell.

A step in Python can lose the graph without an error (`float(x)`, numpy, `x.tolist()`). So before an optimizer class is
used, its Jacobian is compared, one channel after the other, with differences of the step itself:

    channels    the parameters, the gradients, each of the optimizer's tensors and floats, each tuned hyperparameter
    rows        the parameters, each of the optimizer's tensors and floats

along one random direction a channel, at steps 1, 2 and 8 of a small run: with random gradients, on small parameters if the
optimizer has not stepped yet, else on its own smallest ones with the state they have. Nothing of the user's is written to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hypergrad.updates.memory import Memory, label, take_apart
from hypergrad.updates.own_step import Inputs, Key, Traced, take_unrounded, trace
from hypergrad.updates.rule import parts

RTOL = 1e-5  # of a difference that is told from rounding
ROUNDING = 1e-14  # of a step's outputs, relative to their size: some tens of operations
TOLD = 10  # times rounding: a difference that stands out from it
STEPS = (1e-3, 1e-5, 1e-7)  # of differences, relative to the size of what is moved; for hyperparameters also absolute
CHECKED_AT = (0, 1, 7)  # steps of the small run
LARGEST = 4  # of a dimension of the small parameters

Names = frozenset[str]
_KNOWN: dict[Any, Names] = {}  # what was checked and found right
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


def plain(x: Any) -> Any:
    """A hyperparameter as a float, a tuple of floats or None."""
    return tuple(map(float, x)) if isinstance(x, (tuple, list)) else None if x is None else float(x)


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
    reals = sorted(take_apart(optimizer, names).reals)
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
    except _Lost as error:
        raise NotImplementedError(f"{who} has no update rule here, and through its own step {error}") from None
    except Exception as error:
        raise NotImplementedError(
            f"{who} has no update rule here, and its own step cannot be differentiated: {type(error).__name__}: {error}"
        ) from error


class _Lost(Exception):
    """The name of the channel that was lost."""


def _check(optimizer: torch.optim.Optimizer, tuned: Names) -> Names:
    random = torch.Generator().manual_seed(0)
    inputs = _small(optimizer, candidates(optimizer, tuned), random)
    written: set[str] = set()
    with _in_float64(inputs.params[0].device):
        probe = inputs
        for _ in range(CHECKED_AT[-1] + 1):  # which names does it write to?
            probe = _gradients(probe, random)
            outcome = take_unrounded(probe)
            written |= outcome.written
            probe = replace(probe, params=outcome.params, memory=outcome.memory)
        _WRITTEN[type(optimizer)] = frozenset(written) | _WRITTEN.get(type(optimizer), frozenset())
        for name in sorted(written & tuned):
            raise _Lost(f"`{name}` is state rather than a hyperparameter: a step writes to it. Leave it out.")
        inputs = _small(optimizer, inputs.names - written, random)
        seen = _Seen()
        for t in range(CHECKED_AT[-1] + 1):
            inputs = _gradients(inputs, random)
            outcome = take_unrounded(inputs)
            if t in CHECKED_AT:
                _compare(inputs, tuned, random, seen)
            inputs = replace(inputs, params=outcome.params, memory=outcome.memory)
        seen.judge()
    return frozenset(inputs.names)


@dataclass
class _Seen:
    """What was found to depend on what, and the columns of the optimizer's own numbers that are lost.

    Such a column matters only where the number itself depends on something: tangents start at 0.
    """

    depends: set[tuple[str, str]] = field(default_factory=set)  # channel, row
    lost: dict[str, _Lost] = field(default_factory=dict)

    def judge(self) -> None:
        for name, error in self.lost.items():
            above, todo = {name}, [name]
            while todo:
                row = todo.pop()
                found = {channel for channel, r in self.depends if r == row} - above
                above |= found
                todo += found
            if any(not channel.startswith("its own") for channel in above):
                raise error


@contextmanager
def _in_float64(device: torch.device) -> Iterator[None]:
    """torch.optim keeps some numbers in torch's default dtype. Random numbers are put back on the way out."""
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            yield
    finally:
        torch.set_default_dtype(default)


def _randn(like: Tensor, random: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=random, dtype=torch.float64).to(like.device)


def _gradients(inputs: Inputs, random: torch.Generator) -> Inputs:
    return replace(inputs, grads=[_randn(p, random) for p in inputs.params])


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
    memory = take_apart(twin, names)
    memory = Memory({k: _double(x) for k, x in memory.reals.items()}, memory.rest)
    for p in live:
        shape = p.shape if stepped else [min(n, LARGEST) for n in p.shape]
        fresh = torch.empty(shape, dtype=torch.float64, device=p.device)
        params.append(_double(p) if stepped else _randn(fresh, random))
    groups = twin.param_groups
    values = {(g, name): group[name] for g, group in enumerate(groups) for name in names if name in group}
    values = {key: plain(x) for key, x in values.items()}
    return Inputs(type(optimizer), live, params, [None] * len(params), memory, values, names)


# ---- one Jacobian against differences


@dataclass
class _Channel:
    """One thing that is moved along `direction`, and how it is called."""

    name: str
    direction: dict[Key, Any]
    size: float
    room: float = math.inf  # how far down it may be moved: a hyperparameter not below 0
    own: bool = False  # one of the optimizer's tensors and floats


def _channels(inputs: Inputs, traced: Traced, tuned: Names, random: torch.Generator) -> list[_Channel]:
    groups: dict[Key, list[Key]] = {}
    for key in traced.inputs:
        kind = key if key[0] == "value" else (key[0], label(key[1]) if key[0] == "real" else None)
        groups.setdefault(kind, []).append(key)
    out = []
    for kind, keys in groups.items():
        size = math.sqrt(sum(float(traced.inputs[k].detach().square().sum()) for k in keys))
        if kind[0] == "value":
            _, g, name, part = kind
            place = f" (part {part})" if isinstance(inputs.values[g, name], tuple) else ""
            value = float(traced.inputs[kind].detach())
            one = {kind: torch.ones((), dtype=torch.float64)}
            out.append(_Channel(f"hyperparameter `{name}`{place}", one, size, value if value >= 0 else math.inf))
            continue
        # a relative change of each number: so a variance stays above 0, and what is 0 stays 0 unless all of it is
        x = {k: traced.inputs[k].detach() for k in keys}
        direction = {k: _randn(v, random) * (v if size > 0 else 1) for k, v in x.items()}
        out.append(_Channel(_called(keys[0]), direction, 1.0, own=kind[0] == "real"))
    return out


def _compare(inputs: Inputs, tuned: Names, random: torch.Generator, seen: _Seen) -> None:
    seed = torch.get_rng_state()

    def at(inputs: Inputs) -> dict[Key, Tensor]:
        torch.set_rng_state(seed)
        try:
            out = take_unrounded(inputs)
        except (ArithmeticError, ValueError):  # a beta of 1, say
            return {}
        rows = {("param", i): p for i, p in enumerate(out.params)}
        return rows | {("real", k): torch.as_tensor(x, dtype=torch.float64) for k, x in out.memory.reals.items()}

    traced, _ = trace(inputs, tuned)
    base = at(inputs)
    _check_values(traced, base)
    for channel in _channels(inputs, traced, tuned, random):
        z = {k: v[None] for k, v in channel.direction.items()}
        found = traced.jvp(1, z)
        pulled = traced.vjp({k: torch.ones_like(x) for k, x in traced.outputs.items()})
        _check_transpose(channel, found, pulled)
        there = cache(lambda h, c=channel: at(_moved(inputs, c.direction, h)))
        for rows in _rows(base):
            ours = torch.cat([found[k][0].reshape(-1).double() for k in rows])
            try:
                if _check_row(channel, rows, ours, base, there):
                    seen.depends.add((channel.name, _called(rows[0])))
            except _Lost as error:
                if not channel.own:
                    raise
                seen.depends.add((channel.name, _called(rows[0])))
                seen.lost.setdefault(channel.name, error)


def _called(key: Key) -> str:
    return {"param": "the parameters", "grad": "the gradients"}.get(key[0]) or f"its own `{label(key[1])}`"


def _check_values(traced: Traced, base: dict[Key, Tensor]) -> None:
    for key in base.keys() ^ traced.outputs.keys():
        raise _Lost(
            f"its state depends on whether a hyperparameter is 0 (`{label(str(key[1]))}`): start it at a value above 0."
        )
    for key, x in base.items():
        y = traced.outputs[key].detach()
        if x.shape != y.shape or not torch.allclose(x, y.double(), rtol=1e-7, atol=1e-12, equal_nan=True):
            off = f"{y.tolist() if y.numel() == 1 else tuple(y.shape)} for {x.tolist() if x.numel() == 1 else tuple(x.shape)}"
            raise _Lost(f"{_called(key)} cannot be traced: it comes out differently ({off}).")


def _check_transpose(channel: _Channel, found: Mapping[Key, Tensor], pulled: Mapping[Key, Tensor]) -> None:
    left = torch.stack([x.double().sum() for x in found.values()])
    right = [(pulled[k] * v).double().sum() for k, v in channel.direction.items() if k in pulled]
    total = torch.stack(right).sum() if right else torch.zeros(())
    if not abs(float(left.sum() - total)) <= 1e-9 * float(left.abs().sum()) + 1e-12:
        raise _Lost(f"the dependence on {channel.name} is not the same forwards and backwards.")


def _rows(base: dict[Key, Tensor]) -> list[list[Key]]:
    rows: dict[Any, list[Key]] = {}
    for key in base:
        rows.setdefault(label(key[1]) if key[0] == "real" else None, []).append(key)
    return list(rows.values())


def _moved(inputs: Inputs, direction: Mapping[Key, Any], h: float) -> Inputs:
    """The inputs, h further along a direction."""
    params, grads, reals = list(inputs.params), list(inputs.grads), dict(inputs.memory.reals)
    values = dict(inputs.values)
    for key, v in direction.items():
        if key[0] == "param":
            params[key[1]] = params[key[1]] + h * v
        elif key[0] == "grad":
            grads[key[1]] = grads[key[1]] + h * v
        elif key[0] == "real":
            x = reals[key[1]]
            reals[key[1]] = x + h * v if isinstance(x, Tensor) else float(x + h * v)
        else:
            _, g, name, part = key
            old = values[g, name]
            values[g, name] = (
                tuple(y + h * (j == part) for j, y in enumerate(old)) if isinstance(old, tuple) else old + h
            )
    return replace(inputs, params=params, grads=grads, memory=Memory(reals, inputs.memory.rest), values=values)


def _differences(f: Callable[[float], Tensor], h: float, one_sided: bool) -> list[Tensor]:
    """Differences of second order at 0: to the right, to the left, and their mean, the central one."""
    right = (-3 * f(0) + 4 * f(h / 2) - f(h)) / h
    if one_sided:
        return [right]
    left = (3 * f(0) - 4 * f(-h / 2) + f(-h)) / h
    return [right, left, (f(h) - f(-h)) / (2 * h)]


# At a kink (max(lr, lr_max) of equal numbers) each element of a derivative is that of one side. A difference is *told* if it
# stands out from rounding. A derivative is right if it agrees with the differences at one step size h at least, at which a
# derivative of the size seen at other ones would be told: those may lie across a kink or be too coarse.
def _check_row(
    channel: _Channel, rows: list[Key], ours: Tensor, base: dict[Key, Tensor], at: Callable[[float], dict[Key, Tensor]]
) -> bool:
    """Whether these rows depend on the channel. Raise where the derivative is not that of the differences."""

    def f(h: float) -> Tensor:
        there = at(h) if h else base
        if not there:
            return torch.full_like(ours, math.nan)
        if there.keys() != base.keys():
            raise _Lost(f"its state depends on whether {channel.name} is 0: start it at a value above 0.")
        return torch.cat([there[k].reshape(-1) for k in rows])

    size, tried = float(f(0).norm()), []
    steps = [h * channel.size for h in STEPS if channel.size] + ([*STEPS] if channel.room < math.inf else [])
    for h in steps:
        found = torch.stack(_differences(f, h, channel.room < h))
        noise, norm = ROUNDING * size / h, float(found.norm(dim=1).max())
        if math.isfinite(norm):
            error = float((found - ours).abs().amin(0).norm())
            tried.append(_Difference(noise, norm, error <= RTOL * norm + noise))
    told = [d.norm for d in tried if d.norm > TOLD * d.noise]
    if told and any(d.agrees and min(told) > TOLD * d.noise for d in tried):
        return True
    if tried and not told and all(d.agrees for d in tried):
        return bool((ours != 0).any())
    raise _Lost(
        f"the dependence of {_called(rows[0])} on {channel.name} is lost: by finite differences of a step it has the norm "
        f"{min(told, default=math.nan):.3g}, found was {float(ours.norm()):.3g}."
    )


@dataclass
class _Difference:
    noise: float
    norm: float
    agrees: bool
