"""What an optimizer remembers, split into numbers and the rest, and an optimizer assembled from both.

reals    floating tensors in `state`, `param_groups` and attributes, and Python floats there: by name, as
         "state[3].exp_avg" or "group[0].d". Derivatives pass through them.
rest     everything else, the same structure with placeholders for reals: integers, flags, step counters
         (a tensor of one element called "step"), tensors of integers, None. Constants of a step.
values   hyperparameters: the floats (or tuples of them) in `param_groups` that a step does not write to. They are
         placeholders in `rest` too, and filled in for every step.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_NOT_ITS_OWN = frozenset({"step", "_opt_called", "grad_scale", "found_inf"})  # written by schedulers and GradScaler
_ELSEWHERE = frozenset({"state", "param_groups"})


@dataclass(frozen=True)
class Placeholder:
    """Of a real, a parameter (its number) or a hyperparameter (group, name)."""

    kind: str
    key: Any
    shape: torch.Size | None = None  # of a real; None: a Python float
    like: Tensor | None = None  # a hyperparameter that was a tensor


@dataclass
class Memory:
    reals: dict[str, Any]  # tensors and floats
    rest: dict[str, Any]


def label(name: str) -> str:
    """The name of a real without its place: "exp_avg" for "state[3].exp_avg"."""
    return name.rsplit(".", 1)[-1]


def split(optimizer: torch.optim.Optimizer, values: frozenset[str]) -> Memory:
    """An optimizer's memory. Reals are its own tensors, constants are copies.

    Args:
        values: names in param_groups that are hyperparameters.
    """
    groups = optimizer.param_groups
    params = [p for group in groups for p in group["params"]]
    extract = _Extraction({id(p): Placeholder("param", i) for i, p in enumerate(params)})
    attributes = {k: x for k, x in vars(optimizer).items() if k not in _NOT_ITS_OWN | _ELSEWHERE and not _hooks(k)}
    number = {id(p): i for i, p in enumerate(params)}
    state = [
        (Placeholder("param", number[id(p)]) if id(p) in number else p, extract(s, f"state[{number.get(id(p), p)}]"))
        for p, s in optimizer.state.items()
    ]
    return Memory(
        extract.reals,
        {
            "state": dict(sorted(state, key=lambda pair: str(pair[0]))),
            "groups": [_group(group, g, values, extract) for g, group in enumerate(groups)],
            "attributes": {
                k: copy.copy(x) if k == "defaults" else extract(x, f"self.{k}") for k, x in attributes.items()
            },
            "hooks": tuple(filter(_hooks, vars(optimizer))),
        },
    )


def _hooks(name: str) -> bool:
    return name.startswith("_optimizer_") and name.endswith("_hooks")


def _group(group: Mapping[str, Any], g: int, values: frozenset[str], extract: _Extraction) -> dict[str, Any]:
    placeholders = {
        k: Placeholder("value", (g, k), like=x if isinstance(x, Tensor) else None) for k, x in group.items()
    }
    return {k: placeholders[k] if k in values else extract(x, f"group[{g}].{k}") for k, x in group.items()}


def is_counter(name: str, x: Tensor) -> bool:
    return x.numel() == 1 and label(name) == "step"


class _Extraction:
    """Replaces reals by placeholders and collects them; a tensor that is found twice is one real."""

    def __init__(self, placeholders: dict[int, Placeholder]):
        self.placeholders = placeholders
        self.reals: dict[str, Any] = {}

    def __call__(self, x: Any, name: str) -> Any:
        if id(x) in self.placeholders:
            return self.placeholders[id(x)]
        if isinstance(x, Tensor) and x.is_floating_point() and not is_counter(name, x):
            placeholder = self.placeholders[id(x)] = Placeholder("real", name, x.shape)
            self.reals[name] = x
            return placeholder
        if isinstance(x, float):
            self.reals[name] = x
            return Placeholder("real", name)
        if isinstance(x, Tensor) and x.is_complex():
            raise NotImplementedError(f"it keeps complex numbers ({name})")
        if isinstance(x, (torch.optim.Optimizer, torch.nn.Module)):
            raise NotImplementedError(f"it holds a {type(x).__name__} ({name}): give the inner optimizer itself")
        return rebuilt(x, lambda y, key: self(y, f"{name}{key}"))


def rebuilt(x: Any, f: Callable[[Any, str], Any]) -> Any:
    """A container with f(element, its key as text) in it; a copy of anything else."""
    if isinstance(x, Tensor):
        return x.detach().clone()
    if isinstance(x, dict):
        out = copy.copy(x)
        out.update({k: f(y, f".{k}") for k, y in x.items()})
        return out
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*(f(y, f".{k}") for k, y in zip(x._fields, x, strict=True)))  # type: ignore[attr-defined]
    if isinstance(x, deque):
        return deque((f(y, f"[{i}]") for i, y in enumerate(x)), x.maxlen)
    if type(x) in (list, tuple):
        return type(x)(f(y, f"[{i}]") for i, y in enumerate(x))
    if x is None or isinstance(x, (Placeholder, bool, int, float, str, type)) or callable(x):
        return x
    try:
        return copy.deepcopy(x)
    except Exception as error:
        raise NotImplementedError(f"it keeps a {type(x).__name__} that cannot be copied") from error


def assembled(
    cls: type[torch.optim.Optimizer],
    rest: Mapping[str, Any],
    params: Sequence[Tensor],
    reals: Mapping[str, Any],
    values: Callable[[int, str], Any],
) -> torch.optim.Optimizer:
    """A new optimizer with this memory, on these parameters, without hooks."""

    def fill(x: Any, _: str = "") -> Any:
        if not isinstance(x, Placeholder):
            return rebuilt(x, fill)
        if x.kind == "param":
            return params[x.key]
        if x.kind == "real":
            return reals[x.key]
        value = values(*x.key)
        return value if x.like is None or type(value) is not float else torch.full_like(x.like, value)

    optimizer = object.__new__(cls)
    vars(optimizer).update({name: OrderedDict() for name in rest["hooks"]})
    vars(optimizer).update({k: fill(x) for k, x in rest["attributes"].items()})
    optimizer.param_groups = [{k: fill(x) for k, x in group.items()} for group in rest["groups"]]
    optimizer.state = defaultdict(dict, {fill(p): fill(s) for p, s in rest["state"].items()})
    return optimizer


def same(a: Any, b: Any) -> bool:
    """Whether two rests are equal."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(x, b[k]) for k, x in a.items())
    if isinstance(a, (list, tuple, deque)) and type(a) is type(b):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, Placeholder) and isinstance(b, Placeholder):
        return (a.kind, a.key) == (b.kind, b.key)
    return type(a) is type(b) and (a == b or a is b or not isinstance(a, (bool, int, str)))


def flat(x: Any, like: Tensor) -> Tensor:
    """A real as a vector of its own dtype; a float as one of float64."""
    if isinstance(x, Tensor):
        return x.detach().reshape(-1).clone()
    return torch.tensor([float(x)], dtype=torch.float64, device=like.device)


def shaped(placeholder: Placeholder, x: Tensor) -> Any:
    """A real from its vector."""
    return float(x) if placeholder.shape is None else x.view(placeholder.shape)


def placeholders_of(rest: Any) -> dict[str, Placeholder]:
    """The placeholders of reals in a rest, by name."""
    found: dict[str, Placeholder] = {}

    def collect(x: Any, _: str = "") -> Any:
        if isinstance(x, Placeholder) and x.kind == "real":
            found[x.key] = x
        return rebuilt(x, collect)

    for part in ("state", "groups", "attributes"):
        collect(rest[part])
    return found


def write_back(optimizer: torch.optim.Optimizer, memory: Memory, values: frozenset[str]) -> None:
    """Write a memory into a live optimizer; in place where it holds a tensor of that shape."""
    groups = optimizer.param_groups
    params = [p for group in groups for p in group["params"]]
    now = split(optimizer, values)

    def real(name: str, x: Any) -> Any:
        old = now.reals.get(name)
        if isinstance(old, Tensor) and isinstance(x, Tensor) and old.shape == x.shape:
            return old.detach().copy_(x)
        return x.clone() if isinstance(x, Tensor) else x

    reals = {name: real(name, x) for name, x in memory.reals.items()}
    twin = assembled(type(optimizer), memory.rest, params, reals, lambda g, name: groups[g][name])
    for p, state in twin.state.items():
        optimizer.state[p] = state
    for p in set(optimizer.state) - set(twin.state):
        del optimizer.state[p]
    for group, new in zip(groups, twin.param_groups, strict=True):
        for k in group.keys() - new.keys():
            del group[k]
        group.update({k: x for k, x in new.items() if k not in ("params", *values)})
    for k, x in memory.rest["attributes"].items():
        if placeholders_of({"state": x, "groups": (), "attributes": ()}) or not same(x, now.rest["attributes"].get(k)):
            vars(optimizer)[k] = vars(twin)[k]
    for k in now.rest["attributes"].keys() - memory.rest["attributes"].keys():
        del vars(optimizer)[k]
