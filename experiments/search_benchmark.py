"""Black-box searches of a table beside live hypergradient runs: Bayesmark's protocol on scikit-learn's five sets.

    python -m experiments.search_benchmark [--quick]

The table is that of `experiments.search_table`, its searches those of `experiments.table_searches`. What is minimised is the mean
held-out score of the five folds; one run-equivalent is the five fits. Live trials are those of `experiments.search_live`.
"hypergradient" is one of them, from values drawn at random. "hybrid" lets ASHA choose configurations, by the same held-out
score, and when its plain runs (which are those of the table) have cost POLISH[i], a live trial goes on from the best of them that
has had none: it learns lr and weight decay anew at that configuration's batch size, hidden units and momentum or betas.

With f the best score found within a budget, f_best the table's best and f_median the median of its 256,

    regret = min((f − f_best) / (f_median − f_best), 1),    score = 1 − regret

One draw has a median regret of 1; a live run below the table's best has a negative regret. Nothing evaluated yet counts as 1.
Means are over problems (set, space, metric) and seeds; intervals are bootstrapped over problems and, inside each, over seeds.
"""

from __future__ import annotations

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
from experiments.table_searches import BETWEEN, ONE_BUDGET, STRATEGIES, Best, Table, promotions

Row = dict[str, Any]
BUDGETS = (1, 2, 4, 8, 16, 32, 64)
POLISH = (1.5, 11.5)  # an evaluation costs up to 0.5, a live trial up to 2: they end within 4 and 16
RESAMPLES = 2000


@dataclass
class Args:
    """Search the table, train the live runs, summarise both. Finished live runs are kept."""

    sets: tuple = arg(tuple(SETS), "any of them", quick=("iris",))
    strategies: tuple = arg(
        ("grid", "random", "tpe", "hyperband", "asha", "one_epoch", "hyperopt", "gp"), "searches of the table"
    )
    seeds: int = arg(10, "of each black-box search", quick=2)
    live_seeds: int = arg(5, "of the live runs", quick=1)
    hybrid_seeds: int = arg(3, "of the hybrid, the first of those", quick=1)
    first_seed: int = arg(1000, "of black-box searches; they count up from here")
    first_live_seed: int = arg(FIRST_FINAL_SEED, "of live runs; variants are chosen below 1000")
    budget: int = arg(64, "largest, in run-equivalents", quick=2)
    epochs: int = arg(EPOCHS, "of a live run", quick=2)
    table: str = arg(str(results.FOLDER), "folder of the table")
    jobs: int = arg(1, "processes of the live runs, each with one thread")
    runs: str = arg("runs/search_benchmark", "folder of finished live runs", quick="runs/search_benchmark_quick")
    out: str = arg("runs/search_benchmark", "folder of the result", quick="runs/search_benchmark_quick")
    quick: bool = arg(False, "a live run of 2 epochs on iris: a test of the machinery")


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


def live_rows(args: Args, problems: dict[tuple[str, str, str], Table]) -> list[Row]:
    """Every live trial: those from random values first, then those of the hybrids, each configuration once."""
    seeds = [args.first_live_seed + i for i in range(args.live_seeds)]
    keys = [(s, p, seed, None) for seed in seeds for s in args.sets for p in SPACES]
    chosen = {
        (key[0], key[1], seed, config)
        for seed in seeds[: args.hybrid_seeds]
        for key, table in problems.items()
        for _, config in polished(table, seed, args.budget)
    }
    names = ("set", "space", "seed", "config")
    todo: list[Row] = [
        {"kind": "live"} | dict(zip(names, key, strict=True)) | {"epochs": args.epochs}
        for key in keys + sorted(chosen, key=lambda key: (key[2], *key[:2], key[3]))
    ]
    rows = sweep(run, todo, Path(args.runs) / "search_live.jsonl", args.jobs)
    rows = [row for row in rows if any(item.items() <= row.items() for item in todo)]
    return [row | {"strategy": "hypergradient" if row["config"] is None else "hybrid"} for row in rows]


def polished(table: Table, seed: int, budget: float) -> list[tuple[float, int]]:
    """(run-equivalents that ASHA has spent, configuration) of each live trial of a hybrid."""
    out: list[tuple[float, int]] = []
    best: dict[int, float] = {}
    for spent, config, score in promotions(table, seed, budget):
        best[config] = score  # at the rung it has come to last
        if len(out) < len(POLISH) and spent >= POLISH[len(out)] - BETWEEN:
            left = {c: x for c, x in best.items() if c not in [c for _, c in out]}
            out.append((spent, min(left, key=left.__getitem__)))
    return out


def hybrid(table: Table, seed: int, budget: float, live: dict[int, tuple[float, float]]) -> Best:
    """Plain runs and live trials in the order of their costs; `live`: configuration → (cost, score) of its live trial."""
    todo, extra, out = polished(table, seed, budget), 0.0, []
    for spent, _, score in promotions(table, seed, budget):
        out.append((spent + extra, score))
        if todo and spent >= todo[0][0]:
            cost, found = live[todo.pop(0)[1]]
            extra += cost
            out.append((spent + extra, found))
    return out


def search(item: Row, folder: Path) -> Row:
    """All seeds of one strategy on one problem: a field for each budget and seed."""
    key = (item["set"], item["space"], item["metric"])
    table, seek = tables(folder, (item["set"],))[key], STRATEGIES[item["strategy"]]
    budgets, row = _budgets(item["budget"]), dict(item)
    for seed in range(item["seeds"]):
        at = item["first_seed"] + seed
        whole = None if item["strategy"] in ONE_BUDGET else seek(table, at, budgets[-1])
        for b in budgets:
            row[f"regret_{b}_{seed}"] = regret(seek(table, at, b) if whole is None else whole, table, b)
    return row


def _budgets(largest: int) -> list[int]:
    return [b for b in BUDGETS if b <= largest]


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
        for b in _budgets(args.budget):
            regrets = np.array([row[f"regret_{b}_{seed}"] for seed in range(args.seeds)])
            out.setdefault(item["strategy"], {}).setdefault(b, []).append(regrets)
    return out | of_live(problems, live, _budgets(args.budget))


def of_live(
    problems: dict[tuple[str, str, str], Table], live: list[Row], budgets: list[int]
) -> dict[str, dict[int, list[np.ndarray]]]:
    """The same of the live trials; "hypergradient" at the budgets that it reaches."""
    out: dict[str, dict[int, list[np.ndarray]]] = {"hypergradient": {}, "hybrid": {}}
    paths: dict[str, dict[tuple[str, str, str], list[Best]]] = {name: {} for name in out}
    for key, table in problems.items():
        own = [row for row in live if (row["set"], row["space"]) == key[:2]]
        for first in (row for row in own if row["config"] is None):
            trials = {r["config"]: (r["cost"], r[key[2]]) for r in own if r["seed"] == first["seed"]}
            paths["hypergradient"].setdefault(key, []).append([trials.pop(None)])
            if all(config in trials for _, config in polished(table, first["seed"], budgets[-1])):
                paths["hybrid"].setdefault(key, []).append(hybrid(table, first["seed"], budgets[-1], trials))
    most = max(path[-1][0] for each in paths["hypergradient"].values() for path in each)
    for name, own in paths.items():
        for b in [b for b in budgets if name == "hybrid" or b <= max(most, 2)]:
            out[name][b] = [np.array([regret(path, problems[key], b) for path in own[key]]) for key in problems]
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
    live = live_rows(args, problems)
    rows = summarise(problems, searched(args, problems, live)) + live
    results.write(Path(args.out) / "search_benchmark.json", command(args), rows, one_line_a_row=True)
    for row in rows:
        if row["kind"] in ("summary", "difference"):
            print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    return rows


if __name__ == "__main__":
    main()
