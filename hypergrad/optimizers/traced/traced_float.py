"""A Python float that carries a 0-d tensor, so that arithmetic on it is part of an autograd graph.

An optimizer computes with floats (`lr / (1 - beta1 ** step)`) and passes them to tensors. A `TracedFloat` is the float that
it would have had, to the last bit, with a float64 tensor made by the same operations.

    float(x), int(x), numpy, `from math import sqrt`     give a plain float back: the graph ends there
    math.sqrt(x), math.pow(x, y), …                      are traced within `traced_math`
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

TINY = 5e-324


class TracedFloat(float):
    """A float and the tensor `t` of the same value.

    Args:
        value: the float.
        t: 0-d, float64, with its graph.
        above_zero: compare a value of 0 as one just above it. An optimizer skips weight decay where it is 0, and the
            derivative there would be skipped with it.
    """

    t: Tensor
    above_zero: bool

    def __new__(cls, value: float, t: Tensor, above_zero: bool = False) -> TracedFloat:
        self = float.__new__(cls, value)
        self.t, self.above_zero = t, above_zero
        return self

    def __deepcopy__(self, memo: Any) -> TracedFloat:
        return self

    def __reduce__(self) -> Any:
        return float, (float(self),)

    __hash__ = float.__hash__

    def __bool__(self) -> bool:
        return _compared(self) != 0


def _compared(x: Any) -> Any:
    return TINY if isinstance(x, TracedFloat) and x.above_zero and float(x) == 0 else untraced(x)


def untraced(x: Any) -> Any:
    """The plain float of a traced one; anything else as it is."""
    return float(x) if isinstance(x, TracedFloat) else x


def traced(f: Callable[..., Any], g: Callable[..., Any], *args: Any) -> Any:
    """f of floats, and g, the same function, of their tensors."""
    value = f(*map(untraced, args))
    if not isinstance(value, float):  # a complex root, say
        return value
    return TracedFloat(value, g(*(x.t if isinstance(x, TracedFloat) else x for x in args)))


def _operator(op: Callable[[Any, Any], Any], reflected: bool) -> Callable[[Any, Any], Any]:
    def method(self: TracedFloat, other: Any) -> Any:
        pair = (other, self) if reflected else (self, other)
        if isinstance(other, Tensor):
            return op(*(x.t if isinstance(x, TracedFloat) else x for x in pair))
        return traced(op, op, *pair) if isinstance(other, (int, float)) else NotImplemented

    return method


def _comparison(op: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def method(self: TracedFloat, other: Any) -> Any:
        if isinstance(other, Tensor):
            return op(float(self), other)
        return op(_compared(self), _compared(other)) if isinstance(other, (int, float)) else NotImplemented

    return method


for _name in ("add", "sub", "mul", "truediv", "pow"):
    setattr(TracedFloat, f"__{_name}__", _operator(getattr(operator, _name), False))
    setattr(TracedFloat, f"__r{_name}__", _operator(getattr(operator, _name), True))
for _name in ("neg", "pos", "abs"):
    _op = getattr(operator, _name)
    setattr(TracedFloat, f"__{_name}__", lambda self, op=_op: traced(op, op, self))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(TracedFloat, f"__{_name}__", _comparison(getattr(operator, _name)))


_MATH: dict[str, Callable[..., Any]] = {
    name: getattr(torch, name)
    for name in ("sqrt", "exp", "expm1", "log", "log1p", "log2", "log10", "tanh", "sin", "cos", "tan", "atan")
} | {"pow": operator.pow, "fabs": abs}


def _traced_function(f: Callable[..., Any], g: Callable[..., Any]) -> Callable[..., Any]:
    def function(*args: Any) -> Any:
        return traced(f, g, *args) if any(isinstance(x, TracedFloat) for x in args) else f(*args)

    return function


@contextmanager
def traced_math() -> Iterator[None]:
    """Functions of the module `math` keep the graph of a TracedFloat; of other arguments they are what they were."""
    old = {name: getattr(math, name) for name in _MATH}
    try:
        for name, g in _MATH.items():
            setattr(math, name, _traced_function(old[name], g))
        yield
    finally:
        for name, f in old.items():
            setattr(math, name, f)
