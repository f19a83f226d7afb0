"""Schedules: numbers of the optimizer that are Python functions of the step and of tensors φ, differentiated by autograd.

With h_t = f(t, φ) at step t, the path of φ through the schedule is

    adjoint   dL/dφ += (∂f_t/∂φ)ᵀ λ_h,t        λ_h,t: the per-step hypergradient; summed over the steps
    tangent   ḣ_t = (∂f_t/∂φ) φ̇               a seed of the step

f_t is evaluated for every t before training begins, and again where it is differentiated: no graph is kept.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hypergrad.core.float64 import on_host
from hypergrad.optimizers.binding import Values
from hypergrad.optimizers.ema import EMA, check_decay
from hypergrad.optimizers.registry import rule_of
from hypergrad.optimizers.rule import Tensors, parts
from hypergrad.optimizers.transition import CLIPS, Transition

Function = Callable[[int, Tensors], Any]
_OF_THE_CONSTRUCTOR = "initial_accumulator_value"


class Slope(NamedTuple):
    """∂h/∂φ of one scheduled number at one step: name of a tensor φ -> gradient of its shape."""

    group: int | None  # None: a clipping threshold
    part: str
    of: Tensors


class StepValues(Sequence[Values]):
    """The hyperparameters of every step: those of the param groups, those that are scheduled replaced by an array each."""

    def __init__(self, base: Values, steps: int):
        self.base, self.steps = base, steps
        self.arrays: Tensors = {}  # name -> [K], [K, n_groups], or [K, n_groups, 2] of betas

    def write(self, name: str, t: int, x: Tensor) -> None:
        if name not in self.arrays:
            self.arrays[name] = x.new_empty(self.steps, *x.shape)
        self.arrays[name][t] = x

    def columns(self, t: int) -> Values:
        """The scheduled values of step t; None for a group without the name."""
        return {name: self._column(name, x[t]) for name, x in self.arrays.items()}

    def _column(self, name: str, x: Tensor) -> list[Any]:
        rows = [x.tolist()] if x.dim() == 0 else x.tolist()
        rows += self.base[name][len(rows) :]  # of an EMA: None
        return [
            None if old is None else tuple(new) if isinstance(new, list) else new
            for old, new in zip(self.base[name], rows, strict=True)
        ]

    def __getitem__(self, t: int) -> Values:  # type: ignore[override]
        return self.base | self.columns(range(self.steps)[t])

    def __len__(self) -> int:
        return self.steps


class Schedules:
    """The schedules of a trajectory.

    Args:
        functions: name -> f(step, hypers): a number, a scalar tensor, or one for each param group; of betas a pair, or a pair for
            each param group.
        hypers: the tensors φ.
        base: values that are not scheduled.
        given: what the functions get as `hypers`, nets in place of their tensors; None: `hypers`.

    Raises:
        ValueError: a name that no param group has.
        TypeError: a schedule that is not a function.
    """

    def __init__(
        self, functions: Mapping[str, Function], hypers: Tensors, base: Values, given: dict[str, Any] | None = None
    ):
        self.functions, self.hypers, self.base = dict(functions), hypers, base
        self.given = hypers if given is None else given
        self.reached: set[str] = set()  # keys of φ that a schedule was found to depend on
        self.evaluated: StepValues  # of every step; set by `evaluate`
        for name, f in self.functions.items():
            if not callable(f):
                raise TypeError(f"schedules[{name!r}] must be a function f(step, hypers), got {type(f).__name__}.")
            if name in (*CLIPS, EMA) and name not in base:
                raise ValueError(f"to schedule {name!r}, pass {name}=<number> too: that turns it on.")
            if name not in base or name == _OF_THE_CONSTRUCTOR:
                known = [x for x in base if x != _OF_THE_CONSTRUCTOR]
                raise ValueError(
                    f"schedules[{name!r}]: no step reads a hyperparameter of this name; there are {known}."
                )

    def evaluate(self, steps: int, transition: Transition) -> StepValues:
        """The values of every step, checked.

        Raises:
            ValueError: a value that is not finite, or where the optimizer is discontinuous.
        """
        self.evaluated = StepValues(self.base, steps)
        for t in range(steps):
            with torch.no_grad():
                for name in self.functions:
                    self.evaluated.write(name, t, self._checked(name, self.at(name, t), t))
            _check_flags(self.evaluated.columns(t), transition, t)
        if "momentum" in self.functions:
            self._check_momentum(transition)
        return self.evaluated

    def at(self, name: str, t: int) -> Tensor:
        """h_t with its graph, on the CPU in float64: [n_groups], [n_groups, 2] of betas, [] of what belongs to no group."""
        value = self.functions[name](t, self.given)
        try:
            x = stacked(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"schedules[{name!r}] returned a {type(value).__name__} at step {t}: return a number, a scalar tensor, or one "
                f"for each param group ({error})."
            ) from error
        if name in (*CLIPS, EMA):
            shapes: list[tuple[int, ...]] = [()]
        else:
            one = (len(parts(name)),) if len(parts(name)) > 1 else ()
            shapes = [(len(self.base[name]), *one), one]
        if tuple(x.shape) not in shapes:
            raise ValueError(f"schedules[{name!r}] returned shape {tuple(x.shape)} at step {t}, not one of {shapes}.")
        return x.expand(shapes[0])

    @staticmethod
    def _checked(name: str, x: Tensor, t: int) -> Tensor:
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"schedules[{name!r}] is not finite at step {t}: {x.tolist()}.")
        if name in CLIPS and not x > 0:
            raise ValueError(f"schedules[{name!r}] is {float(x)} at step {t}: a clipping threshold must be positive.")
        if name == EMA:
            check_decay(float(x), f"schedules[{name!r}] at step {t}")
        return x

    # torch leaves the buffer as it is at a momentum of exactly 0, and a later step reads it
    def _check_momentum(self, transition: Transition) -> None:
        for group, rule in enumerate(transition.rules):
            zero = (self.evaluated.arrays["momentum"][:, group] == 0).tolist()
            if getattr(rule, "buffered", False) and any(zero) and not all(zero):
                raise ValueError(
                    f"schedules['momentum'] is exactly 0 at step {zero.index(True)} and not at another: {type(rule).__name__} "
                    "leaves its buffer untouched there, which is no limit of small momenta. Schedule a value above 0."
                )

    def vjp(self, t: int, lam: Callable[[str], Tensor]) -> Tensors:
        """(∂f_t/∂φ)ᵀ λ, summed over the schedules. `lam(name)`: the derivative in h_t, of the shape of `at`."""
        with torch.enable_grad():
            found = [(self._again(name, t), name) for name in self.functions] if self.hypers else []
        outputs = [(h, on_host(lam(name)).view(h.shape)) for h, name in found if h.requires_grad]
        if not outputs:
            return {}
        values, cotangents = zip(*outputs, strict=True)
        return self._named(torch.autograd.grad(values, list(self.hypers.values()), cotangents, allow_unused=True))

    def slopes(self, t: int) -> Iterator[Slope]:
        """∂f_t/∂φ of every scheduled number that depends on φ."""
        for name in self.functions if self.hypers else ():
            with torch.enable_grad():
                h = self._again(name, t)
            if not h.requires_grad:
                continue
            numbers = [(group, part) for group in range(len(self.base[name])) for part in parts(name)]
            numbers = [(None, name)] if name in CLIPS else [(0, name)] if name == EMA else numbers
            for (group, part), x in zip(numbers, h.reshape(-1), strict=True):
                slopes = torch.autograd.grad(x, list(self.hypers.values()), retain_graph=True, allow_unused=True)
                if group is None or self.base[name][group] is not None:
                    yield Slope(group, part, self._named(slopes))

    def _again(self, name: str, t: int) -> Tensor:
        """h_t computed again; it must be what it was."""
        h = self.at(name, t)
        if not torch.equal(h.detach(), self.evaluated.arrays[name][t]):
            raise ValueError(
                f"schedules[{name!r}] gave another value at step {t} than before: it must be a function of the step and of "
                "hypers alone, without a counter or random numbers of its own."
            )
        return h

    def _named(self, gradients: Any) -> Tensors:
        out = {name: g for name, g in zip(self.hypers, gradients, strict=True) if g is not None}
        self.reached |= out.keys()
        return out


def stacked(value: Any) -> Tensor:
    """Numbers, tensors and sequences of them as one tensor with the graphs of all."""
    if isinstance(value, Tensor):
        return on_host(value)
    if isinstance(value, (list, tuple)):
        return torch.stack([stacked(x) for x in value])
    if isinstance(value, bool) or value is None:
        raise TypeError("not a number")
    return torch.tensor(float(value), dtype=torch.float64)


def _check_flags(columns: Values, transition: Transition, t: int) -> None:
    """Let every rule validate the step's values, as it does those of its param group."""
    for i, group in enumerate(transition.groups):
        optimizer = transition.optimizers[transition.optimizer_of_group[i]]
        rule, column = rule_of(optimizer), {n: x[i] for n, x in columns.items() if n in group and x[i] is not None}
        if rule is None:
            continue
        try:
            rule.from_group(ChainMap(column, group, vars(optimizer)), transition.wrt)
        except ValueError as error:
            raise ValueError(f"schedules, step {t}, param group {i}: {error}") from error


def check_finite(name: str, column: list[Any]) -> None:
    """Raise where a number of a param group is not finite."""
    for x in column:
        for number in x if isinstance(x, tuple) else (x,):
            if number is not None and not math.isfinite(number):
                raise ValueError(f"{name} is {number} in a param group: set it to a finite number.")
