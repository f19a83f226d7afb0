"""What is searched: entries with a name each, some of them only where others have certain values.

A number x has a coordinate u between 0 and 1, by its scale,

    u = (φ(x) − φ(low)) / (φ(high) − φ(low)),      φ(x) = x (linear), log x (log), log(x/(1 − x)) (logit)

in which grids are even, random draws are uniform, and hypergradients step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

SCALES = ("linear", "log", "logit")
LARGEST_GRID = 10**6  # points
When = Mapping[str, Any]


def _phi(x: float, scale: str) -> float:
    match scale:
        case "log":
            return math.log(x)
        case "logit":
            return math.log(x) - math.log1p(-x)
    return x


def _phi_inverse(phi: float, scale: str) -> float:
    match scale:
        case "log":
            return math.exp(phi)
        case "logit":
            return 1 / (1 + math.exp(-phi)) if phi > -700 else math.exp(phi)
    return phi


class _Number:
    """What Float and Int share: bounds, a scale, the coordinate u."""

    low: Any
    high: Any
    scale: str
    points: int | None
    start: Any
    when: When | None

    def _check(self, kind: type, scales: tuple[str, ...]) -> None:
        name = type(self).__name__
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
        low, high = _phi(self.low, self.scale), _phi(self.high, self.scale)
        return (_phi(x, self.scale) - low) / (high - low)

    def _from_unit(self, u: float) -> float:
        low, high = _phi(self.low, self.scale), _phi(self.high, self.scale)
        return min(max(_phi_inverse(low + u * (high - low), self.scale), self.low), self.high)

    def __contains__(self, x: Any) -> bool:
        return isinstance(x, Real) and not isinstance(x, bool) and self.low <= x <= self.high


@dataclass(frozen=True)
class Float(_Number):
    """A number between two others.

    Args:
        low, high: bounds, both included.
        scale: "linear", "log" or "logit"; see the module's docstring.
        step: of a grid from low; linear only. None: any number.
        points: of a grid even in the scale, for strategy="grid".
        start: where hypergradients begin; None: the middle of the scale.
        differentiable: whether hypergradients move it; None: they do where the training run has a hyperparameter of this name
            that has a derivative.
        when: name → value or values of other entries for which this one is there; all must hold.

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
        width = _phi(self.high, self.scale) - _phi(self.low, self.scale)
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
        start, when: as of `Float`.

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
Values = dict[str, Any]


class Space(Mapping[str, Entry]):
    """Names and their entries, checked against each other.

    Args:
        entries: name → Float, Int or Categorical; a list stands for a Categorical, any other plain value for a constant.

    Raises:
        ValueError: no entries, a condition on what is not there, cannot be, or is conditional on itself.

    Example:
        >>> space = Space({"optimizer": ["SGD", "Adam"], "momentum": Float(0.5, 0.99, "logit", when={"optimizer": "SGD"})})
        >>> space.active({"optimizer": "Adam"}), list(space.active({"optimizer": "SGD"}))
        (['optimizer'], ['optimizer', 'momentum'])
    """

    def __init__(self, entries: Mapping[str, Any]):
        if not isinstance(entries, Mapping):
            raise TypeError(f"a space is a dict of name → Float, Int or Categorical, got {type(entries).__name__}.")
        if not entries:
            raise ValueError("the space is empty: name at least one hyperparameter.")
        for name in entries:
            if not isinstance(name, str) or not name:
                raise ValueError(f"names in a space are strings that are not empty, got {name!r}.")
        made = {name: as_entry(name, entry) for name, entry in entries.items()}
        for name, entry in made.items():
            for parent, values in (entry.when or {}).items():
                if parent not in made:
                    raise ValueError(f"{name}: its condition names {parent!r}, which the space does not have.")
                for value in values:
                    if value not in made[parent]:
                        raise ValueError(f"{name}: {parent!r} is never {value!r}.")
        self.entries = _parents_first(made)

    def __getitem__(self, name: str) -> Entry:
        return self.entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __repr__(self) -> str:
        return f"Space({self.entries!r})"

    @property
    def conditional(self) -> bool:
        return any(entry.when for entry in self.entries.values())

    def is_active(self, name: str, values: Mapping[str, Any]) -> bool:
        """Whether an entry is there, given the values of its parents."""
        conditions = (self.entries[name].when or {}).items()
        return all(p in values and any(same(values[p], v) for v in allowed) for p, allowed in conditions)

    def active(self, values: Mapping[str, Any]) -> list[str]:
        """The entries that are there, given values of theirs or more."""
        names: list[str] = []
        for name in self.entries:
            if self.is_active(name, {n: values[n] for n in names if n in values}):
                names.append(name)
        return names

    def first(self) -> Values:
        """Where hypergradients begin."""
        values: Values = {}
        for name, entry in self.entries.items():
            if self.is_active(name, values):
                values[name] = entry.first()
        return values

    def check(self, values: Mapping[str, Any]) -> Values:
        """Values of exactly the entries that are there, or a ValueError."""
        names = self.active(values)
        if set(names) != set(values):
            missing, extra = sorted(set(names) - set(values)), sorted(set(values) - set(names))
            raise ValueError(f"values do not fit the space: missing {missing}, not there {extra}.")
        for name in names:
            if values[name] not in self.entries[name]:
                raise ValueError(f"{name}: {values[name]!r} is outside {self.entries[name]}.")
        return {name: values[name] for name in names}

    def describe(self) -> list[str]:
        """The space in words that are the same in every process: what a stored study is recognised by."""
        return [_describe(name, entry) for name, entry in sorted(self.entries.items())]


def as_space(space: Any) -> Space:
    return space if isinstance(space, Space) else Space(space)


def as_entry(name: str, entry: Any) -> Entry:
    """What a user wrote for an entry."""
    if isinstance(entry, (Float, Int, Categorical)):
        return entry
    if isinstance(entry, (list, tuple, range, set)) or type(entry).__name__ == "ndarray":
        return Categorical(list(entry))
    if entry is None or isinstance(entry, (bool, Real, str)):
        return Categorical([entry])
    raise TypeError(
        f"{name}: expected Float, Int, Categorical, a list of choices or a constant, got {type(entry).__name__}. Spaces of other "
        "libraries are read by hypergrad.search.from_optuna, from_sklearn, from_hyperopt and from_ray."
    )


def labels(entry: Categorical) -> list[Any]:
    """The choices as plain values that any storage can keep: themselves where they are, else a name each."""
    simple = all(choice is None or isinstance(choice, (bool, int, float, str)) for choice in entry.choices)
    if simple and not any(a == b for i, a in enumerate(entry.choices) for b in entry.choices[:i]):
        return list(entry.choices)
    return [f"{i}: {_label(choice)}" for i, choice in enumerate(entry.choices)]


def same(a: Any, b: Any) -> bool:
    """Equal and of one kind: True is not 1."""
    if isinstance(a, bool) != isinstance(b, bool):
        return False
    equal = a is b or a == b
    return bool(equal) if isinstance(equal, (bool, int)) else bool(getattr(equal, "all", lambda: False)())


def plain(x: Any) -> Any:
    """numpy's scalars as Python's."""
    return x.item() if type(x).__module__ == "numpy" and getattr(x, "ndim", 1) == 0 else x


def _label(choice: Any) -> str:
    if isinstance(choice, (bool, int, float, str, tuple, list, dict, type(None))):
        return repr(choice)
    return getattr(choice, "__qualname__", type(choice).__qualname__)


def _describe(name: str, entry: Entry) -> str:
    when = {p: [_label(v) for v in values] for p, values in sorted((entry.when or {}).items())}
    if isinstance(entry, Categorical):
        return f"{name}: one of {[_label(choice) for choice in entry.choices]}, when {when}"
    return f"{name}: {type(entry).__name__} {entry.low!r} to {entry.high!r}, {entry.scale}, step {entry.step!r}, when {when}"


def _conditions(when: Any) -> dict[str, tuple[Any, ...]] | None:
    if not when:
        return None
    if not isinstance(when, Mapping):
        raise ValueError(f"when must be a dict of name → value or values, got {when!r}.")
    made = {name: tuple(v) if isinstance(v, (list, tuple, set, range)) else (v,) for name, v in when.items()}
    if not all(made.values()):
        raise ValueError(f"when has no values for {[name for name, v in made.items() if not v]}.")
    return made


def _parents_first(entries: dict[str, Entry]) -> dict[str, Entry]:
    ordered: dict[str, Entry] = {}
    left = dict(entries)
    while left:
        ready = [name for name, entry in left.items() if all(p in ordered for p in entry.when or {})]
        if not ready:
            raise ValueError(f"conditions go round in a circle: {sorted(left)}.")
        ordered |= {name: left.pop(name) for name in ready}
    return ordered


def _countable(points: int) -> int:
    if points > LARGEST_GRID:
        raise ValueError(
            f"a grid of {points:,} values along one entry is too large: give it points=…, or a larger step."
        )
    return points
