"""The base class of strategies: a strategy chooses the values of a trial, runs it, and may end it early."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from hypergrad.search.extras import made, need
from hypergrad.search.objective import Objective, Trial, seed_of
from hypergrad.search.space import Space, Values
from hypergrad.search.training import result_of


class Strategy:
    """A strategy over one space.

    The values of a trial are a function of the space, the seed, the trial's number and the trials that ended before: nothing is
    remembered in between. So a study that was interrupted goes on as if it had not been.

    Args:
        space: what is searched.
        seed: of the study.
        options: what the strategy's library takes, by the library's own names.

    Attributes:
        size: how many different trials there are; None: no end.
    """

    takes: ClassVar[tuple[str, ...]] = ()  # names of the options; not of those that are passed on to a library's class
    needs_run: ClassVar[bool] = False  # whether the objective must return a Run
    needs_reports: ClassVar[bool] = False  # whether it must report
    size: int | None = None
    aliases: Mapping[str, str] = MappingProxyType(
        {}
    )  # entry → hyperparameter of the run, where hypergradients move entries

    def __init__(self, space: Space, seed: int, options: Mapping[str, Any]):
        self.space, self.seed, self.options = space, seed, dict(options)
        unknown = [name for name in options if self.takes and name not in self.takes]
        if unknown or (options and not self.takes):
            takes = ", ".join(self.takes) or "no options"
            raise ValueError(f"this strategy does not take {next(iter(unknown or options))!r}; it takes {takes}.")

    def point(self, number: int) -> Values | None:
        """The values of a trial; None: its sampler chooses."""
        return None

    def sampler(self, number: int) -> Any:
        """The Optuna sampler that chooses the values of a trial, from the study's trials before it."""
        return self.seeded("RandomSampler", number)

    def pruner(self) -> Any:
        """The Optuna pruner that decides which trials end early."""
        return need("optuna", "a search").pruners.NopPruner()

    def run(self, objective: Objective, trial: Trial) -> Any:
        """Run a trial: its validation loss."""
        return result_of(objective, trial)

    def seeded(self, name: str, number: int, **options: Any) -> Any:
        """A sampler of Optuna with a seed of the trial's own."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some of Optuna's samplers call themselves experimental
            return made("optuna.samplers", name, "a search", seed=seed_of(self.seed, number), **options)
