"""The strategies by name. To add one is to add a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypergrad.search.space import Space
from hypergrad.search.strategies.base import Strategy
from hypergrad.search.strategies.gradient import Hybrid, Hypergradient
from hypergrad.search.strategies.grid import Grid, Random
from hypergrad.search.strategies.halving import ASHA, Hyperband
from hypergrad.search.strategies.hyperopt import Hyperopt
from hypergrad.search.strategies.online import HybridOnline, HypergradientOnline
from hypergrad.search.strategies.population_based import PBT
from hypergrad.search.strategies.samplers import CMA, GP, TPE
from hypergrad.search.strategies.tuned_entries import check_aliases

STRATEGIES: dict[str, type[Strategy]] = {
    "grid": Grid,
    "random": Random,
    "tpe": TPE,
    "gp": GP,
    "cma": CMA,
    "hyperopt": Hyperopt,
    "hyperband": Hyperband,
    "asha": ASHA,
    "pbt": PBT,
    "hypergradient": Hypergradient,
    "hybrid": Hybrid,
    "hypergradient-online": HypergradientOnline,
    "hybrid-online": HybridOnline,
}


def make(
    name: str, space: Space, seed: int, options: Mapping[str, Any], aliases: Mapping[str, str] | None = None
) -> Strategy:
    """The strategy of that name, over a space.

    Raises:
        ValueError: an unknown name, options that it does not take, a space that it cannot search, aliases for what is not there.
    """
    if name not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {name!r}.")
    made = STRATEGIES[name](space, seed, options)
    if aliases:
        made.aliases = check_aliases(aliases, space)
    return made
