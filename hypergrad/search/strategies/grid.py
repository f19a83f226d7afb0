"""Every point of a grid, and random points: scikit-learn's ParameterGrid and ParameterSampler, scipy's distributions."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from hypergrad.search.convert import to_param_distributions, to_param_grid
from hypergrad.search.entries import LARGEST_GRID
from hypergrad.search.extras import need
from hypergrad.search.space import Space, Values
from hypergrad.search.strategies.base import Strategy
from hypergrad.search.values import plain


class Grid(Strategy):
    """Every point of the grid, in the order of scikit-learn's ParameterGrid: of equal values the first one wins, as there."""

    def __init__(self, space: Space, seed: int, options: Mapping[str, Any]):
        super().__init__(space, seed, options)
        self.grid = need("sklearn.model_selection", "strategy 'grid'").ParameterGrid(to_param_grid(space))
        self.size = len(self.grid)
        if self.size > LARGEST_GRID:
            raise ValueError(f"the grid has {self.size:,} points: give its entries fewer points.")

    def point(self, number: int) -> Values:
        return {name: plain(value) for name, value in self.grid[number].items()}


class Random(Strategy):
    """Independent draws, uniform in the scale of each entry (Bergstra & Bengio, JMLR 2012), of lists without repetition."""

    def __init__(self, space: Space, seed: int, options: Mapping[str, Any]):
        super().__init__(space, seed, options)
        selection = need("sklearn.model_selection", "random draws")
        self.distributions = to_param_distributions(space)
        dicts = self.distributions if isinstance(self.distributions, list) else [self.distributions]
        if all(isinstance(values, list) for each in dicts for values in each.values()):
            self.size = len(selection.ParameterGrid(self.distributions))
        self.drawn: list[Values] = []

    @cached_property
    def draws(self) -> Any:
        sampler = need("sklearn.model_selection", "random draws").ParameterSampler
        return iter(sampler(self.distributions, self.size or 2**31, random_state=self.seed % 2**32))

    def point(self, number: int) -> Values | None:
        self.drawn += itertools.islice(self.draws, max(number + 1 - len(self.drawn), 0))
        return {name: plain(value) for name, value in self.drawn[number].items()}

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k != "draws"} | {"drawn": []}
