"""Trials that are ended early: Optuna's pruners over random draws.

ASHA         of the trials that reach a rung the best 1/η go on         Li et al., MLSys 2020 (arXiv 1810.05934)
Hyperband    several such sequences of rungs, which begin at different ones     Li et al., JMLR 2018 (arXiv 1603.06560)

An objective must call `trial.report(value, step)`, and raise `Pruned()` where `trial.should_prune()`. A `Run` does so itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from hypergrad.search.extras import made
from hypergrad.search.space import Space, Values
from hypergrad.search.strategies.base import Strategy
from hypergrad.search.strategies.grid import Random


class Halving(Random):
    """Random draws and a pruner of Optuna. Options are the pruner's, and `sampler`: "random", or "tpe" (as in BOHB)."""

    name: ClassVar[str]
    fixed: ClassVar[dict[str, Any]] = {}
    needs_reports = True

    def __init__(self, space: Space, seed: int, options: Mapping[str, Any]):
        super().__init__(space, seed, {})
        self.options = self.fixed | dict(options)
        self.draws_from = self.options.pop("sampler", "random")
        if self.draws_from not in ("random", "tpe"):
            raise ValueError(f"options: sampler must be 'random' or 'tpe', got {self.draws_from!r}.")
        if self.draws_from == "tpe":
            self.size = None
        self.pruner()

    def point(self, number: int) -> Values | None:
        return super().point(number) if self.draws_from == "random" else None

    def sampler(self, number: int) -> Any:
        return self.seeded("TPESampler", number) if self.draws_from == "tpe" else Strategy.sampler(self, number)

    def pruner(self) -> Any:
        return made("optuna.pruners", self.name, "a search", **self.options)


class Hyperband(Halving):
    name = "HyperbandPruner"


class ASHA(Halving):
    name, fixed = "SuccessiveHalvingPruner", {"min_resource": 1}
