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
    if isinstance(
        choice, (list, tuple, dict)
    ):  # as it is: Hyperopt would make a list a tuple, and read expressions in a dict
        choice = need("hyperopt.pyll", _WHAT).Literal(choice)
    if not names:
        return choice
    return {_VALUE: choice} | {n: _expression(_label(n, choice, space), space[n], space, hp) for n in names}


def _label(name: str, choice: Any, space: Space) -> str:
    """The label of an entry below a choice: Hyperopt needs a different one in each branch."""
    values = next(iter((space[name].when or {}).values()))
    return name if len(values) == 1 else f"{name}@{choice}"


def to_hyperopt(space: Space | Mapping[str, Any]) -> dict[str, Any]:
    """name → expression of `hyperopt.hp`, for `fmin`; `hyperopt_objective` gives an objective the values of its points.

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


def flat(point: Mapping[str, Any], space: Space | None = None) -> Values:
    """A nested point of Hyperopt as a dict of values.

    Args:
        space: tells dicts that are choices from those that hold one and what belongs to it.

    Example:
        >>> flat({"lr": 0.1, "optimizer": {"value": "SGD", "momentum": 0.9}})
        {'lr': 0.1, 'optimizer': 'SGD', 'momentum': 0.9}
    """
    values: Values = {}
    for name, value in point.items():
        chosen = space is not None and name in space and value in space[name]
        if isinstance(value, Mapping) and _VALUE in value and not chosen:
            values |= {name: value[_VALUE]} | flat({n: v for n, v in value.items() if n != _VALUE}, space)
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


def from_hyperopt(expressions: Any) -> Space:
    """A space from a dict of expressions: `uniform`, `loguniform`, `quniform`, `randint`, `uniformint` and `choice`, nested too.

    Args:
        expressions: name → expression; or an `hp.choice` between such dicts, which a name with another constant in each of them
            tells apart: [{"model": "svm", "C": hp.loguniform("C", -5, 5)}, {"model": "tree"}].

    Raises:
        ValueError: another distribution (normal, pchoice, …): these have no bounds, or weights, which a space cannot
            express; dicts or lists of expressions, where the space has a place for single ones only.
    """
    need("hyperopt", _WHAT)
    entries: dict[str, Any] = {}
    if isinstance(expressions, Mapping):
        _read(expressions, None, entries)
    else:
        parent, branches = _branches(expressions)
        entries[parent] = Categorical([value for value, _ in branches])
        for value, below in branches:
            _read(below, {parent: [value]}, entries)
    return Space(entries)


def _branches(expression: Any) -> tuple[str, list[tuple[Any, Mapping[str, Any]]]]:
    """Of a choice between dicts: the name that tells them apart, and for each of them its value and what else is there."""
    is_choice = getattr(expression, "name", None) == "switch"
    dicts = [dict(each.named_args) for each in expression.pos_args[1:] if each.name == "dict"] if is_choice else []
    if is_choice and len(dicts) == len(expression.pos_args) - 1:
        _check_index("the space", expression.pos_args[0])
        for name in dicts[0]:
            if all(name in each and not _parameters(each[name]) for each in dicts):
                values = [_constant(name, each.pop(name)) for each in dicts]
                if any(same(a, b) for i, a in enumerate(values) for b in values[:i]):
                    raise ValueError(
                        f"the space: {name!r} is the same in several dicts of its hp.choice: tell them apart by it."
                    )
                return name, list(zip(values, dicts))
    raise ValueError(
        "a space of Hyperopt is read where it is a dict of name → expression, or an hp.choice between dicts in which one name "
        "has another constant in each, such as [{'model': 'svm', 'C': …}, {'model': 'tree'}]."
    )


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
    expression = need("hyperopt.pyll", _WHAT).as_apply(expression) if _nested(expression) else expression
    if not hasattr(expression, "pos_args"):
        return Categorical([expression]), []
    if expression.name in ("literal", "pos_args", "dict"):
        return Categorical([_constant(name, expression)]), []
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
    _check_index(name, index)
    choices, children = [], []
    for option in options:
        below = dict(option.named_args) if option.name == "dict" else {}
        if _VALUE in below:
            value = _constant(name, below.pop(_VALUE))
            children.append((value, below))
        else:
            value = _constant(name, option)
        choices.append(value)
    return Categorical(choices), children


def _check_index(name: str, index: Any) -> None:
    if index.name != "hyperopt_param" or index.pos_args[1].name != "randint":
        raise ValueError(f"{name}: only hp.choice is read, not choices with weights.")


def _nested(expression: Any) -> bool:
    """Whether it is a list or dict with expressions inside."""
    parts = expression.values() if isinstance(expression, Mapping) else expression
    return isinstance(expression, (Mapping, list, tuple)) and any(hasattr(x, "pos_args") or _nested(x) for x in parts)


def _constant(name: str, node: Any) -> Any:
    match node.name:
        case "literal":
            return node.obj
        case "pos_args":
            return tuple(_constant(name, arg) for arg in node.pos_args)
        case "dict":
            return {key: _constant(name, arg) for key, arg in node.named_args}
    raise ValueError(
        f"{name}: an expression inside a list or dict is not read. Name it at the top of the space; or, where it belongs to one "
        f"choice of an hp.choice, beside that choice's own value under {_VALUE!r}: {{{_VALUE!r}: 'SGD', 'momentum': "
        "hp.uniform('momentum', 0, 1)}."
    )


def _parameters(node: Any) -> list[tuple[str, Any]]:
    """The parameters of an expression: the label of each, and its distribution."""
    if node.name == "hyperopt_param":
        return [(node.pos_args[0].obj, node.pos_args[1])]
    return [found for each in node.inputs() for found in _parameters(each)]


def _parameter(name: str, node: Any) -> tuple[str, Any]:
    """The one parameter of an expression."""
    found = _parameters(node)
    if len(found) != 1:
        raise ValueError(f"{name}: expected one hyperopt expression, got {len(found)}.")
    return found[0]
