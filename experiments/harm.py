"""Does tuning do harm? Small sets and wrong labels, tuned with the defaults, against an untuned run and the best of a grid.

    python -m experiments.harm [--workloads random_labels diabetes_100] [--family main] [--seed 1000] [--quick]

Every workload is tuned from five starts, lr 1e-6 … 0.1 with the weight decay of the untuned run (1e-4 where that is 0), on five
seeds. On the same seeds, so with the same initialisation and batches, it is run untuned: lr 1e-3 (SGD: 0.1) decaying linearly to
zero, torch's weight decay. With the L* of `pools_small.json` (see experiments.pools), a workload's summary row has

    val, untuned_val             mean validation loss at the end over all runs; of the untuned runs
    best_val                     the same of the weights of `tuner.best()`; null where the tuner has none
    over_grid, over_untuned      val over the validation loss of the grid's winner; over untuned_val
    worst_start                  the largest mean over seeds of a start, over the grid's winner's; start_lr is that start
    worst_run                    the largest val of one run over the untuned val of its seed
    best_over_grid, best_over_untuned    of best_val
    test_over_winner, best_test_over_winner    the mean clean test loss over the grid's winner's

and the row of all workloads the geometric mean of each ratio and, as `largest_…`, the worst workload's. A ratio is null where a
run ended without a number. Test losses are read on seeds from 1000 on; on those below, where variants of the method are chosen,
they are null.
"""

from __future__ import annotations

import math
import os
import warnings
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any

import numpy as np

from experiments import results
from experiments.arguments import arg, command, parse
from experiments.invariance import UNSEEN, check
from experiments.pools import REFERENCE, significant, summaries
from experiments.sweep import sweep
from experiments.workloads import WORKLOADS, chosen, train, train_tuned

Row = dict[str, Any]
START_LR = (-6, -1)  # exponents of ten
START_WD = 1e-4  # where the untuned run has none
RATIOS = ("over_grid", "over_untuned", "worst_start", "worst_run", "best_over_grid", "best_over_untuned")
TEST_RATIOS = ("test_over_winner", "best_test_over_winner")


@dataclass
class Args:
    """Run every workload untuned, and tuned from every start. Finished runs are kept; call it again to go on."""

    workloads: tuple = arg((), "any of one family (default: the family's)")
    family: str = arg("small", "the workloads that are run without --workloads: main or small")
    starts: int = arg(5, "learning rates to start from", quick=2)
    seeds: int = arg(5, "runs of each start", quick=1)
    seed: int = arg(0, "the first of the seeds; test losses are read from 1000 on")
    steps: int = arg(0, "training steps of a run; 0: the workload's own", quick=40)
    full: bool = arg(False, "the larger version of each workload")
    jobs: int = arg(os.cpu_count() or 1, "processes, each with one thread", quick=1)
    pools: str = arg("", "folder of pools_small.json (default: experiments/results)")
    out: str = arg("runs/harm", "folder of finished runs and result", quick="runs/harm_quick")
    quick: bool = arg(False, "a few steps from a few starts: a test of the machinery")


def items(args: Args, names: tuple[str, ...]) -> list[Row]:
    """What is to be run: of each workload and seed the untuned run, then the tuned ones."""
    out = []
    for name in names:
        row = WORKLOADS[name]
        lr, wd = REFERENCE[row.optimizer]
        for seed in range(args.seed, args.seed + args.seeds):
            same = {"workload": name, "seed": seed, "steps": row.length(args.full, args.steps), "full": args.full}
            out.append(same | {"kind": "untuned", "start_lr": lr, "start_weight_decay": wd})
            out += [
                same | {"kind": "tuned", "start_lr": significant(start), "start_weight_decay": wd or START_WD}
                for start in np.logspace(*START_LR, args.starts)
            ]
    return out


def run(item: Row) -> Row:
    """One item of the sweep."""
    task = WORKLOADS[item["workload"]].build(item["seed"], item["full"], item["steps"])
    if item["kind"] == "untuned":
        row = train(task, item["start_lr"], item["start_weight_decay"])
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # roll-backs are counted
            row = train_tuned(task, item["start_lr"], item["start_weight_decay"], at_best=True)
    seen = ("test", "best_test") if item["seed"] < UNSEEN else ()
    return item | {key: value for key, value in row.items() if key not in seen}


def mean(rows: list[Row], field: str) -> float | None:
    """The mean of a loss; NaN where a run has none, None where no run has the field."""
    values = [row.get(field) for row in rows]
    if all(value is None for value in values):
        return None
    return fmean(math.nan if value is None else value for value in values)


def over(loss: float | None, other: float | None) -> float | None:
    return None if loss is None or other is None else loss / other


def by_start(rows: list[Row]) -> dict[float, float | None]:
    """Start of lr → mean validation loss over its seeds."""
    starts = defaultdict(list)
    for row in rows:
        starts[row["start_lr"]].append(row)
    return {lr: mean(starts[lr], "val") for lr in sorted(starts)}


def summary(workload: str, rows: list[Row], pool: Row | None) -> Row:
    """One workload's summary row, from its tuned and its untuned runs."""
    tuned, untuned = ([row for row in rows if row["kind"] == kind] for kind in ("tuned", "untuned"))
    star, test_star = (pool[name] if pool else None for name in ("val_l_star", "l_star"))
    starts, of_seed = by_start(tuned), {row["seed"]: row["val"] for row in untuned}
    worst = max(starts, key=lambda lr: _or_infinity(starts[lr]))
    each = [over(row["val"], of_seed[row["seed"]]) for row in tuned]
    losses = {"val": mean(tuned, "val"), "untuned_val": mean(untuned, "val"), "best_val": mean(tuned, "best_val")}
    tests = {name: mean(tuned, name) for name in ("test", "best_test")} | {"untuned_test": mean(untuned, "test")}
    return {
        "workload": workload,
        "kind": "summary",
        "runs": len(tuned),
        "start_lr": worst,
        **losses,
        **tests,
        "val_l_star": star,
        "l_star": test_star,
        "over_grid": over(losses["val"], star),
        "over_untuned": over(losses["val"], losses["untuned_val"]),
        "worst_start": over(starts[worst], star),
        "worst_run": None if None in each else max(x for x in each if x is not None),
        "best_over_grid": over(losses["best_val"], star),
        "best_over_untuned": over(losses["best_val"], losses["untuned_val"]),
        "test_over_winner": over(tests["test"], test_star),
        "best_test_over_winner": over(tests["best_test"], test_star),
        "rollbacks": sum(row["rollbacks"] for row in tuned),
    }


def _or_infinity(x: float | None) -> float:
    return math.inf if x is None or math.isnan(x) else x


def overall(rows: list[Row]) -> Row:
    """The row of all workloads: geometric means and worst workloads; null where one of them has no such ratio."""
    out: Row = {"workload": "all", "kind": "overall", "runs": sum(row["runs"] for row in rows)}
    for name in (*RATIOS, *TEST_RATIOS):
        values = [row[name] for row in rows]
        known = all(x is not None and math.isfinite(x) for x in values)
        out |= {name: geometric_mean(values) if known else None, f"largest_{name}": max(values) if known else None}
    return out


def main(args: Args) -> list[Row]:
    family, names = chosen(args)
    check(args)
    if args.starts < 1:
        raise SystemExit("--starts is at least 1")
    todo, out = items(args, names), Path(args.out)
    file = "harm" if family == "small" else f"harm_{family}"
    kept = sweep(run, todo, out / f"{file}.jsonl", min(args.jobs, len(todo)))
    rows = [row for item in todo for row in kept if item.items() <= row.items()]

    pools = summaries(Path(args.pools) if args.pools else results.FOLDER, args.full, family)
    mine = {name: [row for row in rows if row["workload"] == name] for name in names}
    ends = [summary(name, mine[name], pools.get(name)) for name in names]
    rows = [*ends, overall(ends), *rows]
    results.write(out / f"{file}.json", command(args), rows, one_line_a_row=True)
    show(ends, rows[len(ends)], {name: by_start([r for r in mine[name] if r["kind"] == "tuned"]) for name in names})
    return rows


def show(ends: list[Row], whole: Row, starts: dict[str, dict[float, float | None]]) -> None:
    def shown(values: list[float | None]) -> str:
        return "".join(f"{'–' if x is None or math.isnan(x) else format(x, '.4g'):>10}" for x in values)

    columns = ("val_l_star", "untuned_val", "val", "over_grid", "over_untuned", "worst_run", "best_over_grid")
    titles = ("L*", "untuned", "tuned", "/ L*", "/ untun.", "run", "best / L*", "test / L*")
    lrs = [*next(iter(starts.values()))]
    print(f"\nvalidation loss at the end, {whole['runs']} tuned runs; on the right its mean from each start of lr")
    print(f"{'workload':<24}" + "".join(f"{title:>10}" for title in titles) + "".join(f"{lr:>10.2g}" for lr in lrs))
    for row in ends:
        numbers = shown([row[name] for name in (*columns, "test_over_winner")])
        print(f"{row['workload']:<24}{numbers}{shown(list(starts[row['workload']].values()))}")
    for title, prefix in (("geometric mean", ""), ("worst workload", "largest_")):
        print(
            f"{title:<24}{'':>30}" + shown([whole[prefix + name] for name in (*RATIOS[:2], "worst_run", RATIOS[4])]),
            end="",
        )
        print(shown([whole[f"{prefix}test_over_winner"]]))


if __name__ == "__main__":
    main(parse(Args))
