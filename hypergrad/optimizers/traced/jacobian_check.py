"""The Jacobian of a traced step against finite differences of the step itself, one channel after the other.

    channels    the parameters, the gradients, each of the optimizer's tensors and floats, each tuned hyperparameter
    rows        the parameters, each of the optimizer's tensors and floats

along one random direction a channel, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hypergrad.core.finite_differences import central, one_sided
from hypergrad.optimizers.traced.memory import Memory, label
from hypergrad.optimizers.traced.own_step import Inputs, Key, Traced, trace, unrounded_step

RTOL = 1e-5  # of a difference that is significant
ROUNDING = 1e-14  # of a step's outputs, relative to their size: some tens of operations
SIGNIFICANT = 10  # times rounding: a difference above that is significant
STEPS = (1e-3, 1e-5, 1e-7)  # of differences, relative to the size of what is moved; for hyperparameters also absolute


class Lost(Exception):
    """The name of the channel that was lost."""


@dataclass
class Dependencies:
    """Which rows depend on which channels, and the channels among the optimizer's own numbers whose derivative is lost.

    A lost channel matters only where the number itself depends on something: tangents start at 0.
    """

    depends: set[tuple[str, str]] = field(default_factory=set)  # channel, row
    lost: dict[str, Lost] = field(default_factory=dict)

    def raise_lost(self) -> None:
        """Raise for a lost channel that depends on parameters, gradients or hyperparameters."""
        for name, error in self.lost.items():
            above, todo = {name}, [name]
            while todo:
                row = todo.pop()
                found = {channel for channel, r in self.depends if r == row} - above
                above |= found
                todo += found
            if any(not channel.startswith("its own") for channel in above):
                raise error


def randn(like: Tensor, random: torch.Generator) -> Tensor:
    """Random numbers of a stream of their own, float64."""
    return torch.randn(like.shape, generator=random, dtype=torch.float64).to(like.device)


@dataclass
class _Channel:
    """What is moved along `direction`, and its name in messages."""

    name: str
    direction: dict[Key, Any]
    size: float
    margin: float = math.inf  # how far it may be moved downwards: a hyperparameter not below 0
    own: bool = False  # one of the optimizer's tensors and floats


def _channels(inputs: Inputs, traced: Traced, tuned: frozenset[str], random: torch.Generator) -> list[_Channel]:
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
        # a relative change of each number: a variance stays above 0, and what is 0 stays 0 unless all of it is
        x = {k: traced.inputs[k].detach() for k in keys}
        direction = {k: randn(v, random) * (v if size > 0 else 1) for k, v in x.items()}
        out.append(_Channel(_described(keys[0]), direction, 1.0, own=kind[0] == "real"))
    return out


def compare(inputs: Inputs, tuned: frozenset[str], random: torch.Generator, dependencies: Dependencies) -> None:
    """One step: every channel into every row. What depends on what is recorded in `dependencies`; raises Lost."""
    device = inputs.params[0].device

    def at(inputs: Inputs) -> dict[Key, Tensor]:
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                out = unrounded_step(inputs)
        except (ArithmeticError, ValueError):  # a beta of 1, say
            return {}
        rows: dict[Key, Any] = {("param", i): p for i, p in enumerate(out.params)}
        return _on_host(rows | {("real", k): x for k, x in out.memory.reals.items()})

    traced, _ = trace(inputs, tuned)
    base = at(inputs)
    _check_values(traced, base)
    for channel in _channels(inputs, traced, tuned, random):
        z = {k: v[None] for k, v in channel.direction.items()}
        found = _on_host(traced.jvp(1, z))
        vjp = _on_host(traced.vjp({k: torch.ones_like(x) for k, x in traced.outputs.items()}))
        _check_transpose(channel, found, vjp)
        there = cache(lambda h, c=channel: at(_moved(inputs, c.direction, h)))
        for rows in _rows(base):
            ours = torch.cat([found[k][0].reshape(-1) for k in rows])
            try:
                if _check_row(channel, rows, ours, base, there):
                    dependencies.depends.add((channel.name, _described(rows[0])))
            except Lost as error:
                if not channel.own:
                    raise
                dependencies.depends.add((channel.name, _described(rows[0])))
                dependencies.lost.setdefault(channel.name, error)


def _on_host(x: Mapping[Key, Any]) -> dict[Key, Tensor]:
    """Numbers and tensors in float64 on the CPU, where they are compared: of a step on a device some are there, some here."""
    return {k: torch.as_tensor(v).detach().to("cpu", torch.float64) for k, v in x.items()}


def _described(key: Key) -> str:
    return {"param": "the parameters", "grad": "the gradients"}.get(key[0]) or f"its own `{label(key[1])}`"


def _check_values(traced: Traced, base: dict[Key, Tensor]) -> None:
    for key in base.keys() ^ traced.outputs.keys():
        raise Lost(
            f"its state depends on whether a hyperparameter is 0 (`{label(str(key[1]))}`): start it at a value above 0."
        )
    outputs = _on_host(traced.outputs)
    for key, x in base.items():
        y = outputs[key]
        if x.shape != y.shape or not torch.allclose(x, y, rtol=1e-7, atol=1e-12, equal_nan=True):
            off = f"{y.tolist() if y.numel() == 1 else tuple(y.shape)} for {x.tolist() if x.numel() == 1 else tuple(x.shape)}"
            raise Lost(f"{_described(key)} cannot be traced: its value is another one then ({off}).")


def _check_transpose(channel: _Channel, found: Mapping[Key, Tensor], vjp: Mapping[Key, Tensor]) -> None:
    left = torch.stack([x.sum() for x in found.values()])
    right = [(vjp[k] * v).sum() for k, v in _on_host(channel.direction).items() if k in vjp]
    total = torch.stack(right).sum() if right else torch.zeros(())
    if not abs(float(left.sum() - total)) <= 1e-9 * float(left.abs().sum()) + 1e-12:
        raise Lost(f"the dependence on {channel.name} is not the same forwards and backwards.")


def _rows(base: dict[Key, Tensor]) -> list[list[Key]]:
    rows: dict[Any, list[Key]] = {}
    for key in base:
        rows.setdefault(label(key[1]) if key[0] == "real" else None, []).append(key)
    return list(rows.values())


def _moved(inputs: Inputs, direction: Mapping[Key, Any], h: float) -> Inputs:
    """The inputs moved by h along a direction."""
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


def _differences(f: Callable[[float], Tensor], h: float, right_only: bool) -> list[Tensor]:
    """Differences at 0 from the right, from the left, and central."""
    right = one_sided(f, h)
    return [right] if right_only else [right, one_sided(f, -h), central(f, h)]


# At a kink (max(lr, lr_max) of equal numbers) each element of a derivative is that of one side. A difference is *significant* if
# it is well above rounding. A derivative is right if it agrees with the differences at one step size h at least, at which a
# derivative of the size seen at other step sizes would be significant: those may reach across a kink or be too coarse.
def _check_row(
    channel: _Channel,
    rows: list[Key],
    ours: Tensor,
    base: dict[Key, Tensor],
    step_at: Callable[[float], dict[Key, Tensor]],
) -> bool:
    """Whether these rows depend on the channel. Raise where the derivative is not that of the differences."""

    def f(h: float) -> Tensor:
        there = step_at(h) if h else base
        if not there:
            return torch.full_like(ours, math.nan)
        if there.keys() != base.keys():
            raise Lost(f"its state depends on whether {channel.name} is 0: start it at a value above 0.")
        return torch.cat([there[k].reshape(-1) for k in rows])

    size, tried = float(f(0).norm()), []
    steps = [h * channel.size for h in STEPS if channel.size] + ([*STEPS] if channel.margin < math.inf else [])
    for h in steps:
        found = torch.stack(_differences(f, h, channel.margin < h))
        noise, norm = ROUNDING * size / h, float(found.norm(dim=1).max())
        if math.isfinite(norm):
            error = float((found - ours).abs().amin(0).norm())
            tried.append(_Difference(noise, norm, error <= RTOL * norm + noise))
    significant = [d.norm for d in tried if d.norm > SIGNIFICANT * d.noise]
    if significant and any(d.agrees and min(significant) > SIGNIFICANT * d.noise for d in tried):
        return True
    if tried and not significant and all(d.agrees for d in tried):
        return bool((ours != 0).any())
    raise Lost(
        f"the dependence of {_described(rows[0])} on {channel.name} is lost: by finite differences of a step it has the norm "
        f"{min(significant, default=math.nan):.3g}, found was {float(ours.norm()):.3g}."
    )


@dataclass
class _Difference:
    noise: float
    norm: float
    agrees: bool
