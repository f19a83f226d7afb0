"""Black-box searches of a table beside live hypergradient runs: Bayesmark's protocol on scikit-learn's five sets.

    python -m experiments.search_benchmark [--quick]

The table is that of `experiments.search_table`. A sampler proposes a point of the space; the nearest configuration in unit
coordinates that it has not evaluated yet is evaluated and told in its place. What is minimised is the mean held-out score
of the five folds; one run-equivalent is the five fits. Live trials are those of `experiments.search_live`, from random
starts; "hybrid" is such trials one after another, the best of them by the same held-out score. (Optuna's TPE draws its first
ten points at random, and no hybrid here has more trials than that.)

With f the best score found within a budget, f_best the table's best and f_median the median of its 256,

    regret = min((f − f_best) / (f_median − f_best), 1),    score = 1 − regret

One draw has a median regret of 1; a live run below the table's best has a negative regret. Nothing evaluated yet counts as 1.
Means are over problems (set, space, metric) and seeds; intervals are bootstrapped over problems and, inside each, over seeds.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from experiments import results
from experiments.arguments import arg, command, parse
from experiments.search_live import FIRST_FINAL_SEED, run
from experiments.search_problems import EPOCHS, LOOKS, METRICS, SETS, SPACES
from experiments.search_table import NAME, units
from experiments.sweep import sweep

Row = dict[str, Any]
Best = list[tuple[float, float]]  # (run-equivalents spent, score of the evaluation), in order
BUDGETS = (1, 2, 4, 8, 16, 32, 64)
RESAMPLES = 2000
BETWEEN = 1e-6  # added to a cost, against rounding


@dataclass
class Args:
    """Search the table, train the live runs, summarise both. Finished live runs are kept."""

    sets: tuple = arg(tuple(SETS), "any of them", quick=("iris",))
    strategies: tuple = arg(
        ("grid", "random", "tpe", "hyperband", "asha", "one_epoch", "hyperopt", "gp"), "searches of the table"
    )
    seeds: int = arg(10, "of each black-box search", quick=2)
    live_seeds: int = arg(5, "of the live runs", quick=1)
    trials: int = arg(2, "live trials of a seed: the first is hypergradient, all are hybrid", quick=1)
    first_seed: int = arg(FIRST_FINAL_SEED, "seeds count up from here; variants are chosen below 1000")
    budget: int = arg(64, "largest, in run-equivalents", quick=2)
    epochs: int = arg(EPOCHS, "of a live run", quick=2)
    table: str = arg(str(results.FOLDER), "folder of the table")
    jobs: int = arg(1, "processes of the live runs, each with one thread")
    runs: str = arg("runs/search_benchmark", "folder of finished live runs", quick="runs/search_benchmark_quick")
    out: str = arg("runs/search_benchmark", "folder of the result", quick="runs/search_benchmark_quick")
    quick: bool = arg(False, "a live run of 2 epochs on iris: a test of the machinery")


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
    """Half the budget for one epoch of random configurations, half for the best of them, to their end."""
    top = max(budget // 2, 1)
    first = min(len(table.end), int((budget - top) * EPOCHS))
    order = np.random.default_rng(seed).permutation(len(table.end))[: max(first, top)]
    ranked = order[np.argsort(table.score[order, 0], kind="stable")][:top] if first else order[:top]
    share = (EPOCHS - 1) / EPOCHS if first else 1.0  # a run goes on from its first epoch
    return [(first / EPOCHS + share * (i + 1), float(table.end[c])) for i, c in enumerate(ranked)]


def asha(table: Table, seed: int, budget: int, rungs: tuple[int, ...] = (1, 5, 20, 40), eta: int = 4) -> Best:
    """Successive halving without waiting (Li et al., MLSys 2020), one worker: promote if any rung has one in its best 1/η."""
    order, at = iter(np.random.default_rng(seed).permutation(len(table.end))), [rungs.index(r) for r in rungs]
    reached: list[list[int]] = [[] for _ in at]
    gone: list[set[int]] = [set() for _ in at]
    spent, out, columns = 0.0, [], [LOOKS.index(r) for r in rungs]
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
        out.append((spent, float(table.score[config, columns[target]])))
    return out


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
LARGEST = {"gp": 16}  # budgets that a strategy is searched to, where all of them would take hours


def tables(folder: Path, sets: tuple[str, ...]) -> dict[tuple[str, str, str], Table]:
    """(set, space, metric) → its table."""
    content = results.load(NAME, folder)
    if content is None:
        raise SystemExit(f"there is no {NAME} in {folder}: run python -m experiments.search_table --out {folder}")
    out = {}
    for name in sets:
        for space in SPACES:
            rows = [row for row in content["rows"] if (row["set"], row["space"]) == (name, space)]
            unit = units(SPACES[space])[[row["config"] for row in rows]]
            for metric in METRICS[name]:
                out[name, space, metric] = Table(
                    unit, np.array([[r[f"{metric}_{look}"] for look in LOOKS] for r in rows])
                )
    return out


def regret(best: Best, table: Table, budget: float) -> float:
    """Of the best evaluation within the budget."""
    found = [value for spent, value in best if spent <= budget + BETWEEN]
    if not found:
        return 1.0
    low, middle = float(table.end.min()), float(np.median(table.end))
    return min((min(found) - low) / (middle - low), 1.0)


def bootstrap(by_problem: list[np.ndarray], rng: np.random.Generator) -> tuple[float, float]:
    """The 95 % interval of the mean: problems are drawn again, and inside each its seeds."""
    means = []
    for _ in range(RESAMPLES):
        drawn = [by_problem[i] for i in rng.integers(len(by_problem), size=len(by_problem))]
        means.append(np.mean([x[rng.integers(len(x), size=len(x))].mean() for x in drawn]))
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def live_rows(args: Args) -> list[Row]:
    """Every live trial, first trials first."""
    todo = [
        {
            "kind": "live",
            "set": s,
            "space": p,
            "seed": args.first_seed + i,
            "trial": t,
            "momenta": False,
            "epochs": args.epochs,
        }
        for t in range(args.trials)
        for i in range(args.live_seeds)
        for s in args.sets
        for p in SPACES
    ]
    rows = sweep(run, todo, Path(args.runs) / "search_live.jsonl", args.jobs)
    return [row | {"strategy": "hypergradient"} for row in rows if any(item.items() <= row.items() for item in todo)]


def search(item: Row, folder: Path) -> Row:
    """All seeds of one strategy on one problem: a field for each budget and seed."""
    key = (item["set"], item["space"], item["metric"])
    table, seek = tables(folder, (item["set"],))[key], STRATEGIES[item["strategy"]]
    budgets, row = _budgets(item["strategy"], item["budget"]), dict(item)
    for seed in range(item["seeds"]):
        at = item["first_seed"] + seed
        whole = None if item["strategy"] in ONE_BUDGET else seek(table, at, budgets[-1])
        for b in budgets:
            row[f"regret_{b}_{seed}"] = regret(seek(table, at, b) if whole is None else whole, table, b)
    return row


def _budgets(strategy: str, largest: int) -> list[int]:
    return [b for b in BUDGETS if b <= LARGEST.get(strategy, largest) and b <= largest]


def searched(
    args: Args, problems: dict[tuple[str, str, str], Table], live: list[Row]
) -> dict[str, dict[int, list[np.ndarray]]]:
    """strategy → budget → for each problem the regrets of its seeds."""
    same = {"seeds": args.seeds, "first_seed": args.first_seed, "budget": args.budget}
    todo: list[Row] = [
        dict(zip(("set", "space", "metric"), key, strict=True)) | {"strategy": name} | same
        for key in problems
        for name in args.strategies
    ]
    rows = sweep(partial(search, folder=Path(args.table)), todo, Path(args.runs) / "search_tables.jsonl", args.jobs)
    out: dict[str, dict[int, list[np.ndarray]]] = {}
    for item in todo:
        row = next(row for row in rows if item.items() <= row.items())
        for b in _budgets(item["strategy"], args.budget):
            regrets = np.array([row[f"regret_{b}_{seed}"] for seed in range(args.seeds)])
            out.setdefault(item["strategy"], {}).setdefault(b, []).append(regrets)
    return out | of_live(problems, live, [b for b in BUDGETS if b <= args.budget])


def of_live(
    problems: dict[tuple[str, str, str], Table], live: list[Row], budgets: list[int]
) -> dict[str, dict[int, list[np.ndarray]]]:
    """The same of the live trials: "hypergradient" is the first of a seed, "hybrid" all, at the budgets that they reach."""
    out: dict[str, dict[int, list[np.ndarray]]] = {"hypergradient": {}, "hybrid": {}}
    for name in out:
        paths: dict[tuple[str, str, str], list[Best]] = {}
        for key in problems:
            own = [row for row in live if (row["set"], row["space"]) == key[:2]]
            for seed in sorted({row["seed"] for row in own}):
                trials = sorted((row for row in own if row["seed"] == seed), key=lambda row: row["trial"])
                trials = trials[:1] if name == "hypergradient" else trials
                costs = np.cumsum([row["cost"] for row in trials])
                paths.setdefault(key, []).append(
                    list(zip(costs.tolist(), (row[key[2]] for row in trials), strict=True))
                )
        most = max(path[-1][0] for each in paths.values() for path in each)
        for b in [b for b in budgets if b <= max(most, 2)]:
            out[name][b] = [np.array([regret(p, problems[k], b) for p in paths[k]]) for k in problems]
    return out


def summarise(problems: dict[tuple[str, str, str], Table], found: dict[str, dict[int, list[np.ndarray]]]) -> list[Row]:
    """Rows of kinds "summary", "problem" and "difference"."""
    rng, rows = np.random.default_rng(0), []
    for name, by_budget in found.items():
        for budget, regrets in by_budget.items():
            mean = float(np.mean([x.mean() for x in regrets]))
            low, high = bootstrap(regrets, rng)
            rows.append(
                {
                    "kind": "summary",
                    "strategy": name,
                    "budget": budget,
                    "score": 1 - mean,
                    "regret": mean,
                    "low": low,
                    "high": high,
                }
            )
            for key, x in zip(problems, regrets, strict=True):
                same = {"kind": "problem", "strategy": name, "budget": budget, "regret": float(x.mean())}
                rows.append(same | dict(zip(("set", "space", "metric"), key, strict=True)))
    for name in ("hypergradient", "hybrid"):
        for rival in ("tpe", "asha"):
            for budget, theirs in found[rival].items():
                at = budget if name == "hybrid" else 2
                if at not in found[name]:
                    continue
                rows.append(_difference(name, rival, budget, found[name][at], theirs, rng))
    return rows


def _difference(name: str, rival: str, budget: int, ours: list[np.ndarray], theirs: list[np.ndarray], rng: Any) -> Row:
    """Regret of one minus that of the other; problems are drawn in pairs, seeds of each apart."""
    means = []
    for _ in range(RESAMPLES):
        at = rng.integers(len(ours), size=len(ours))
        means.append(
            np.mean(
                [rng.choice(ours[i], len(ours[i])).mean() - rng.choice(theirs[i], len(theirs[i])).mean() for i in at]
            )
        )
    low, high = np.percentile(means, [2.5, 97.5])
    mean = float(np.mean([a.mean() - b.mean() for a, b in zip(ours, theirs, strict=True)]))
    same = {"kind": "difference", "strategy": name, "rival": rival, "budget": budget}
    return same | {"score": -mean, "regret": mean, "regret_low": float(low), "regret_high": float(high)}


def main(argv: list[str] | None = None) -> list[Row]:
    args = parse(Args, argv)
    problems = tables(Path(args.table), args.sets)
    live = live_rows(args)
    rows = summarise(problems, searched(args, problems, live)) + live
    results.write(Path(args.out) / "search_benchmark.json", command(args), rows, one_line_a_row=True)
    for row in rows:
        if row["kind"] in ("summary", "difference"):
            print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    return rows


if __name__ == "__main__":
    main()
