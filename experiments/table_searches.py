"""Searches of a table of configurations, each a function (table, seed, budget) → what it evaluated at which cost.

A sampler proposes a point of the space; the nearest configuration in unit coordinates that it has not evaluated yet is evaluated
and told in its place. Samplers are Optuna's and Hyperopt's; what needs scores after some epochs is written here, on the table.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from experiments.search_problems import EPOCHS, LOOKS

Best = list[tuple[float, float]]  # (run-equivalents spent, score of the evaluation), in order
BETWEEN = 1e-6  # added to a cost, against rounding


class Table:
    """One problem: unit coordinates [n, entries] of its configurations, and their scores [n, looks]."""

    def __init__(self, unit: np.ndarray, score: np.ndarray):
        self.unit, self.score, self.end = unit, score, score[:, -1]

    def nearest(self, point: np.ndarray, used: set[int]) -> int:
        distance = np.square(self.unit - point).sum(1)
        distance[list(used)] = math.inf
        return int(distance.argmin())


def random(table: Table, seed: int, budget: int) -> Best:
    order = np.random.default_rng(seed).permutation(len(table.end))[:budget]
    return [(i + 1.0, float(table.end[c])) for i, c in enumerate(order)]


def grid(table: Table, seed: int, budget: int) -> Best:
    """Three values of each entry, 1/6, 1/2 and 5/6 of its range, in an order shuffled by the seed."""
    d = table.unit.shape[1]
    points = np.stack(np.meshgrid(*[[1 / 6, 1 / 2, 5 / 6]] * d, indexing="ij"), -1).reshape(-1, d)
    chosen = np.random.default_rng(seed).permutation(len(points))
    return _proposed(table, budget, lambda i: points[chosen[i]], lambda point, value: None)


def _proposed(
    table: Table, budget: int, ask: Callable[[int], np.ndarray], tell: Callable[[np.ndarray, float], None]
) -> Best:
    used: set[int] = set()
    out: Best = []
    for i in range(min(budget, len(table.end))):
        config = table.nearest(np.asarray(ask(i)), used)
        used.add(config)
        tell(table.unit[config], float(table.end[config]))
        out.append((i + 1.0, float(table.end[config])))
    return out


def optuna_search(name: str) -> Callable[[Table, int, int], Best]:
    """A sampler of Optuna with its defaults."""

    def search(table: Table, seed: int, budget: int) -> Best:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        space = {f"u{i}": optuna.distributions.FloatDistribution(0, 1) for i in range(table.unit.shape[1])}
        fixed: dict[str, Any] = dict(space)
        study = optuna.create_study(sampler=getattr(optuna.samplers, name)(seed=seed))

        def ask(i: int) -> np.ndarray:
            trial = study.ask(fixed)
            study.tell(trial, state=optuna.trial.TrialState.FAIL)  # the nearest configuration is told in its place
            return np.array([trial.params[key] for key in space])

        def tell(point: np.ndarray, value: float) -> None:
            params = dict(zip(space, map(float, point), strict=True))
            study.add_trial(optuna.create_trial(params=params, distributions=fixed, value=value))

        return _proposed(table, budget, ask, tell)

    return search


def hyperopt(table: Table, seed: int, budget: int) -> Best:
    """hyperopt.fmin with tpe.suggest; it is told the value of the nearest configuration at the point that it proposed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from hyperopt import fmin, hp, tpe

        used: set[int] = set()
        out: Best = []

        def objective(point: list[float]) -> float:
            config = table.nearest(np.array(point), used)
            used.add(config)
            out.append((len(used) + 0.0, float(table.end[config])))
            return out[-1][1]

        space = [hp.uniform(f"u{i}", 0, 1) for i in range(table.unit.shape[1])]
        fmin(
            objective,
            space,
            tpe.suggest,
            budget,
            rstate=np.random.default_rng(seed),
            show_progressbar=False,
            verbose=False,
        )
    return out


def one_epoch(table: Table, seed: int, budget: int) -> Best:
    """One epoch of random configurations for up to half the budget, then the best of them to their end for what is left."""
    share = (EPOCHS - 1) / EPOCHS  # a run goes on from its first epoch
    order = np.random.default_rng(seed).permutation(len(table.end))
    first = min(len(order), int((budget - max(budget // 2, 1)) * EPOCHS))
    if not first:
        return random(table, seed, budget)
    ranked = order[:first][np.argsort(table.score[order[:first], 0], kind="stable")]
    top = int((budget - first / EPOCHS) / share + BETWEEN)
    return [(first / EPOCHS + share * (i + 1), float(table.end[c])) for i, c in enumerate(ranked[:top])]


def asha(table: Table, seed: int, budget: int) -> Best:
    """Successive halving without waiting (Li et al., MLSys 2020), one worker: promote if any rung has one in its best 1/η."""
    return [(spent, score) for spent, _, score in promotions(table, seed, budget)]


def promotions(
    table: Table, seed: int, budget: float, rungs: tuple[int, ...] = (1, 5, 20, 40), eta: int = 4
) -> Iterator[tuple[float, int, float]]:
    """What ASHA evaluates: (run-equivalents spent, configuration, its score at the rung it came to)."""
    order, at = iter(np.random.default_rng(seed).permutation(len(table.end))), [rungs.index(r) for r in rungs]
    reached: list[list[int]] = [[] for _ in at]
    gone: list[set[int]] = [set() for _ in at]
    spent, columns = 0.0, [LOOKS.index(r) for r in rungs]
    while spent < budget:
        for level in reversed(at[:-1]):
            best = sorted(reached[level], key=lambda c: table.score[c, columns[level]])[: len(reached[level]) // eta]
            ready = [c for c in best if c not in gone[level]]
            if ready:
                config, target = ready[0], level + 1
                gone[level].add(config)
                break
        else:
            config, target = next(order, None), 0
            if config is None:
                break
        spent += (rungs[target] - (rungs[target - 1] if target else 0)) / EPOCHS
        reached[target].append(int(config))
        yield spent, int(config), float(table.score[config, columns[target]])


def hyperband(table: Table, seed: int, budget: int) -> Best:
    """Hyperband's brackets one after another, each a ladder of halving that begins at another rung (Li et al., JMLR 2018)."""
    rungs, eta = (1, 5, 20, 40), 4
    order, spent, out = list(np.random.default_rng(seed).permutation(len(table.end))), 0.0, []
    while spent < budget and order:
        for start in range(len(rungs)):
            ladder = rungs[start:]
            n = math.ceil(len(rungs) / len(ladder) * eta ** (len(ladder) - 1))
            batch, order, before = order[:n], order[n:], 0
            for i, epochs in enumerate(ladder):
                column = LOOKS.index(epochs)
                for config in batch:
                    spent += (epochs - before) / EPOCHS
                    out.append((spent, float(table.score[config, column])))
                batch, before = (
                    sorted(batch, key=lambda c: table.score[c, column])[: max(n // eta ** (i + 1), 1)],
                    epochs,
                )
    return out


STRATEGIES: dict[str, Callable[[Table, int, int], Best]] = {
    "grid": grid,
    "random": random,
    "tpe": optuna_search("TPESampler"),
    "gp": optuna_search("GPSampler"),
    "hyperopt": hyperopt,
    "hyperband": hyperband,
    "asha": asha,
    "one_epoch": one_epoch,
}
ONE_BUDGET = ("one_epoch",)  # whose choices depend on the budget: searched anew for each
