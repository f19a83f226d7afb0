"""scikit-learn: `param_grid` and `param_distributions`, with scipy's frozen distributions.

A conditional space is a list of such dicts, one for every combination of values that conditions ask about.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from hypergrad.search.entries import Categorical, Entry, Float, Int
from hypergrad.search.extras import need
from hypergrad.search.space import Space, as_entry, as_space
from hypergrad.search.values import same

Params = dict[str, Any]


class Mapped:
    """A distribution that scipy does not have: uniform in an entry's scale. scikit-learn needs its `rvs` alone."""

    def __init__(self, entry: Float | Int):
        self.entry, self.unit = entry, need("scipy.stats", "a random draw").uniform()

    def rvs(self, size: Any = None, random_state: Any = None) -> Any:
        if size is None:
            return self.entry.from_unit(float(self.unit.rvs(random_state=random_state)))
        return [self.rvs(random_state=random_state) for _ in range(size)]


def _distribution(entry: Entry) -> Any:
    stats = need("scipy.stats", "to_param_distributions")
    if isinstance(entry, Categorical):
        return list(entry.choices)
    if isinstance(entry, Int) and entry.scale == "linear":
        return stats.randint(entry.low, entry.high + 1) if entry.step == 1 else entry.grid()
    if isinstance(entry, Float) and entry.step is not None:
        return entry.grid()
    if isinstance(entry, Float) and entry.scale == "linear":
        return stats.uniform(entry.low, entry.high - entry.low)
    if isinstance(entry, Float) and entry.scale == "log":
        return stats.loguniform(entry.low, entry.high)
    return Mapped(entry)


def to_param_grid(space: Space | Mapping[str, Any]) -> Params | list[Params]:
    """name → list of values, for `GridSearchCV` and `ParameterGrid`; a list of such dicts for a conditional space.

    Raises:
        ValueError: the grid is infinite: an entry is a Float without `points` or `step`.

    Example:
        >>> to_param_grid(Space({"depth": Int(1, 3), "C": Float(0.1, 10, "log", points=3)}))
        {'depth': [1, 2, 3], 'C': [0.1, 1.0, 10.0]}
    """
    space = as_space(space)
    return _expand(space, {name: entry.grid() for name, entry in space.items()})


def to_param_distributions(space: Space | Mapping[str, Any]) -> Params | list[Params]:
    """name → list or frozen distribution, for `RandomizedSearchCV` and `ParameterSampler`; a list of dicts if conditional."""
    space = as_space(space)
    return _expand(space, {name: _distribution(entry) for name, entry in space.items()})


def _expand(space: Space, params: Params) -> Params | list[Params]:
    """One dict for each combination of the parents' values."""
    if not space.conditional:
        return params
    parents = [name for name in space if any(name in (entry.when or {}) for entry in space.values())]
    out: list[Params] = []
    for combination in itertools.product(*(space[name].grid() for name in parents)):
        chosen = dict(zip(parents, combination))
        names = space.active(chosen)
        one = {name: [chosen[name]] if name in chosen else params[name] for name in names}
        if not any(one.keys() == other.keys() and _same_values(one, other, parents) for other in out):
            out.append(one)
    return out


def _same_values(a: Params, b: Params, parents: Sequence[str]) -> bool:
    return all(same(a[name][0], b[name][0]) for name in parents if name in a)


def from_sklearn(params: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Space:
    """A space from a `param_grid` or `param_distributions`, or a list of them that differ in one name's values.

    Args:
        params: name → list of values, scipy.stats.uniform, loguniform or randint, frozen.

    Raises:
        ValueError: a distribution without bounds, or one of another shape.

    Example:
        >>> from_sklearn([{"kernel": ["rbf"], "gamma": [0.1, 1.0]}, {"kernel": ["linear"]}])["gamma"].when
        {'kernel': ('rbf',)}
    """
    if isinstance(params, Mapping):
        return Space({name: _entry(name, value) for name, value in params.items()})
    if len(params) == 1:
        return from_sklearn(params[0])
    if not params:
        raise ValueError("the space is empty: the list of dicts has none.")
    return _joined(params)


def _joined(dicts: Sequence[Mapping[str, Any]]) -> Space:
    """Several dicts as one conditional space: told apart by a name whose values no two of them share."""
    parent = next((name for name in dicts[0] if _tells_apart(name, dicts)), None)
    if parent is None:
        raise ValueError(
            "a list of dicts is read as a conditional space where one name has different values in each of them, such as "
            "[{'kernel': ['rbf'], 'gamma': …}, {'kernel': ['linear']}]; here there is none."
        )
    entries: Params = {parent: Categorical([value for each in dicts for value in each[parent]])}
    for name in dict.fromkeys(name for each in dicts for name in each if name != parent):
        having = [each for each in dicts if name in each]
        made = [as_entry(name, _entry(name, each[name])) for each in having]
        if any(repr(entry) != repr(made[0]) for entry in made):
            raise ValueError(f"{name!r} has different ranges in different dicts: give them different names.")
        when = None if len(having) == len(dicts) else {parent: [v for each in having for v in each[parent]]}
        entries[name] = type(made[0])(**{**vars(made[0]), "when": when})
    return Space(entries)


def _tells_apart(name: str, dicts: Sequence[Mapping[str, Any]]) -> bool:
    if not all(isinstance(each.get(name), (list, tuple)) for each in dicts):
        return False
    values = [value for each in dicts for value in each[name]]
    return not any(same(a, b) for i, a in enumerate(values) for b in values[:i])


def _entry(name: str, value: Any) -> Any:
    if isinstance(value, Mapped):
        return value.entry
    if not hasattr(value, "dist") or not hasattr(value, "support"):
        if hasattr(value, "rvs"):
            raise ValueError(f"{name}: only scipy's frozen distributions are read, not a {type(value).__name__}.")
        return list(value) if isinstance(value, tuple) else value  # scikit-learn's choices may stand in any sequence
    low, high = (float(x) for x in value.support())
    kind = value.dist.name
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(
            f"{name}: scipy's {kind} has no bounds, and a search needs some: write Float(low, high, scale)."
        )
    match kind:
        case "uniform":
            return Float(low, high)
        case "loguniform" | "reciprocal":
            return Float(low, high, "log")
        case "randint":
            return Int(int(low), int(high))
    raise ValueError(
        f"{name}: scipy's {kind} is not read; uniform, loguniform and randint are: write Float(low, high, scale)."
    )
