"""What an optimizer remembers, taken apart into numbers and the rest, and put together again as an optimizer of its own.

reals    floating tensors in `state`, `param_groups` and attributes, and Python floats there: by name, as
         "state[3].exp_avg" or "group[0].d". Derivatives pass through them.
rest     everything else, the same structure with marks in the place of reals: integers, flags, step counters
         (a tensor of one element called "step"), tensors of integers, None. Constants of a step.
values   hyperparameters: the floats (or tuples of them) in `param_groups` that a step leaves alone. They are marks in
         `rest` too, and filled in anew for every step.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_NOT_ITS_OWN = frozenset({"step", "_opt_called", "grad_scale", "found_inf"})  # put there by schedulers and GradScaler
_ELSEWHERE = frozenset({"state", "param_groups"})


@dataclass(frozen=True)
class Mark:
    """Stands for a real, a parameter (its number) or a hyperparameter (group, name)."""

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


def take_apart(optimizer: torch.optim.Optimizer, values: frozenset[str]) -> Memory:
    """An optimizer's memory. Reals are its own tensors, constants are copies.

    Args:
        values: names in param_groups that are hyperparameters.
    """
    groups = optimizer.param_groups
    params = [p for group in groups for p in group["params"]]
    walk = _Walk({id(p): Mark("param", i) for i, p in enumerate(params)})
    attributes = {k: x for k, x in vars(optimizer).items() if k not in _NOT_ITS_OWN | _ELSEWHERE and not _hooks(k)}
    number = {id(p): i for i, p in enumerate(params)}
    state = [
        (Mark("param", number[id(p)]) if id(p) in number else p, walk(s, f"state[{number.get(id(p), p)}]"))
        for p, s in optimizer.state.items()
    ]
    return Memory(
        walk.reals,
        {
            "state": dict(sorted(state, key=lambda pair: str(pair[0]))),
            "groups": [_group(group, g, values, walk) for g, group in enumerate(groups)],
            "attributes": {k: copy.copy(x) if k == "defaults" else walk(x, f"self.{k}") for k, x in attributes.items()},
            "hooks": tuple(filter(_hooks, vars(optimizer))),
        },
    )


def _hooks(name: str) -> bool:
    return name.startswith("_optimizer_") and name.endswith("_hooks")


def _group(group: Mapping[str, Any], g: int, values: frozenset[str], walk: _Walk) -> dict[str, Any]:
    marks = {k: Mark("value", (g, k), like=x if isinstance(x, Tensor) else None) for k, x in group.items()}
    return {k: marks[k] if k in values else walk(x, f"group[{g}].{k}") for k, x in group.items()}


def is_counter(name: str, x: Tensor) -> bool:
    return x.numel() == 1 and label(name) == "step"


class _Walk:
    """Replaces reals by marks and collects them; the same tensor in two places is one real."""

    def __init__(self, marks: dict[int, Mark]):
        self.marks = marks
        self.reals: dict[str, Any] = {}

    def __call__(self, x: Any, name: str) -> Any:
        if id(x) in self.marks:
            return self.marks[id(x)]
        if isinstance(x, Tensor) and x.is_floating_point() and not is_counter(name, x):
            mark = self.marks[id(x)] = Mark("real", name, x.shape)
            self.reals[name] = x
            return mark
        if isinstance(x, float):
            self.reals[name] = x
            return Mark("real", name)
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
    if x is None or isinstance(x, (Mark, bool, int, float, str, type)) or callable(x):
        return x
    try:
        return copy.deepcopy(x)
    except Exception as error:
        raise NotImplementedError(f"it keeps a {type(x).__name__} that cannot be copied") from error


def put_together(
    cls: type[torch.optim.Optimizer],
    rest: Mapping[str, Any],
    params: Sequence[Tensor],
    reals: Mapping[str, Any],
    values: Callable[[int, str], Any],
) -> torch.optim.Optimizer:
    """An optimizer of its own with this memory, on these parameters, without anybody's hooks."""

    def fill(x: Any, _: str = "") -> Any:
        if not isinstance(x, Mark):
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
    if isinstance(a, Mark) and isinstance(b, Mark):
        return (a.kind, a.key) == (b.kind, b.key)
    return type(a) is type(b) and (a == b or a is b or not isinstance(a, (bool, int, str)))


def flat(x: Any, like: Tensor) -> Tensor:
    """A real as a vector of its own dtype; a float as one of float64."""
    if isinstance(x, Tensor):
        return x.detach().reshape(-1).clone()
    return torch.tensor([float(x)], dtype=torch.float64, device=like.device)


def shaped(mark: Mark, x: Tensor) -> Any:
    """A real from its vector."""
    return float(x) if mark.shape is None else x.view(mark.shape)


def marks_of(rest: Any) -> dict[str, Mark]:
    """The marks of reals in a rest, by name."""
    found: dict[str, Mark] = {}

    def look(x: Any, _: str = "") -> Any:
        if isinstance(x, Mark) and x.kind == "real":
            found[x.key] = x
        return rebuilt(x, look)

    for part in ("state", "groups", "attributes"):
        look(rest[part])
    return found


def write_back(optimizer: torch.optim.Optimizer, memory: Memory, values: frozenset[str]) -> None:
    """Write a memory into a live optimizer; in place where it holds a tensor of that shape."""
    groups = optimizer.param_groups
    params = [p for group in groups for p in group["params"]]
    now = take_apart(optimizer, values)

    def real(name: str, x: Any) -> Any:
        old = now.reals.get(name)
        if isinstance(old, Tensor) and isinstance(x, Tensor) and old.shape == x.shape:
            return old.detach().copy_(x)
        return x.clone() if isinstance(x, Tensor) else x

    reals = {name: real(name, x) for name, x in memory.reals.items()}
    twin = put_together(type(optimizer), memory.rest, params, reals, lambda g, name: groups[g][name])
    for p, state in twin.state.items():
        optimizer.state[p] = state
    for p in set(optimizer.state) - set(twin.state):
        del optimizer.state[p]
    for group, new in zip(groups, twin.param_groups, strict=True):
        for k in group.keys() - new.keys():
            del group[k]
        group.update({k: x for k, x in new.items() if k not in ("params", *values)})
    for k, x in memory.rest["attributes"].items():
        if marks_of({"state": x, "groups": (), "attributes": ()}) or not same(x, now.rest["attributes"].get(k)):
            vars(optimizer)[k] = vars(twin)[k]
    for k in now.rest["attributes"].keys() - memory.rest["attributes"].keys():
        del vars(optimizer)[k]
