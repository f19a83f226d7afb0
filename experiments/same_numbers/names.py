"""Names that the present code has and an older one had otherwise. Cases use the present ones."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import hypergrad

# old → new: keys of `tuner.stats`, keyword names, public attributes of hypergrad
NAMES: dict[str, str] = {"shapes": "schedules"}
ADDED = {"written_weights", "nonfinite_products"}  # keys of `tuner.stats` that an older one lacks: not compared


def older(name: str) -> list[str]:
    return [old for old, new in NAMES.items() if new == name]


def public(name: str) -> Any:
    """A public attribute of hypergrad, by its present name or an older one.

    Only `hypergrad.__all__` counts: an internal module may have had the name that is public now.
    """
    for each in (name, *older(name)):
        if each in hypergrad.__all__:
            return getattr(hypergrad, each)
    raise AttributeError(f"hypergrad has no public {name!r}")


def keywords(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options by the names that this function's signature has. A name that it has under no name stays as it is."""
    known = inspect.signature(function).parameters
    return {next((n for n in (name, *older(name)) if n in known), name): value for name, value in options.items()}


def counts(stats: Mapping[str, Any]) -> dict[str, Any]:
    """`tuner.stats` by its present keys, without those that were added."""
    return {NAMES.get(key, key): value for key, value in stats.items() if key not in ADDED}
