"""Searches over lr and weight decay, played again and again with the runs of a pool (see experiments.pools).

A search draws its trials from the pool's random ones without replacement. It is a list of stages (rung, n): its n best so far
by validation loss at the rung before are trained on up to this rung. After the last rung it takes the best. So

    best of k                    (val, k)
    successive halving           (val_16th, n), (val_8th, n/2), (val_4th, n/4), … (Jamieson & Talwalkar 2016)
    first rung, then the top k   (val_16th, n), (val, k)  ("one epoch is often all you need", arXiv 2307.15422)

Runs are stopped and taken up again: a stage costs n times what lies between its rung and the one before, in plain runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.workloads import RUNGS

Row = dict[str, Any]


@dataclass(frozen=True)
class Search:
    title: str
    stages: tuple[tuple[str, int], ...]

    @property
    def trials(self) -> int:
        return self.stages[0][1]

    @property
    def cost(self) -> float:
        """In plain runs."""
        total, reached = 0.0, 0.0
        for rung, n in self.stages:
            total += n * (1 / RUNGS[rung] - reached)
            reached = 1 / RUNGS[rung]
        return total


def best_of(k: int) -> Search:
    return Search(f"best of {k} random" if k > 1 else "one random", (("val", k),))


def halving(n: int, eta: int) -> Search:
    rungs = [rung for rung in RUNGS if 16 // RUNGS[rung] in [eta**i for i in range(16)]]
    return Search(f"halving, {n} by {eta}", tuple((rung, n // eta**i) for i, rung in enumerate(rungs)))


def first_rung(n: int, k: int) -> Search:
    return Search(f"first 1/16 of {n}, then top {k}", (("val_16th", n), ("val", k)))


SEARCHES: dict[str, Search] = {
    "random_1": best_of(1),
    "random_4": best_of(4),
    "random_16": best_of(16),
    "random_32": best_of(32),
    "random_64": best_of(64),
    "halving_16_2": halving(16, 2),
    "halving_64_2": halving(64, 2),
    "halving_16_4": halving(16, 4),
    "halving_64_4": halving(64, 4),
    "first_16_1": first_rung(16, 1),
    "first_64_1": first_rung(64, 1),
    "first_64_4": first_rung(64, 4),
}


def resample(search: Search, trials: list[Row], times: int, rng: np.random.Generator) -> np.ndarray:
    """The test loss that each of `times` searches ends with; NaN where its choice has none."""
    losses = {name: np.array([row[name] for row in trials], dtype=float) for name in (*RUNGS, "test")}  # None → NaN
    order = rng.permuted(np.tile(np.arange(len(trials)), (times, 1)), axis=1)[:, : search.trials]
    for (rung, _), n in zip(search.stages, [*(n for _, n in search.stages[1:]), 1]):
        best = np.argsort(losses[rung][order], axis=1, kind="stable")[:, :n]  # NaN comes last
        order = np.take_along_axis(order, best, axis=1)
    return losses["test"][order[:, 0]]
