"""Modes of differentiation: drivers over the gradient stage and the transition stage, with one signature."""

from collections.abc import Callable

from hypergrad.modes.forward import forward
from hypergrad.modes.implicit import implicit
from hypergrad.modes.stretch import Result
from hypergrad.modes.unrolled import unrolled

MODES: dict[str, Callable[..., Result]] = {"forward": forward, "unrolled": unrolled, "implicit": implicit}
OPTIONS: dict[str, tuple[str, ...]] = {
    "forward": (),
    "unrolled": ("every", "below"),
    "implicit": ("solver", "look_back"),
}

__all__ = ["MODES", "OPTIONS", "Result"]
