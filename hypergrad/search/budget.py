"""What a study may cost, and what it has cost so far."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Cost:
    """The cost of a trial, or of several.

    Attributes:
        trials: whole trials.
        epochs: steps that were reported.
        gradient_evaluations: forward and backward passes of a batch; a Hessian-vector product counts as two.
        seconds: of the trials, added up.
    """

    trials: int = 0
    epochs: float = 0.0
    gradient_evaluations: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @staticmethod
    def total(costs: Iterable[Cost]) -> Cost:
        return sum(costs, Cost())


@dataclass(frozen=True)
class Budget:
    """An upper limit on one or several of the things that trials cost. The first that is reached ends the study.

    No trial begins once a limit is reached; one that has begun goes on to its end, unless the objective checks `trial.exhausted`.
    Trials of earlier calls that the storage holds count.

    Args:
        trials: whole trials, failed and pruned ones included.
        epochs: steps that trials report, `trial.report(value, step)`.
        gradient_evaluations: forward and backward passes of a batch; a Hessian-vector product counts as two. Counted where the
            objective returns a `Run`, or calls `trial.count(n)`.
        seconds: of wall time, while a call of `optimize` runs.

    Raises:
        ValueError: no limit, or one that is not above 0.

    Example:
        >>> Budget(trials=2).reached(Cost(trials=1)), Budget(trials=2, seconds=9.0).reached(Cost(trials=1, seconds=9.5))
        (False, True)
    """

    trials: int | None = None
    epochs: float | None = None
    gradient_evaluations: float | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if not self.limits:
            raise ValueError(f"a budget needs a limit: one or more of {', '.join(UNITS)}.")
        for unit, limit in self.limits.items():
            if (
                isinstance(limit, bool)
                or not isinstance(limit, (int, float))
                or not (limit > 0 and math.isfinite(limit))
            ):
                raise ValueError(f"budget: {unit} must be a number above 0, got {limit!r}.")
        if self.trials is not None and self.trials != int(self.trials):
            raise ValueError(f"budget: trials must be a whole number, got {self.trials}.")

    @property
    def limits(self) -> dict[str, float]:
        return {unit: getattr(self, unit) for unit in UNITS if getattr(self, unit) is not None}

    def reached(self, spent: Cost) -> bool:
        return any(getattr(spent, unit) >= limit for unit, limit in self.limits.items())


UNITS = tuple(f.name for f in fields(Budget))


def as_budget(budget: Any, n_trials: int | None = None, timeout: float | None = None) -> Budget | None:
    """What a user wrote for a budget: a Budget, a dict of its arguments, or a number of trials; `n_trials` and `timeout` are its
    trials and seconds. None where there is no limit."""
    more = {unit: limit for unit, limit in (("trials", n_trials), ("seconds", timeout)) if limit is not None}
    if more:
        made = as_budget(budget)
        limits = {} if made is None else made.limits
        if twice := sorted(limits.keys() & more):
            raise ValueError(
                f"the budget has {twice[0]} already: give them there, or as n_trials and timeout, not in both."
            )
        return Budget(**limits | more)  # type: ignore[arg-type]
    if budget is None or isinstance(budget, Budget):
        return budget
    if isinstance(budget, Mapping):
        unknown = [unit for unit in budget if unit not in UNITS]
        if unknown:
            raise ValueError(f"a budget is counted in {', '.join(UNITS)}, not in {unknown[0]!r}.")
        return Budget(**budget)
    if isinstance(budget, int) and not isinstance(budget, bool):
        return Budget(trials=budget)
    raise TypeError(f"budget must be a Budget, a dict such as {{'trials': 64}} or a number of trials, got {budget!r}.")
