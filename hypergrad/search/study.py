"""What a search has found."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from hypergrad.search.budget import Cost
from hypergrad.search.objective import Objective, Trial, as_number, seed_of, seeded
from hypergrad.search.plots import plot
from hypergrad.search.records import Record, record, table_row
from hypergrad.search.space import Space, Values
from hypergrad.search.storage import sign_of
from hypergrad.search.table import Table
from hypergrad.search.training import result_of


@dataclass(frozen=True)
class Verification:
    """The best values, trained again: validation and test side by side.

    Attributes:
        params: the values.
        selected: the validation loss they were selected by. Of many, the least is too small: it was selected for being so.
        validation, test: losses of the runs trained again, one for each seed.
    """

    params: Values
    selected: float
    validation: list[float]
    test: list[float]

    def __str__(self) -> str:
        rows = [("validation, when selected", self.selected), ("validation, again", fmean(self.validation))]
        return "\n".join(f"{name:<26}{value:>12.5g}" for name, value in [*rows, ("test", fmean(self.test))])


class NoTrialCompleted(ValueError):
    """Every trial failed or was pruned, so no trial is the best. The attribute `study` has their tracebacks."""

    def __init__(self, study: Study):
        self.study = study
        failed = [record for record in study.trials if record.error]
        why = f" The first one failed with:\n{failed[0].error}" if failed else ""
        super().__init__(f"none of {len(study.trials)} trials came to a value.{why}")


class Study:
    """The trials of a search so far, and the best of them.

    Attributes:
        optuna: the `optuna.Study` underneath, for Optuna's own plots and dashboard.
        direction: "minimize" or "maximize".
        interrupted: whether Ctrl-C ended it.
    """

    def __init__(self, optuna: Any, space: Space, objective: Objective, seed: int, interrupted: bool = False):
        self.optuna, self.space, self.objective = optuna, space, objective
        self.seed, self.interrupted = seed, interrupted

    @property
    def direction(self) -> str:
        return self.optuna.direction.name.lower()

    @property
    def trials(self) -> list[Record]:
        """All trials, in order."""
        return [record(frozen, self.space) for frozen in self.optuna.get_trials(deepcopy=False)]

    @property
    def best_trial(self) -> Record:
        """The complete trial with the best value, the first of equals."""
        complete = [each for each in self.trials if each.state == "complete" and each.value is not None]
        if not complete:
            raise NoTrialCompleted(self)
        return min(complete, key=lambda each: math.inf if each.value is None else sign_of(self.optuna) * each.value)

    @property
    def best_params(self) -> Values:
        return self.best_trial.params

    @property
    def best_value(self) -> float:
        value = self.best_trial.value
        assert value is not None
        return value

    @property
    def spent(self) -> Cost:
        """What all trials took; seconds are theirs, added up."""
        return Cost.total(each.cost for each in self.trials)

    def table(self) -> Any:
        """A row a trial: a pandas.DataFrame where pandas is installed, else a list of dicts that prints as a table.

        `print(study.table().to_string())` shows every column, with pandas and without: the trial's number, its value, its
        hyperparameters; then state, cost, notes, retries, and the first line of an error.
        """
        rows = Table(table_row(each, list(self.space)) for each in self.trials)
        try:
            import pandas
        except ImportError:
            return rows
        return pandas.DataFrame(rows)

    def verify(self, test_objective: Callable[..., Any], seeds: int = 1) -> Verification:
        """Train the best again, on seeds that chose nothing, and report validation and test side by side.

        Args:
            test_objective: `f(params)` or `f(params, trial)`, trains with these values and returns the test loss, beside which
                the objective is called again; or the pair (validation loss, test loss), where one training gives both; or a
                `Run` whose val_loss is the test's.
            seeds: how many times.
        """
        if seeds < 1:
            raise ValueError(f"seeds must be a whole number from 1, got {seeds}.")
        best = self.best_trial
        validation, test = [], []
        for i in range(seeds):
            trial_seed = seed_of(self.seed, 2**31 + i)
            found = _again(test_objective, best, trial_seed)
            if isinstance(found, (tuple, list)) and len(found) == 2:
                pair = found
            else:
                pair = _again(self.objective, best, trial_seed), found
            validation.append(as_number(pair[0], "the objective returned"))
            test.append(as_number(pair[1], "test_objective returned"))
        return Verification(best.params, self.best_value, validation, test)

    def plot(self, folder: str | Path) -> dict[str, Path]:
        """PNGs of the history, of quality against cost, and of each entry's importance; name → file. Optuna draws others of
        `study.optuna`."""
        return plot(self.trials, self.optuna, Path(folder))

    def __repr__(self) -> str:
        states = [each.state for each in self.trials]
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        return f"Study({counts})"


def _again(objective: Objective, best: Record, seed: int) -> Any:
    trial = Trial(best.number, best.params, seed)
    trial.decay = best.notes.get("decay", False)
    with seeded(seed):
        return result_of(objective, trial)
