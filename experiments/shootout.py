"""What a user would pick instead: the quality and cost of other ways to a good lr and weight decay, on every workload.

    python -m experiments.shootout [--methods dog prodigy] [--workloads mlp_digits diabetes] [--family small] [--quick]

Live runs (experiments.rivals) are made on five fresh seeds, the same for all, and kept: a later call adds what is missing, and
the result has everything that is there. Searches (experiments.searches) are played 1,000 times each with the random trials of
`pools.json`; the winner of its grid of 200 stands beside them with its fresh seeds. A method whose package is not installed is
left out and named. With the L* and L0 of `pools.json`,

    regret   test loss / L*: 1 is what the grid's winner has on fresh seeds, at 200 times the cost
    lost     a run that ends without a finite test loss, or above L0, the loss before training. None is dropped: it has a null
             `test` or the one it has, and counts in every mean and worst as L0.
    cost     gradient evaluations, in those of one plain run

Rows by `kind`: "run" (workload, method, seed), "workload" (workload, method: mean, 5–95 % range and worst regret over seeds or
resamples) and "summary" (method): `regret`, the geometric mean over workloads of the mean regret; `low`, `high`, the 5–95 %
range of the geometric mean over workloads, of the searches made or of the seeds; `worst`, the worst workload's mean; `worst_run`.
Optuna is run on four workloads only: `regret_four` is the geometric mean over these, for every method that has all four.
Resamples of 64 out of 128 trials overlap, so that their range is narrower than that of independent searches.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from experiments import results
from experiments.arguments import arg, command, parse
from experiments.pools import FRESH_SEED, significant, summaries
from experiments.rivals import METHODS, installed, tpe
from experiments.searches import SEARCHES, resample
from experiments.sweep import finished, sweep
from experiments.workloads import FAMILIES, WORKLOADS, chosen

Row = dict[str, Any]
FOUR = ("mlp_digits", "diabetes", "friedman", "cloning")  # the cheapest; Optuna's
TPE, GRID = "tpe", "grid"
TITLES = {name: method.title for name, method in METHODS.items()} | {
    name: search.title for name, search in SEARCHES.items()
}


@dataclass
class Args:
    """Run the live methods and resample the searches. Finished runs are kept; call it again to go on."""

    workloads: tuple = arg((), "any of one family (default: the family's)")
    family: str = arg("main", "the workloads that are run without --workloads: main or small")
    methods: tuple = arg((*METHODS, TPE), "live methods to run; 'none' for what is there")
    seeds: int = arg(5, "runs of each live method", quick=2)
    seed: int = arg(FRESH_SEED, "the first of the seeds")
    tpe_seeds: int = arg(3, "studies of Optuna on each of its four workloads", quick=1)
    trials: int = arg(32, "trials of a study", quick=2)
    resamples: int = arg(1000, "times that each search is played", quick=20)
    steps: int = arg(0, "training steps of a run; 0: the workload's own", quick=20)
    full: bool = arg(False, "the larger version of each workload")
    jobs: int = arg(os.cpu_count() or 1, "processes, each with one thread", quick=1)
    pools: str = arg("", "folder of pools.json (default: experiments/results)")
    out: str = arg("runs/shootout", "folder of finished runs and result", quick="runs/shootout_quick")
    quick: bool = arg(False, "a few steps of a few runs: a test of the machinery")


def title(method: str, cost: float, trials: int = 32) -> str:
    return {GRID: f"grid of {cost:g}, its winner", TPE: f"Optuna TPE, {trials} trials"}.get(method) or TITLES[method]


def run(item: Row) -> Row:
    """One item of the sweep; `trials` is there for Optuna's only."""
    build = partial(WORKLOADS[item["workload"]].build, full=item["full"], steps=item["steps"])
    if item["method"] == TPE:
        row, package = tpe(build, item["seed"], item["trials"]), "optuna"
    else:
        method = METHODS[item["method"]]
        row, package = method.train(build(item["seed"])), method.package
    row = {"gradient_evaluations": item["steps"], "package": installed(package)} | row
    return {key: significant(x) if isinstance(x, float) and math.isfinite(x) else x for key, x in (item | row).items()}


def counted(test: np.ndarray, pool: Row) -> tuple[np.ndarray, np.ndarray]:
    """Regrets, lost runs among them at L0 / L*, and which runs those are."""
    lost = ~(test <= pool["l0"])  # NaN too
    return np.where(lost, pool["l0"], test) / pool["l_star"], lost


def of_workload(method: str, workload: str, test: np.ndarray, pool: Row, cost: float) -> Row:
    """The row of kind "workload"; `regrets` is taken out again before it is written."""
    regrets, lost = counted(test, pool)
    low, high = np.quantile(regrets, (0.05, 0.95))
    row = {"kind": "workload", "workload": workload, "method": method, "title": title(method, cost), "runs": len(test)}
    row |= {"regret": float(regrets.mean()), "low": float(low), "high": float(high), "worst": float(regrets.max())}
    return row | {"lost": float(lost.mean()), "cost": cost, "regrets": regrets}


def summary(rows: list[Row]) -> Row:
    """The row of one method from its rows of kind "workload"."""
    runs = min(row["runs"] for row in rows)
    together = np.exp(np.mean([np.log(row["regrets"][:runs]) for row in rows], axis=0))
    low, high = np.quantile(together, (0.05, 0.95))
    worst = max(rows, key=lambda row: row["regret"])
    four = [row["regret"] for row in rows if row["workload"] in FOUR]
    return {
        "kind": "summary",
        "method": rows[0]["method"],
        "title": rows[0]["title"],
        "workloads": len(rows),
        "runs": runs,
        "regret": geometric_mean([row["regret"] for row in rows]),
        "low": float(low),
        "high": float(high),
        "worst": worst["regret"],
        "worst_workload": worst["workload"],
        "worst_run": max(row["worst"] for row in rows),
        "lost": float(np.mean([row["lost"] for row in rows])),
        "cost": float(np.mean([row["cost"] for row in rows])),
        "regret_four": geometric_mean(four) if len(four) == len(FOUR) else None,
    }


def geometric_mean(values: list[float]) -> float:
    return float(np.exp(np.mean(np.log(values))))


def of_pool(args: Args, pools: dict[str, Row]) -> list[Row]:
    """The searches' rows of kind "workload", and the grid's; a search that draws more trials than there are is left out."""
    folder = Path(args.pools) if args.pools else results.FOLDER
    pool_rows = (results.load(f"{results.stem('pools', args.family, args.full)}.json", folder) or {"rows": []})["rows"]
    out = []
    for number, workload in enumerate(name for name in WORKLOADS if name in pools and name in args.workloads):
        own = [row for row in pool_rows if row["workload"] == workload]
        trials = [row for row in own if row["kind"] == "random"]
        fresh = np.array([row["test"] for row in own if row["kind"] == "fresh"], dtype=float)
        grid = sum(row["kind"] == "grid" for row in own)
        out.append(of_workload(GRID, workload, fresh, pools[workload], grid))
        for place, (name, search) in enumerate(SEARCHES.items()):
            if search.trials <= len(trials):
                test = resample(search, trials, args.resamples, np.random.default_rng([place, number]))
                out.append(of_workload(name, workload, test, pools[workload], search.cost))
    return out


def of_runs(runs: list[Row], pools: dict[str, Row]) -> list[Row]:
    """The live methods' rows of kind "workload"."""
    out = []
    for workload, method in dict.fromkeys((row["workload"], row["method"]) for row in runs):
        own = [row for row in runs if (row["workload"], row["method"]) == (workload, method)]
        if workload in pools:
            test = np.array([row["test"] for row in own], dtype=float)
            cost = float(np.mean([row["gradient_evaluations"] / row["steps"] for row in own]))
            out.append(of_workload(method, workload, test, pools[workload], cost))
    return out


def items(args: Args) -> list[Row]:
    """What is to be run, method by method."""
    missing = {name: METHODS[name].package if name in METHODS else "optuna" for name in args.methods if name != "none"}
    missing = {name: package for name, package in missing.items() if installed(package) is None}
    for name, package in missing.items():
        print(f"{name} is left out: {package} is not installed (pip install -e '.[bench]')")
    out = []
    for method in args.methods:
        of_tpe = method == TPE
        for seed in range(args.tpe_seeds if of_tpe else args.seeds):
            for workload in (w for w in args.workloads if not of_tpe or w in FOUR):
                steps = WORKLOADS[workload].length(args.full, args.steps)
                item = {"workload": workload, "method": method, "seed": args.seed + seed, "steps": steps}
                item |= {"full": args.full} | ({"trials": args.trials} if of_tpe else {})
                if method not in (*missing, "none"):
                    out.append(item)
    return out


def gathered(args: Args, path: Path) -> list[Row]:
    """Every kept run of these workloads at this length, method by method."""
    order = [*METHODS, TPE]
    kept = [row for row in finished(path) if row["workload"] in args.workloads and row["full"] == args.full]
    steps = {w: WORKLOADS[w].length(args.full, args.steps) for w in args.workloads}
    kept = [row for row in kept if row["steps"] == steps[row["workload"]] and row["method"] in order]
    kept = [row for row in kept if row.get("trials", args.trials) == args.trials]
    names = list(WORKLOADS)
    return sorted(kept, key=lambda row: (order.index(row["method"]), names.index(row["workload"]), row["seed"]))


def main(args: Args) -> list[Row]:
    recorded, (family, names) = command(args), chosen(args)
    args = replace(args, family=family, workloads=names)
    for given, known in ((names, FAMILIES[family]), (args.methods, (*METHODS, TPE, "none"))):
        unknown = [name for name in given if name not in known]
        if unknown:
            raise SystemExit(f"unknown {', '.join(unknown)}; choose from {', '.join(known)}")
    if min(args.seeds, args.tpe_seeds, args.trials, args.resamples, args.jobs) < 1:
        raise SystemExit("--seeds, --tpe-seeds, --trials, --resamples and --jobs are at least 1")
    out, file = Path(args.out), results.stem("shootout", family)
    path = out / f"{file}.jsonl"
    todo = items(args)
    if todo:
        sweep(run, todo, path, min(args.jobs, len(todo)))
    runs = gathered(args, path)

    pools = summaries(Path(args.pools) if args.pools else results.FOLDER, args.full, family)
    table = of_runs(runs, pools) + of_pool(args, pools)
    ends = [
        summary([row for row in table if row["method"] == m]) for m in dict.fromkeys(row["method"] for row in table)
    ]
    ends.sort(key=lambda row: row["regret"])
    kinds = [*ends, *({k: v for k, v in row.items() if k != "regrets"} for row in table)]
    rows = [{k: significant(v) if isinstance(v, float) else v for k, v in row.items()} for row in kinds]
    rows += [{"kind": "run"} | row for row in runs]
    results.write(out / f"{file}.json", recorded, rows, one_line_a_row=True)

    print(f"\n{'method':<34}{'regret':>8}{'5 %':>8}{'95 %':>8}{'worst':>8}{'lost':>7}{'cost':>7}{'four':>8}")
    for row in rows[: len(ends)]:
        four = "–" if row["regret_four"] is None else f"{row['regret_four']:.3f}"
        print(
            f"{row['title']:<34}{row['regret']:>8.3f}{row['low']:>8.3f}{row['high']:>8.3f}{row['worst']:>8.3f}"
            f"{row['lost']:>7.1%}{row['cost']:>7.2f}{four:>8}  {row['workloads']} × {row['runs']}"
        )
    return rows


if __name__ == "__main__":
    main(parse(Args))
