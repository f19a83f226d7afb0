"""Ray Tune: sample spaces of `ray.tune`.

Ray has neither conditions nor a logit scale: a conditional space is refused, a logit entry is a `sample_from` of its own draw.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from typing import Any

from hypergrad.search.entries import Categorical, Entry, Float, Int
from hypergrad.search.extras import need
from hypergrad.search.space import Space, as_space

_WHAT = "a space of Ray Tune"
_KINDS = ("Float", "Integer", "Categorical", "Function")  # of its sample spaces


class LogitDraw:
    """A uniform draw in the logit of an entry."""

    def __init__(self, entry: Float):
        self.entry = entry

    def __call__(self, config: Any = None) -> float:
        return self.entry.from_unit(random.random())


def _sample_space(entry: Entry, tune: Any) -> Any:
    if isinstance(entry, Categorical):
        return tune.choice(list(entry.choices))
    if isinstance(entry, Int):
        if entry.step > 1:
            return tune.choice(entry.grid())
        return (tune.lograndint if entry.scale == "log" else tune.randint)(entry.low, entry.high + 1)
    if entry.step is not None:
        return tune.choice(entry.grid())
    if entry.scale == "logit":
        return tune.sample_from(LogitDraw(entry))
    return (tune.loguniform if entry.scale == "log" else tune.uniform)(entry.low, entry.high)


def to_ray(space: Space | Mapping[str, Any]) -> dict[str, Any]:
    """name → sample space of Ray Tune, a `param_space`.

    Raises:
        ValueError: the space is conditional.
    """
    space, tune = as_space(space), need("ray.tune", _WHAT)
    if space.conditional:
        raise ValueError("Ray Tune's spaces cannot be conditional: use another strategy of hypergrad.search.optimize.")
    return {name: _sample_space(entry, tune) for name, entry in space.items()}


def from_ray(param_space: Mapping[str, Any]) -> Space:
    """A space from a `param_space`: uniform, loguniform, quniform, randint, lograndint, choice, grid_search and constants.

    Raises:
        ValueError: another sample space (randn, sample_from with a function of the user's), or one inside a dict or list.
    """
    need("ray.tune", _WHAT)
    if not isinstance(param_space, Mapping):
        raise TypeError(
            f"a param_space is a dict of name → sample space of ray.tune, got {type(param_space).__name__}."
        )
    return Space({name: _entry(name, each) for name, each in param_space.items()})


def _entry(name: str, each: Any) -> Any:
    kind, sampler = type(each).__name__, getattr(each, "sampler", None)
    if kind == "dict" and set(each) == {"grid_search"}:
        _check_constant(name, each["grid_search"])
        return Categorical(list(each["grid_search"]))
    if sampler is None and kind not in _KINDS:
        _check_constant(name, each)
        return Categorical([each])
    step = getattr(sampler, "q", None)
    scale = "log" if "LogUniform" in type(getattr(sampler, "sampler", sampler)).__name__ else "linear"
    if kind == "Categorical":
        _check_constant(name, each.categories)
        return Categorical(list(each.categories))
    if kind == "Integer" and (step is None or (scale == "linear" and each.lower % step == 0)):
        last = each.upper - 1 if step is None else each.upper  # with a step, Ray's upper end is included
        return Int(each.lower, last, scale, step=int(step or 1))
    uniform = "Uniform" in type(getattr(sampler, "sampler", sampler)).__name__
    if kind == "Float" and uniform and (step is None or scale == "linear"):
        return Float(each.lower, each.upper, scale, step=step)
    if kind == "Function" and isinstance(each.func, LogitDraw):
        return each.func.entry
    raise ValueError(f"{name}: this sample space of Ray Tune ({kind}) is not read: write Float, Int or Categorical.")


def _check_constant(name: str, value: Any) -> None:
    """Refuse a sample space inside a dict or list, which Ray Tune draws for itself and a space has no place for."""
    if isinstance(value, Mapping) and set(value) != {"grid_search"}:
        parts: Iterable[Any] = value.values()
    elif isinstance(value, (list, tuple)):
        parts = value
    else:
        if hasattr(value, "sampler") or type(value).__module__.startswith("ray.tune") or isinstance(value, Mapping):
            raise ValueError(
                f"{name}: a sample space inside a dict or list is not read. Give it a name of its own at the top of the space; "
                f"where it belongs to one choice of another, with a condition: Float(0.5, 0.99, when={{'optimizer': 'SGD'}})."
            )
        return
    for part in parts:
        _check_constant(name, part)
