"""What is searched: entries with a name each, some of them only where others have certain values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any

from hypergrad.search.entries import Categorical, Entry, Float, Int
from hypergrad.search.values import label_of, same

Values = dict[str, Any]


class Space(Mapping[str, Entry]):
    """Names and their entries, checked against each other.

    Args:
        entries: name → Float, Int or Categorical; a list stands for a Categorical, any other plain value for a constant.

    Raises:
        ValueError: no entries; numbers in a tuple, which may be a range or choices; a condition on what is not there, cannot be,
            or is conditional on itself.

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
        """Whether an entry's conditions hold, given the values of its parents."""
        conditions = (self.entries[name].when or {}).items()
        return all(p in values and any(same(values[p], v) for v in allowed) for p, allowed in conditions)

    def active(self, values: Mapping[str, Any]) -> list[str]:
        """The entries whose conditions hold, given their values; other values are ignored."""
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
        """The values in the order of the space.

        Raises:
            ValueError: an active entry has no value, one that is not active has one, or a value is outside its entry.
        """
        names = self.active(values)
        if set(names) != set(values):
            missing, extra = sorted(set(names) - set(values)), sorted(set(values) - set(names))
            raise ValueError(f"values do not fit the space: missing {missing}, not there {extra}.")
        for name in names:
            if values[name] not in self.entries[name]:
                raise ValueError(f"{name}: {values[name]!r} is outside {self.entries[name]}.")
        return {name: values[name] for name in names}

    def describe(self) -> list[str]:
        """The space as sentences that are the same in every process, by which a stored study is recognised."""
        return [_describe(name, entry) for name, entry in sorted(self.entries.items())]


def as_space(space: Any) -> Space:
    return space if isinstance(space, Space) else Space(space)


def as_entry(name: str, entry: Any) -> Entry:
    """What a user wrote for an entry."""
    if isinstance(entry, (Float, Int, Categorical)):
        return entry
    if isinstance(entry, tuple):
        _check_no_range(name, entry)
    if isinstance(entry, (list, tuple, range, set)) or type(entry).__name__ == "ndarray":
        return Categorical(list(entry))
    if entry is None or isinstance(entry, (bool, Real, str)):
        return Categorical([entry])
    if isinstance(entry, Mapping):
        raise TypeError(
            f"{name}: a dict is not read as an entry. Choices that are dicts stand in a list; entries that belong to one choice "
            "of another have names of their own and a condition, such as Float(0.5, 0.99, when={'optimizer': 'SGD'})."
        )
    raise TypeError(
        f"{name}: expected Float, Int, Categorical, a list of choices or a constant, got {type(entry).__name__}. Spaces of other "
        "libraries are read by hypergrad.search.from_optuna, from_sklearn, from_hyperopt and from_ray."
    )


def _check_no_range(name: str, entry: tuple[Any, ...]) -> None:
    """Refuse numbers in a tuple, also with the name of a scale behind them: other libraries read them as the ends of a range."""
    numbers = [x for x in entry if isinstance(x, Real) and not isinstance(x, bool)]
    others = entry[len(numbers) :]
    if len(numbers) < 2 or not all(isinstance(x, str) for x in others) or list(entry[: len(numbers)]) != numbers:
        return
    log = ", log=True" if any("log" in x for x in others) else ""
    low, high = min(numbers), max(numbers)
    whole = f" or Int({low}, {high}{log})" if all(isinstance(x, int) for x in numbers) else ""
    raise ValueError(
        f"{name}: {entry} may be a range or choices: write Float({low}, {high}{log}){whole} for the range, or the list "
        f"{list(entry)} for the choices."
    )


def _describe(name: str, entry: Entry) -> str:
    when = {p: [label_of(v) for v in values] for p, values in sorted((entry.when or {}).items())}
    if isinstance(entry, Categorical):
        return f"{name}: one of {[label_of(choice) for choice in entry.choices]}, when {when}"
    return f"{name}: {type(entry).__name__} {entry.low!r} to {entry.high!r}, {entry.scale}, step {entry.step!r}, when {when}"


def _parents_first(entries: dict[str, Entry]) -> dict[str, Entry]:
    ordered: dict[str, Entry] = {}
    left = dict(entries)
    while left:
        ready = [name for name, entry in left.items() if all(p in ordered for p in entry.when or {})]
        if not ready:
            raise ValueError(f"conditions depend on each other in a circle: {sorted(left)}.")
        ordered |= {name: left.pop(name) for name in ready}
    return ordered
