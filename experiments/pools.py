"""Pools of plain runs of every workload: what any search over lr and weight decay can find, and the floor L*.

    python -m experiments.pools [--workloads mlp_digits diabetes] [--family small] [--jobs 2] [--quick]

A workload's pool is a grid (20 lr × 10 weight decays, the same for all, seed 0) and 128 random trials, each a plain run with lr
decaying linearly to zero. The grid's winner by validation loss is run on five fresh seeds:

    L* = their mean test loss,   σ = its standard deviation over them,   L0 = their mean test loss before training,

and the same of the validation loss (`val_l_star`, …). `pools.json` has a row for every run and, with `kind` "summary", one
for each workload. Searches are resampled from the pool: no run of it is made twice.

The small family has a `pools_small.json` of its own: a grid of 8 lr, half a decade apart, × 6 weight decays, a decade apart, in
the optimizer's range (SMALL_GRID), no trials, and on the same fresh seeds the untuned run of REFERENCE: `untuned` and
`val_untuned` are its mean test and validation loss.

The realistic family, of which a run takes minutes, has a grid of 5 lr, half a decade apart, × 2 weight decays (REALISTIC_GRID).
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from experiments import results
from experiments.arguments import arg, command, parse
from experiments.sweep import finished, sweep
from experiments.workloads import RUNGS, WORKLOADS, chosen, train

Row = dict[str, Any]
Range = tuple[float, float]
GRID_SEED, TRIAL_SEED, FRESH_SEED = 0, 1000, 2000  # the first of each kind
GRID_LR, GRID_WD = (-5, 1), (-7, -1)  # exponents of ten
TRIAL_LR, TRIAL_WD = (-6, 1), (-7, -1)
SIZES = {
    "main": (20, 10, 128),
    "small": (8, 6, 0),
    "realistic": (5, 2, 0),
}  # family → learning rates and weight decays of its grid, trials
SMALL_GRID = {"AdamW": ((-4, -0.5), (-4, 1)), "SGD": ((-3.5, 0), (-6, -1))}  # exponents of ten of lr, of weight decay
REALISTIC_GRID = {"AdamW": ((-3.5, -1.5), (-3, -1)), "SGD": ((-2, 0), (-4, -3))}
RANGES = {"small": SMALL_GRID, "realistic": REALISTIC_GRID}
# lr and weight decay of an untuned run; weight decay is torch's default
REFERENCE = {"AdamW": (1e-3, 0.01), "SGD": (0.1, 0.0), "RMSprop": (1e-3, 0.0), "Muon": (1e-3, 0.1)}
TRIALS_AT_ONCE = 32  # of one workload: an interrupted pool has about as many of each
DIGITS = 6  # that pools.json keeps of a number


@dataclass
class Args:
    """Run the grid, the winner on fresh seeds, and random trials of each workload. Finished runs are kept."""

    workloads: tuple = arg((), "any of one family (default: the family's)")
    family: str = arg("main", "the workloads that are run without --workloads: main or small")
    grid_lr: int = arg(
        0, "learning rates of the grid; 0: 20 from 1e-5 to 10, 8 for the small family, 5 for the realistic", quick=2
    )
    grid_wd: int = arg(
        0, "weight decays of the grid; 0: 10 from 1e-7 to 0.1, 6 for the small family, 2 for the realistic", quick=2
    )
    trials: int = arg(-1, "random trials; -1: 128, for the main family alone", quick=2)
    fresh: int = arg(5, "fresh seeds of the grid's winner", quick=2)
    steps: int = arg(0, "training steps of a run; 0: the workload's own", quick=20)
    full: bool = arg(False, "the larger version of each workload")
    jobs: int = arg(os.cpu_count() or 1, "processes, each with one thread", quick=1)
    out: str = arg("runs/pools", "folder of finished runs and result", quick="runs/pools_quick")
    quick: bool = arg(False, "a few steps of a few runs: a test of the machinery")


def grid(lrs: int, wds: int, lr_range: Range = GRID_LR, wd_range: Range = GRID_WD) -> list[Row]:
    """The grid's points, log-spaced; the ranges are exponents of ten."""
    return [
        {"lr": significant(lr), "weight_decay": significant(wd), "seed": GRID_SEED}
        for lr in np.logspace(*lr_range, lrs)
        for wd in np.logspace(*wd_range, wds)
    ]


def trial(number: int) -> Row:
    """A random trial: log-uniform lr and weight decay; its seed is also that of its run."""
    rng = np.random.default_rng(TRIAL_SEED + number)
    lr, wd = 10 ** rng.uniform(*TRIAL_LR), 10 ** rng.uniform(*TRIAL_WD)
    return {"lr": significant(lr), "weight_decay": significant(wd), "seed": TRIAL_SEED + number}


def significant(x: float, digits: int = DIGITS) -> float:
    return float(f"{x:.{digits}g}")


def run(item: Row, full: bool) -> Row:
    """One item of the sweep."""
    task = WORKLOADS[item["workload"]].build(item["seed"], full, item["steps"])
    return item | train(task, item["lr"], item["weight_decay"], initial=item["kind"] == "fresh")


def best(rows: list[Row]) -> Row | None:
    """The row of lowest validation loss at its end; diverged runs have none."""
    return min((row for row in rows if row["val"] is not None), key=lambda row: row["val"], default=None)


def summary(rows: list[Row]) -> Row | None:
    """L*, σ and L0 of one workload's rows, the untuned loss if it was run; None while its fresh seeds are not there."""
    fresh = [row for row in rows if row["kind"] == "fresh"]
    winner = best([row for row in rows if row["kind"] == "grid"])
    if not fresh or winner is None:
        return None
    same = {key: winner[key] for key in ("workload", "lr", "weight_decay", "steps")}
    untuned = [row for row in rows if row["kind"] == "untuned"]
    numbers = {}
    for split, prefix in (("test", ""), ("val", "val_")):
        losses, without = ([math.nan if row[split] is None else row[split] for row in of] for of in (fresh, untuned))
        numbers[f"{prefix}l_star"] = float(np.mean(losses))
        numbers[f"{prefix}sigma"] = float(np.std(losses, ddof=min(1, len(losses) - 1)))
        numbers[f"{prefix}l0"] = float(np.mean([row[f"initial_{split}"] for row in fresh]))
        numbers |= {f"{prefix}untuned": float(np.mean(without))} if without else {}
    return same | {"kind": "summary", "seeds": len(fresh)} | numbers


def summaries(folder: Path = results.FOLDER, full: bool = False, family: str = "main") -> dict[str, Row]:
    """Workload → its summary row, of the pools.json of its family in `folder`; empty where there is none."""
    pools = results.load(f"{results.stem('pools', family, full)}.json", folder)
    return {row["workload"]: row for row in pools["rows"] if row["kind"] == "summary"} if pools else {}


def compact(row: Row) -> Row:
    kept = ["workload", "kind", "lr", "weight_decay", "seed", "steps", *RUNGS, "test", "initial_val", "initial_test"]
    row = row if row["kind"] == "summary" else {key: row[key] for key in kept if key in row}
    return {key: significant(x) if isinstance(x, float) and math.isfinite(x) else x for key, x in row.items()}


def main(args: Args) -> list[Row]:
    family, names = chosen(args)
    if min(args.grid_lr, args.grid_wd) < 0 or min(args.fresh, args.jobs) < 1:
        raise SystemExit("--grid-lr and --grid-wd are at least 0, --fresh and --jobs at least 1")
    lrs, wds, trials = SIZES[family]
    lrs, wds, trials = args.grid_lr or lrs, args.grid_wd or wds, trials if args.trials < 0 else args.trials
    name, out = results.stem("pools", family, args.full), Path(args.out)
    path = out / f"{name}.jsonl"

    def sweep_of(workload: str, kind: str, points: list[Row]) -> list[Row]:
        row = WORKLOADS[workload]
        same = {"workload": workload, "kind": kind, "steps": row.length(args.full, args.steps)}
        todo = [same | point for point in points]
        rows = sweep(partial(run, full=args.full), todo, path, min(args.jobs, len(todo))) if todo else []
        return [row for row in rows if same.items() <= row.items()]

    def publish() -> list[Row]:
        rows = sorted(finished(path), key=lambda row: (row["workload"], row["kind"], row["seed"], row["lr"]))
        ends = (summary([row for row in rows if row["workload"] == workload]) for workload in WORKLOADS)
        rows = [compact(row) for row in (*(end for end in ends if end), *rows)]
        results.write(out / f"{name}.json", command(args), rows, one_line_a_row=True)
        return rows

    for workload in names:  # what L* needs comes first
        optimizer, fresh = WORKLOADS[workload].optimizer, [{"seed": FRESH_SEED + i} for i in range(args.fresh)]
        ranges = RANGES[family][optimizer] if family in RANGES else (GRID_LR, GRID_WD)
        winner = best(sweep_of(workload, "grid", grid(lrs, wds, *ranges)))
        if winner:
            point = {key: winner[key] for key in ("lr", "weight_decay")}
            sweep_of(workload, "fresh", [point | seed for seed in fresh])
        if family == "small":
            point = dict(zip(("lr", "weight_decay"), REFERENCE[optimizer]))
            sweep_of(workload, "untuned", [point | seed for seed in fresh])
        publish()
    for first in range(0, trials, TRIALS_AT_ONCE):
        for workload in names:
            last = min(first + TRIALS_AT_ONCE, trials)
            sweep_of(workload, "random", [trial(i) for i in range(first, last)])
        publish()

    rows = publish()
    print(f"\n{'workload':<24}{'runs':>6}{'best lr':>10}{'best wd':>10}{'L0':>9}{'L*':>9}{'sigma':>10}")
    for row in rows:
        if row["kind"] == "summary":
            runs = sum(other["workload"] == row["workload"] for other in rows) - 1
            print(
                f"{row['workload']:<24}{runs:>6}{row['lr']:>10.2g}{row['weight_decay']:>10.2g}"
                f"{row['l0']:>9.4g}{row['l_star']:>9.4g}{row['sigma']:>10.2g}"
            )
    return rows


if __name__ == "__main__":
    main(parse(Args))
