"""Hyperopt: expressions of `hp`.

Conditions are what Hyperopt writes as `hp.choice` between dicts. A point that `fmin` hands to its objective is then nested, and
`flat` makes it a dict of values again. A logit scale is written out, 1/(1 + exp(−hp.uniform("logit(name)", …))).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hypergrad.search.entries import Categorical, Entry, Float, Int
from hypergrad.search.extras import need
from hypergrad.search.scales import from_scale, to_scale
from hypergrad.search.space import Space, Values, as_space
from hypergrad.search.values import plain, same

_WHAT = "a space of Hyperopt"
_VALUE = "value"  # beside its children in the dict of a choice


def _expression(name: str, entry: Entry, space: Space, hp: Any) -> Any:
    if isinstance(entry, Categorical):
        return hp.choice(name, [_with_children(space, name, choice, hp) for choice in entry.choices])
    low, high = to_scale(entry.low, entry.scale), to_scale(entry.high, entry.scale)
    if isinstance(entry, Float):
        match entry.scale:
            case "logit":
                scope = need("hyperopt.pyll", _WHAT).scope
                return 1 / (1 + scope.exp(-hp.uniform(f"logit({name})", low, high)))
            case "log":
                return hp.loguniform(name, low, high)
        if entry.step is None:
            return hp.uniform(name, low, high)
    if isinstance(entry, Int) and entry.scale == "log":
        return need("hyperopt.pyll", _WHAT).scope.int(hp.qloguniform(name, low, high, 1))
    if isinstance(entry, Int) and entry.step == 1:
        return hp.randint(name, entry.low, entry.high + 1)
    return hp.choice(name, entry.grid())  # quniform rounds to multiples of the step, not to low plus multiples


def _with_children(space: Space, parent: str, choice: Any, hp: Any) -> Any:
    """A choice, or a dict of it and of what is there for it."""
    names = [n for n, e in space.items() if e.when and any(same(choice, v) for v in e.when.get(parent, ()))]
    if not names:
        return choice
    return {_VALUE: choice} | {n: _expression(_label(n, choice, space), space[n], space, hp) for n in names}


def _label(name: str, choice: Any, space: Space) -> str:
    """The label of an entry below a choice: Hyperopt needs a different one in each branch."""
    values = next(iter((space[name].when or {}).values()))
    return name if len(values) == 1 else f"{name}@{choice}"


def to_hyperopt(space: Space | Mapping[str, Any]) -> dict[str, Any]:
    """name → expression of `hyperopt.hp`, for `fmin`; `flat(point)` in the objective gives the values.

    Raises:
        ValueError: an entry depends on several others, or on one that is no Categorical.
    """
    space, hp = as_space(space), need("hyperopt", _WHAT).hp
    for name, entry in space.items():
        parents = list(entry.when or {})
        if len(parents) > 1 or not all(isinstance(space[p], Categorical) for p in parents):
            raise ValueError(
                f"{name}: Hyperopt's conditions are choices between dicts: one Categorical parent for each entry."
            )
    return {name: _expression(name, entry, space, hp) for name, entry in space.items() if not entry.when}


def flat(point: Mapping[str, Any]) -> Values:
    """A nested point of Hyperopt as a dict of values.

    Example:
        >>> flat({"lr": 0.1, "optimizer": {"value": "SGD", "momentum": 0.9}})
        {'lr': 0.1, 'optimizer': 'SGD', 'momentum': 0.9}
    """
    values: Values = {}
    for name, value in point.items():
        if isinstance(value, Mapping) and _VALUE in value:
            values |= {name: value[_VALUE]} | flat({n: v for n, v in value.items() if n != _VALUE})
        else:
            values[name] = plain(value)
    return values


def _is_choice(entry: Float | Int) -> bool:
    """Whether `_expression` lists a number's values."""
    return entry.scale == "linear" and entry.step is not None and not (isinstance(entry, Int) and entry.step == 1)


def labels_of(space: Space, values: Mapping[str, Any]) -> Values:
    """Values by the labels of `to_hyperopt`'s expressions, as Hyperopt keeps them: a choice by its index.

    Example:
        >>> labels_of(Space({"m": Float(0.1, 0.9, "logit"), "layer": ["relu", "tanh"]}), {"m": 0.5, "layer": "tanh"})
        {'logit(m)': 0.0, 'layer': 1}
    """
    found: Values = {}
    for name, value in values.items():
        entry = space[name]
        label = next((_label(name, values[parent], space) for parent in entry.when or {}), name)
        if isinstance(entry, Categorical):
            found[label] = entry.index(value)
        elif isinstance(entry, Float) and entry.scale == "logit":
            found[f"logit({label})"] = to_scale(value, "logit")
        elif _is_choice(entry):
            found[label] = min(range(len(entry.grid())), key=lambda i: abs(entry.grid()[i] - value))
        else:
            found[label] = value
    return found


def from_hyperopt(expressions: Mapping[str, Any]) -> Space:
    """A space from a dict of expressions: `uniform`, `loguniform`, `quniform`, `randint`, `uniformint` and `choice`, nested too.

    Raises:
        ValueError: another distribution (normal, pchoice, …): these have no bounds, or weights, which a space cannot
            express.
    """
    need("hyperopt", _WHAT)
    entries: dict[str, Any] = {}
    _read(expressions, None, entries)
    return Space(entries)


def _read(expressions: Mapping[str, Any], when: dict[str, list[Any]] | None, entries: dict[str, Any]) -> None:
    for name, expression in expressions.items():
        entry, children = _entry(name, expression)
        if name in entries:
            known = entries[name]
            if repr(type(known)(**{**vars(known), "when": None})) != repr(entry):
                raise ValueError(f"{name!r} has different ranges in different branches: give them different names.")
            joined = {p: [*known.when[p], *values] for p, values in (when or {}).items()}
            entries[name] = type(known)(**{**vars(known), "when": joined})
            continue
        entries[name] = type(entry)(**{**vars(entry), "when": when})
        for choice, below in children:
            _read(below, {name: [choice]}, entries)


def _entry(name: str, expression: Any) -> tuple[Entry, list[tuple[Any, Mapping[str, Any]]]]:
    """An entry, and what is there for which of its choices."""
    if not hasattr(expression, "pos_args"):
        return Categorical([expression]), []
    if expression.name == "switch":
        return _choice(name, expression.pos_args[0], expression.pos_args[1:])
    label, node = _parameter(name, expression)
    numbers = [arg.obj for arg in node.pos_args] + [arg.obj for _, arg in node.named_args if arg.name == "literal"]
    match node.name:
        case "uniform" if label == f"logit({name})":
            low, high = (float(f"{from_scale(x, 'logit'):.15g}") for x in numbers[:2])
            return Float(low, high, "logit"), []
        case "uniform":
            return Float(*numbers[:2]), []
        case "loguniform":
            low, high = (float(f"{math.exp(x):.15g}") for x in numbers[:2])
            return Float(low, high, "log"), []
        case "qloguniform" if numbers[2] == 1:
            low, high = (round(math.exp(x)) for x in numbers[:2])
            return Int(low, high, "log"), []
        case "randint":
            low, high = numbers if len(numbers) > 1 else (0, numbers[0])
            return Int(int(low), int(high) - 1), []
        case "quniform" if float(numbers[2]).is_integer() and all(float(x) % numbers[2] == 0 for x in numbers[:2]):
            return Int(int(numbers[0]), int(numbers[1]), step=int(numbers[2])), []
        case "quniform" if abs(numbers[0] / numbers[2] - round(numbers[0] / numbers[2])) < 1e-9:
            return Float(*numbers[:2], step=numbers[2]), []
    raise ValueError(f"{name}: hyperopt's {node.name} is not read: write Float, Int or Categorical.")


def _choice(name: str, index: Any, options: list[Any]) -> tuple[Entry, list[tuple[Any, Mapping[str, Any]]]]:
    if index.name != "hyperopt_param" or index.pos_args[1].name != "randint":
        raise ValueError(f"{name}: only hp.choice is read, not choices with weights.")
    choices, children = [], []
    for option in options:
        if option.name == "dict":
            below = dict(option.named_args)
            if _VALUE not in below:
                raise ValueError(f"{name}: a choice that is a dict is read where its own value is under {_VALUE!r}.")
            value = below.pop(_VALUE).obj
            children.append((value, below))
        else:
            value = option.obj if option.name == "literal" else _constant(name, option)
        choices.append(value)
    return Categorical(choices), children


def _constant(name: str, node: Any) -> Any:
    if node.name == "pos_args":
        return tuple(arg.obj if arg.name == "literal" else _constant(name, arg) for arg in node.pos_args)
    raise ValueError(f"{name}: a choice must be a value, got an expression {node.name!r}.")


def _parameter(name: str, node: Any) -> tuple[str, Any]:
    """The one parameter of an expression: its label, and its distribution."""
    found, left = [], [node]
    while left:
        each = left.pop()
        if each.name == "hyperopt_param":
            found.append((each.pos_args[0].obj, each.pos_args[1]))
        else:
            left += each.inputs()
    if len(found) != 1:
        raise ValueError(f"{name}: expected one hyperopt expression, got {len(found)}.")
    return found[0]
