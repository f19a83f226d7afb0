"""Products in one step of s, for several s: what is it worth, beside a product in every step?

    python -m experiments.strides [--strides 3 7] [--families main small] [--seed 0] [--quick]

A run is one workload from one start on one seed, tuned with a plan that has this stride and leaves out nothing else (no clock is
read), or, with stride 1, without a plan. kind "run": the validation loss at its end, and CPU seconds. kind "summary", for each
stride and family: with ρ the logarithm of the validation loss over that with stride 1 of the same start and seed,

    mean                     exp of the mean over workloads of the mean of ρ over a workload's runs
    worst, worst_workload    the largest mean of a workload
    seconds                  mean over runs of the seconds over those with stride 1

Seeds are below 1000: test losses are not read.
"""

from __future__ import annotations

import math
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from experiments import results
from experiments.arguments import arg, command, parse
from experiments.invariance import UNSEEN
from experiments.sweep import sweep
from experiments.workloads import FAMILIES, WORKLOADS, train_tuned

Row = dict[str, Any]
STARTS = {"main": ((1e-5, 1e-5), (0.1, 1e-3)), "small": ((1e-5, 1e-2),)}  # (lr, weight decay)
FREE = {"cost": 1000.0, "product": 1.0, "validation": 1.0, "every": 10, "resting": 10}  # a plan that leaves nothing out


@dataclass
class Args:
    """Tune every workload with products in one step of so many. Finished runs are kept."""

    strides: tuple = arg(
        (1, 3, 5, 7, 9, 21), "s; 1, which the others are compared with, has to be among them", quick=(1, 3)
    )
    families: tuple = arg(("main", "small"), "of workloads", quick=("small",))
    seeds: int = arg(1, "runs of each start")
    seed: int = arg(0, "the first of the seeds, below 1000")
    steps: int = arg(0, "training steps of a run; 0: the workload's own", quick=30)
    jobs: int = arg(1, "processes, each with one thread")
    out: str = arg("runs/strides", "folder of finished runs and result", quick="runs/strides_quick")
    quick: bool = arg(False, "a few steps: a test of the machinery")


def items(args: Args) -> Iterator[Row]:
    """What is to be run: seed by seed, and stride by stride."""
    for seed in range(args.seed, args.seed + args.seeds):
        for stride in args.strides:
            for family in args.families:
                for name in FAMILIES[family]:
                    for lr, wd in STARTS[family]:
                        yield {
                            "stride": stride, "family": family, "workload": name, "seed": seed, "start_lr": lr,
                            "start_weight_decay": wd, "steps": WORKLOADS[name].length(False, args.steps),
                        }  # fmt: skip


def run(item: Row) -> Row:
    """One item of the sweep."""
    task = WORKLOADS[item["workload"]].build(item["seed"], False, item["steps"])
    options: Row = {"cost": None} if item["stride"] == 1 else {"plan": FREE | {"stride": item["stride"]}}
    began = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # roll-backs are counted
        row = train_tuned(task, item["start_lr"], item["start_weight_decay"], **options)
    seconds = time.process_time() - began
    return (
        item | {name: row[name] for name in ("val", "end_lr", "end_weight_decay", "rollbacks")} | {"seconds": seconds}
    )


def summaries(rows: list[Row]) -> Iterator[Row]:
    """A row for each stride and family."""
    key = ("family", "workload", "seed", "start_lr", "steps")
    whole = {tuple(row[name] for name in key): row for row in rows if row["stride"] == 1}
    for stride, family in dict.fromkeys((row["stride"], row["family"]) for row in rows):
        mine = [row for row in rows if (row["stride"], row["family"]) == (stride, family)]
        pairs = [(row, whole[place]) for row in mine if (place := tuple(row[name] for name in key)) in whole]
        ratios: dict[str, list[float]] = defaultdict(list)
        for one, other in pairs:
            if one["val"] and other["val"]:
                ratios[one["workload"]].append(math.log(one["val"] / other["val"]))
        if not ratios:
            continue
        means = {name: fmean(xs) for name, xs in ratios.items()}
        worst = max(means, key=lambda name: means[name])
        yield {
            "kind": "summary", "stride": stride, "family": family, "runs": len(mine),
            "lost": sum(one["val"] is None and other["val"] is not None for one, other in pairs),
            "mean": math.exp(fmean(means.values())), "worst": math.exp(means[worst]), "worst_workload": worst,
            "seconds": fmean(one["seconds"] / other["seconds"] for one, other in pairs),
        }  # fmt: skip


def main(args: Args) -> None:
    if args.seed + args.seeds > UNSEEN:
        raise ValueError(f"seeds from {UNSEEN} on are for reports: choose --seed and --seeds below.")
    out = Path(args.out)
    rows = sweep(run, list(items(args)), out / "strides.jsonl", args.jobs)
    found = list(summaries(rows))
    results.write(
        out / "strides.json", command(args), [*found, *({"kind": "run", **row} for row in rows)], one_line_a_row=True
    )
    for row in found:
        print({name: round(x, 3) if isinstance(x, float) else x for name, x in row.items()})


if __name__ == "__main__":
    main(parse(Args))
