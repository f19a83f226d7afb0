"""Entries of a space: numbers between bounds, on a scale (`scales`), and choices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from hypergrad.search.scales import SCALES, from_scale, to_scale
from hypergrad.search.values import label_of, plain, same

LARGEST_GRID = 10**6  # points
When = Mapping[str, Any]


class _Number:
    """What Float and Int share: bounds, a scale, the coordinate u."""

    low: Any
    high: Any
    scale: str
    points: int | None
    start: Any
    when: When | None
    log: bool

    def _check(self, kind: type, scales: tuple[str, ...]) -> None:
        name = type(self).__name__
        if self.log and self.scale not in ("linear", "log"):
            raise ValueError(
                f"{name}: log=True is scale='log', and this one has scale={self.scale!r}: give one of them."
            )
        object.__setattr__(self, "scale", "log" if self.log else self.scale)
        object.__setattr__(self, "log", self.scale == "log")
        for label, x in (("low", self.low), ("high", self.high), ("start", self.start)):
            if label == "start" and x is None:
                continue
            x = plain(x)
            object.__setattr__(self, label, x)
            if isinstance(x, bool) or not isinstance(x, kind) or not math.isfinite(x):  # type: ignore[arg-type]
                what = "a whole number" if kind is Integral else "a finite number"
                raise ValueError(f"{name}: {label} must be {what}, got {x!r}.")
        if self.scale not in scales:
            raise ValueError(f"{name}: scale must be one of {', '.join(scales)}, got {self.scale!r}.")
        if not self.low < self.high:
            hint = f" (reversed? {name}({self.high}, {self.low}))" if self.low > self.high else ""
            raise ValueError(f"{name}: low must be below high, got ({self.low}, {self.high}){hint}.")
        if self.scale == "log" and self.low <= 0:
            raise ValueError(
                f"{name}: a log range cannot touch 0, got ({self.low}, {self.high}): begin it at a small positive number, "
                "or use scale='linear'."
            )
        if self.scale == "logit" and not (self.low > 0 and self.high < 1):
            raise ValueError(f"{name}: a logit range lies inside (0, 1), got ({self.low}, {self.high}).")
        if self.points is not None and (
            isinstance(self.points, bool) or self.points != int(self.points) or self.points < 2
        ):
            raise ValueError(f"{name}: points must be a whole number from 2, got {self.points}.")
        if self.start is not None and not self.low <= self.start <= self.high:
            raise ValueError(f"{name}: start {self.start} is outside ({self.low}, {self.high}).")
        object.__setattr__(self, "when", _conditions(self.when))

    def to_unit(self, x: float) -> float:
        """The coordinate u of a value."""
        low, high = to_scale(self.low, self.scale), to_scale(self.high, self.scale)
        return (to_scale(x, self.scale) - low) / (high - low)

    def _from_unit(self, u: float) -> float:
        if not 0 < u < 1:
            return self.low if u <= 0 else self.high
        low, high = to_scale(self.low, self.scale), to_scale(self.high, self.scale)
        return min(max(from_scale(low + u * (high - low), self.scale), self.low), self.high)

    def __contains__(self, x: Any) -> bool:
        return isinstance(x, Real) and not isinstance(x, bool) and self.low <= x <= self.high


@dataclass(frozen=True)
class Float(_Number):
    """A number between two others.

    Args:
        low, high: bounds, both included.
        scale: "linear", "log" or "logit", log(x/(1 − x)).
        step: of a grid from low; linear only. None: any number.
        points: of a grid even in the scale, for strategy="grid".
        start: where hypergradients begin; None: the middle of the scale.
        differentiable: whether hypergradients move it; None: they do where the training run has a hyperparameter of this name
            that has a derivative.
        when: name → value or values of other entries for which this one is there; all must hold.
        log: True is scale="log", as Optuna writes it.

    Example:
        >>> lr = Float(1e-4, 1.0, "log", points=5)
        >>> lr.to_unit(1e-2), lr.from_unit(0.75)
        (0.5, 0.1)
        >>> [f"{x:.0e}" for x in lr.grid()]
        ['1e-04', '1e-03', '1e-02', '1e-01', '1e+00']
    """

    low: float
    high: float
    scale: str = "linear"
    step: float | None = None
    points: int | None = None
    start: float | None = None
    differentiable: bool | None = None
    when: When | None = None
    log: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        self._check(Real, SCALES)  # type: ignore[type-abstract]
        if self.step is None:
            return
        if self.scale != "linear" or self.points is not None:
            raise ValueError("Float: step goes with scale='linear' and without points.")
        if not (self.step > 0 and math.isfinite(self.step)):
            raise ValueError(f"Float: step must be a positive number, got {self.step}.")
        if self.differentiable:
            raise ValueError("Float: a number on a grid of steps cannot be differentiable; leave step out.")

    def from_unit(self, u: float) -> float:
        """The value at a coordinate, on the grid where there is a step."""
        x = self._from_unit(u)
        if self.step is None:
            return float(f"{x:.15g}")  # exp(log x) is off by a rounding or two: 0.1 is 0.1
        steps = min(round((x - self.low) / self.step), math.floor((self.high - self.low) / self.step + 1e-9))
        return float(f"{self.low + self.step * steps:.15g}")

    def slope(self, x: float) -> float:
        """dx/du at a value."""
        width = to_scale(self.high, self.scale) - to_scale(self.low, self.scale)
        return width * {"linear": 1.0, "log": x, "logit": x * (1 - x)}[self.scale]

    def grid(self) -> list[float]:
        if self.step is not None:
            count = math.floor((self.high - self.low) / self.step + 1e-9) + 1
            return [float(f"{self.low + i * self.step:.15g}") for i in range(_countable(count))]
        if self.points is None:
            raise ValueError(f"the grid of {self} is infinite: give it points=…, or a step=….")
        return [self.from_unit(i / (self.points - 1)) for i in range(_countable(self.points))]

    def first(self) -> float:
        return self.from_unit(0.5) if self.start is None else float(self.start)


@dataclass(frozen=True)
class Int(_Number):
    """A whole number between two others, both included.

    Args:
        low, high: bounds.
        scale: "linear" or "log".
        step: from low; linear only.
        points: of a grid even in the scale, for strategy="grid"; None: every number.
        start, when, log: as of `Float`.

    Example:
        >>> Int(1, 1000, "log", points=4).grid(), Int(2, 8, step=3).grid()
        ([1, 10, 100, 1000], [2, 5, 8])
    """

    low: int
    high: int
    scale: str = "linear"
    step: int = 1
    points: int | None = None
    start: int | None = None
    when: When | None = None
    log: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        self._check(Integral, ("linear", "log"))  # type: ignore[type-abstract]
        if not isinstance(self.step, Integral) or self.step < 1:
            raise ValueError(f"Int: step must be a whole number from 1, got {self.step}.")
        if self.step > 1 and (self.scale != "linear" or self.points is not None):
            raise ValueError("Int: step goes with scale='linear' and without points.")

    def from_unit(self, u: float) -> int:
        """The value nearest to a coordinate."""
        return min(self.low + self.step * round((self._from_unit(u) - self.low) / self.step), self.last)

    @property
    def last(self) -> int:
        """The largest value there is."""
        return self.low + (self.high - self.low) // self.step * self.step

    def grid(self) -> list[int]:
        if self.points is None:
            _countable((self.high - self.low) // self.step + 1)
            return list(range(self.low, self.high + 1, self.step))
        return sorted({self.from_unit(i / (self.points - 1)) for i in range(self.points)})

    def first(self) -> int:
        return self.from_unit(0.5) if self.start is None else self.start


@dataclass(frozen=True)
class Categorical:
    """One of several values, of any type.

    Args:
        choices: the values, each once.
        start: where strategy="hypergradient" stays; None: the first.
        when: as of `Float`.
    """

    choices: Sequence[Any]
    start: Any = None
    when: When | None = None

    def __post_init__(self) -> None:
        if isinstance(self.choices, (str, bytes)) or not hasattr(self.choices, "__iter__"):
            raise ValueError(f"Categorical: choices must be a list of values, got {self.choices!r}.")
        choices = tuple(plain(choice) for choice in self.choices)
        if not choices:
            raise ValueError("Categorical: choices is empty.")
        if any(same(a, b) for i, a in enumerate(choices) for b in choices[:i]):
            raise ValueError(f"Categorical: a choice is there twice in {choices}.")
        object.__setattr__(self, "choices", choices)
        if self.start is not None and self.start not in self:
            raise ValueError(f"Categorical: start {self.start!r} is none of {choices}.")
        object.__setattr__(self, "when", _conditions(self.when))

    def __contains__(self, x: Any) -> bool:
        return any(same(x, choice) for choice in self.choices)

    def index(self, x: Any) -> int:
        for i, choice in enumerate(self.choices):
            if same(x, choice):
                return i
        raise ValueError(f"{x!r} is none of {self.choices}.")

    def grid(self) -> list[Any]:
        return list(self.choices)

    def first(self) -> Any:
        return self.choices[0] if self.start is None else self.start


Entry = Float | Int | Categorical


def labels(entry: Categorical) -> list[Any]:
    """The choices as plain values that any storage can keep: themselves where they are, else a name each."""
    simple = all(choice is None or isinstance(choice, (bool, int, float, str)) for choice in entry.choices)
    if simple and not any(a == b for i, a in enumerate(entry.choices) for b in entry.choices[:i]):
        return list(entry.choices)
    return [f"{i}: {label_of(choice)}" for i, choice in enumerate(entry.choices)]


def stored(entry: Entry, value: Any) -> Any:
    """A value as storages keep it."""
    return labels(entry)[entry.index(value)] if isinstance(entry, Categorical) else value


def restored(entry: Entry, kept: Any) -> Any:
    """The value of what a storage has kept."""
    return entry.choices[labels(entry).index(kept)] if isinstance(entry, Categorical) else kept


def _conditions(when: Any) -> dict[str, tuple[Any, ...]] | None:
    if not when:
        return None
    if not isinstance(when, Mapping):
        raise ValueError(f"when must be a dict of name → value or values, got {when!r}.")
    made = {name: tuple(v) if isinstance(v, (list, tuple, set, range)) else (v,) for name, v in when.items()}
    if not all(made.values()):
        raise ValueError(f"when has no values for {[name for name, v in made.items() if not v]}.")
    return made


def _countable(points: int) -> int:
    if points > LARGEST_GRID:
        raise ValueError(
            f"a grid of {points:,} values along one entry is too large: give it points=…, or a larger step."
        )
    return points
