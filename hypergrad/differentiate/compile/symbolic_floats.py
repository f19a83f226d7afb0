"""Numbers that are arguments of a traced computation, not constants in it.

An update rule computes with Python floats (`lr / (1 - beta1 ** t)`) and hands them to tensors. Traced as it is, their values at
the time would be written into the graph. A `SymbolicFloat` is such a float together with the formula it came from: the
arithmetic on it is done anew in Python at every call (`Book.evaluate`), and only where it meets a tensor does its result become
an input of the graph. A comparison (`t == 1`) is a branch: its outcome is noted, and the graph is good only where it comes out
the same.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_any, tree_map

from hypergrad.optimizers.traced.tracing import FORMULAS, in_place

Environment = Mapping[Any, float]  # the values of all numbers of a step
Formula = Callable[[Environment], Any]
MOST = 4096


class Book:
    """The numbers that a graph takes, and the comparisons that it depends on."""

    def __init__(self) -> None:
        self.used: list[Formula] = []
        self.branches: list[tuple[Formula, bool]] = []

    def number(self, value: float, key: Any) -> SymbolicFloat:
        return SymbolicFloat(value, lambda env: env[key], self)

    def evaluate(self, env: Environment) -> list[float]:
        return [f(env) for f in self.used]

    def outcomes(self, env: Environment) -> tuple[bool, ...]:
        return tuple(f(env) for f, _ in self.branches)

    def holds(self, env: Environment) -> bool:
        return all(f(env) == outcome for f, outcome in self.branches)


class SymbolicFloat(float):
    """A float and its formula."""

    formula: Formula
    book: Book

    def __new__(cls, value: float, formula: Formula, book: Book) -> SymbolicFloat:
        self = float.__new__(cls, value)
        self.formula, self.book = formula, book
        return self

    __hash__ = float.__hash__

    def __bool__(self) -> bool:
        return self != 0


def _plain(x: Any) -> Any:
    return float(x) if isinstance(x, SymbolicFloat) else x


def _formula(x: Any) -> Formula:
    return x.formula if isinstance(x, SymbolicFloat) else lambda env: x


def _operator(op: Callable[[Any, Any], Any], reflected: bool) -> Callable[[Any, Any], Any]:
    def method(self: SymbolicFloat, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        a, b = (other, self) if reflected else (self, other)
        f, g = _formula(a), _formula(b)
        return SymbolicFloat(op(_plain(a), _plain(b)), lambda env: op(f(env), g(env)), self.book)

    return method


def _comparison(op: Callable[[Any, Any], bool]) -> Callable[[Any, Any], Any]:
    def method(self: SymbolicFloat, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        f, g, outcome = _formula(self), _formula(other), op(_plain(self), _plain(other))
        self.book.branches.append((lambda env: op(f(env), g(env)), outcome))
        return outcome

    return method


def _negative(self: SymbolicFloat) -> SymbolicFloat:
    return SymbolicFloat(-float(self), lambda env: -self.formula(env), self.book)


for _name in ("add", "sub", "mul", "truediv", "pow"):
    setattr(SymbolicFloat, f"__{_name}__", _operator(getattr(operator, _name), False))
    setattr(SymbolicFloat, f"__r{_name}__", _operator(getattr(operator, _name), True))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(SymbolicFloat, f"__{_name}__", _comparison(getattr(operator, _name)))
SymbolicFloat.__neg__ = _negative  # type: ignore[method-assign, assignment]


class Lifting(TorchFunctionMode):
    """Operations that are given a SymbolicFloat take an element of `numbers` [MOST] in its place."""

    def __init__(self, numbers: Tensor, book: Book):
        super().__init__()
        self.numbers, self.book, self.known = numbers, book, {}

    def _tensor(self, x: Any) -> Any:
        if not isinstance(x, SymbolicFloat):
            return x
        if id(x) not in self.known:
            if len(self.book.used) == MOST:
                raise NotImplementedError(f"an update rule with more than {MOST} numbers")
            self.known[id(x)] = x, self.numbers[len(self.book.used)]
            self.book.used.append(x.formula)
        return self.known[id(x)][1]

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if not tree_any(lambda x: isinstance(x, SymbolicFloat), (args, kwargs)):
            return func(*args, **kwargs)
        new, kw = tree_map(self._tensor, (args, kwargs))
        name = func.__name__
        formula = FORMULAS.get(name.rstrip("_")) if not name.startswith("__") else None
        if formula is None:
            return func(*new, **kw)
        y = formula(*new, **kw)
        return args[0].copy_(y) if in_place(name) else y
