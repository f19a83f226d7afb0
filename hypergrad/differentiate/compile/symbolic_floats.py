"""Numbers that are arguments of a traced computation, not constants in it.

An update rule computes with Python floats (`lr / (1 - beta1 ** t)`) and hands them to tensors. Traced as it is, their values at
the time would be written into the graph. A `SymbolicFloat` is such a float together with the formula it came from: the
arithmetic on it is done again in Python at every call (`Registry.evaluate`), and only where it is combined with a tensor does
its result become an input of the graph. A comparison (`t == 1`) is a branch: its outcome is recorded, and the graph holds only
where the outcome is the same.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_any, tree_map

from hypergrad.optimizers.traced.formulas import FORMULAS, in_place

Environment = Mapping[Any, float]  # the values of all numbers of a step
Formula = Callable[[Environment], Any]
MOST = 4096  # numbers of a graph


class Registry:
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
    registry: Registry

    def __new__(cls, value: float, formula: Formula, registry: Registry) -> SymbolicFloat:
        self = float.__new__(cls, value)
        self.formula, self.registry = formula, registry
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
        return SymbolicFloat(op(_plain(a), _plain(b)), lambda env: op(f(env), g(env)), self.registry)

    return method


def _comparison(op: Callable[[Any, Any], bool]) -> Callable[[Any, Any], Any]:
    def method(self: SymbolicFloat, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        f, g, outcome = _formula(self), _formula(other), op(_plain(self), _plain(other))
        self.registry.branches.append((lambda env: op(f(env), g(env)), outcome))
        return outcome

    return method


def _negative(self: SymbolicFloat) -> SymbolicFloat:
    return SymbolicFloat(-float(self), lambda env: -self.formula(env), self.registry)


for _name in ("add", "sub", "mul", "truediv", "pow"):
    setattr(SymbolicFloat, f"__{_name}__", _operator(getattr(operator, _name), False))
    setattr(SymbolicFloat, f"__r{_name}__", _operator(getattr(operator, _name), True))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(SymbolicFloat, f"__{_name}__", _comparison(getattr(operator, _name)))
SymbolicFloat.__neg__ = _negative  # type: ignore[method-assign, assignment]


class SymbolicMode(TorchFunctionMode):
    """Replaces each SymbolicFloat among an operation's arguments by an element of `numbers` [MOST]."""

    def __init__(self, numbers: Tensor, registry: Registry):
        super().__init__()
        self.numbers, self.registry, self.known = numbers, registry, {}

    def _tensor(self, x: Any) -> Any:
        if not isinstance(x, SymbolicFloat):
            return x
        if id(x) not in self.known:
            if len(self.registry.used) == MOST:
                raise NotImplementedError(f"an update rule with more than {MOST} numbers")
            self.known[id(x)] = x, self.numbers[len(self.registry.used)]
            self.registry.used.append(x.formula)
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
