"""Hyperparameters of param groups as plain numbers, and with one number replaced."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hypergrad.optimizers.rule import parts


def floats(value: Any) -> Any:
    """A group's value as a float, a tuple of floats or None."""
    if isinstance(value, (tuple, list)):
        return tuple(float(x) for x in value)
    return None if value is None else float(value)


def plain(value: Any) -> Any:
    """A group's value as the number or the tuple of numbers that it holds, ints left as ints."""
    return value.item() if isinstance(value, Tensor) else value


def part_of(value: Any, name: str, part: str) -> Any:
    """One number of a group's value. part: the update rule's name of it (beta1 of betas)."""
    if value is None:
        return None
    return value[parts(name).index(part)] if isinstance(value, tuple) else value


def replaced(old: Any, name: str, part: str, value: float) -> Any:
    """A group's value with one number in it replaced. part: as of `part_of`."""
    if not isinstance(old, (tuple, list)):
        return value
    new = list(old)
    new[parts(name).index(part)] = value
    return tuple(new)
