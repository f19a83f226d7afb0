"""Optuna: distributions, and the values of its trials.

Optuna has no logit scale: a logit entry `name` is searched as its logit, a linear entry called "logit(name)". Choices that are no
plain values are stored by names, such as "0: Adam".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypergrad.search.entries import Categorical, Entry, Float, Int, labels, restored, stored
from hypergrad.search.extras import need
from hypergrad.search.scales import from_scale, to_scale
from hypergrad.search.space import Space, Values, as_space

_LOGIT = ("logit(", ")")


def key(name: str, entry: Entry) -> str:
    """The name of an entry among Optuna's parameters."""
    return name.join(_LOGIT) if isinstance(entry, Float) and entry.scale == "logit" else name


def plain_value(param: str, kept: Any) -> tuple[str, Any]:
    """The name of an entry, and its value, from Optuna's; a choice as it is kept.

    Example:
        >>> plain_value("logit(momentum)", 0.0), plain_value("lr", 0.1)
        (('momentum', 0.5), ('lr', 0.1))
    """
    if param.startswith(_LOGIT[0]) and param.endswith(_LOGIT[1]):
        return param[len(_LOGIT[0]) : -len(_LOGIT[1])], float(f"{from_scale(kept, 'logit'):.15g}")
    return param, kept


def distribution(entry: Entry) -> Any:
    """Optuna's distribution of an entry."""
    d = need("optuna", "a search").distributions
    if isinstance(entry, Categorical):
        return d.CategoricalDistribution(labels(entry))
    if isinstance(entry, Int):
        high = entry.high if entry.scale == "log" else entry.last
        return d.IntDistribution(entry.low, high, log=entry.scale == "log", step=entry.step)
    if entry.scale == "logit":
        return d.FloatDistribution(to_scale(entry.low, "logit"), to_scale(entry.high, "logit"))
    high = entry.high if entry.step is None else entry.grid()[-1]
    return d.FloatDistribution(entry.low, high, log=entry.scale == "log", step=entry.step)


def encode(space: Space, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as Optuna's parameters.

    Example:
        >>> space = Space({"momentum": Float(0.1, 0.9, "logit"), "layer": [int, str]})
        >>> encode(space, {"momentum": 0.5, "layer": str})
        {'logit(momentum)': 0.0, 'layer': '1: str'}
    """
    return {key(name, space[name]): _inside(space[name], value) for name, value in values.items()}


def decode(space: Space, params: Mapping[str, Any]) -> Values:
    """Optuna's parameters as values."""
    values: Values = {}
    for name, entry in space.items():
        if key(name, entry) in params:
            values[name] = _outside(entry, params[key(name, entry)])
    return values


def suggest(space: Space, trial: Any) -> Values:
    """Ask an `optuna.Trial` for every entry that is there, parents first: a space inside an Optuna objective.

    Args:
        space: a `Space`, or a dict for one.
        trial: of Optuna.
    """
    space, values = as_space(space), {}
    for name, entry in space.items():
        if space.is_active(name, values):
            values[name] = _outside(entry, _suggest(trial, key(name, entry), entry))
    return values


def _suggest(trial: Any, name: str, entry: Entry) -> Any:
    d = distribution(entry)
    if isinstance(entry, Categorical):
        return trial.suggest_categorical(name, d.choices)
    method = trial.suggest_int if isinstance(entry, Int) else trial.suggest_float
    return method(name, d.low, d.high, log=d.log, step=d.step)


def _inside(entry: Entry, value: Any) -> Any:
    if isinstance(entry, Float) and entry.scale == "logit":
        return to_scale(value, "logit")
    return stored(entry, value)


def _outside(entry: Entry, param: Any) -> Any:
    if isinstance(entry, Float) and entry.scale == "logit":
        return min(max(float(f"{from_scale(param, 'logit'):.15g}"), entry.low), entry.high)
    return restored(entry, param)


def to_optuna(space: Space | Mapping[str, Any]) -> dict[str, Any]:
    """name → distribution, for `study.ask` and samplers.

    Raises:
        ValueError: the space is conditional: use `suggest(space, trial)` inside an objective.
    """
    space = as_space(space)
    if space.conditional:
        raise ValueError(
            "Optuna's distributions cannot be conditional: call hypergrad.search.suggest(space, trial) inside the objective."
        )
    return {key(name, entry): distribution(entry) for name, entry in space.items()}


def from_optuna(distributions: Mapping[str, Any]) -> Space:
    """A space from name → Optuna distribution.

    Example:
        >>> from optuna.distributions import FloatDistribution
        >>> from_optuna({"lr": FloatDistribution(1e-4, 0.1, log=True)})["lr"].scale
        'log'
    """
    d = need("optuna", "from_optuna").distributions
    entries: dict[str, Any] = {}
    for name, each in distributions.items():
        if isinstance(each, d.CategoricalDistribution):
            entries[name] = Categorical(list(each.choices))
        elif not isinstance(each, (d.IntDistribution, d.FloatDistribution)):
            raise TypeError(f"{name}: expected an Optuna distribution, got {type(each).__name__}.")
        elif each.single():
            entries[name] = Categorical([each.low])
        elif isinstance(each, d.IntDistribution):
            entries[name] = Int(each.low, each.high, "log" if each.log else "linear", step=each.step)
        elif name.startswith(_LOGIT[0]) and name.endswith(_LOGIT[1]):
            (inner, low), (_, high) = plain_value(name, each.low), plain_value(name, each.high)
            entries[inner] = Float(low, high, "logit")
        else:
            entries[name] = Float(each.low, each.high, "log" if each.log else "linear", step=each.step)
    return Space(entries)
