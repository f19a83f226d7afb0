"""Bayesian optimisation and evolution: Optuna's samplers.

TPE       density ratios of good and bad trials                  Bergstra et al., NeurIPS 2011
GP        a Gaussian process and log expected improvement        Snoek et al., NeurIPS 2012
CMA-ES    a normal distribution that follows the good trials     Hansen & Ostermeier 2001; continuous entries, the rest at random
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from hypergrad.search.extras import need
from hypergrad.search.space import Space
from hypergrad.search.strategies.base import Strategy


class Sampler(Strategy):
    """A sampler of Optuna; `options` are its constructor's arguments."""

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    fixed: ClassVar[dict[str, Any]] = {}

    def __init__(self, space: Space, seed: int, options: Mapping[str, Any]):
        super().__init__(space, seed, {})
        self.options = self.fixed | dict(options)
        for package in self.needs:
            need(package, f"Optuna's {self.name}")
        if "seed" in options:
            raise ValueError("options: the seed is optimize's own argument.")
        self.sampler(0)

    def sampler(self, number: int) -> Any:
        return self.seeded(self.name, number, **self.options)


class TPE(Sampler):
    name = "TPESampler"


class GP(Sampler):
    name, needs = "GPSampler", ("scipy",)
    fixed: ClassVar[dict[str, Any]] = {"warn_independent_sampling": False}


class CMA(Sampler):
    name, needs = "CmaEsSampler", ("cmaes",)
    fixed: ClassVar[dict[str, Any]] = {"warn_independent_sampling": False}
