"""Modes of differentiation, with one signature: functions of a trajectory, a stepper and the mode's own options."""

from collections.abc import Callable

from hypergrad.differentiate.forward import forward
from hypergrad.differentiate.implicit import implicit
from hypergrad.differentiate.reverse import unrolled
from hypergrad.differentiate.trajectory import Result

MODES: dict[str, Callable[..., Result]] = {"forward": forward, "unrolled": unrolled, "implicit": implicit}
OPTIONS: dict[str, tuple[str, ...]] = {
    "forward": (),
    "unrolled": ("every", "graph_memory", "offload", "below"),
    "implicit": ("solver", "look_back"),
}
