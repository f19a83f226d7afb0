"""Does it matter where a tuned run starts? Every workload from 5 × 5 starts, tuned with the same defaults.

    python -m experiments.invariance [--workloads mlp_digits diabetes] [--family small] [--seed 1000] [--quick]

A start is (lr, weight decay) from a grid of lr 1e-6 … 10 and weight decay 1e-7 … 0.1; each is run on three seeds. With
the L*, σ and L0 of `pools.json`, the best that a grid of 200 runs finds (see experiments.pools), a workload's summary row has

    excess          the worst start's mean loss over its seeds, less L*
    floor, aim      max(0.06 (L0 − L*), 2σ) and max(0.03 (L0 − L*), 2σ): what that excess may be
    regret          mean loss over all runs, over L*

and the row of all workloads their geometric mean regret. From seed 1000 on these are test losses; on seeds below it, where
variants of the method are chosen, they are validation losses, and the test set is not read.
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
from experiments.pools import GRID_WD, TRIAL_LR, significant, summaries
from experiments.sweep import sweep
from experiments.workloads import WORKLOADS, chosen, train_tuned

Row = dict[str, Any]
UNSEEN = 1000  # the first seed whose test loss is read
FLOOR, AIM, SIGMAS = 0.06, 0.03, 2


@dataclass
class Args:
    """Tune every workload from a grid of starts. Finished runs are kept; call it again to go on."""

    workloads: tuple = arg((), "any of one family (default: the family's)")
    family: str = arg("main", "the workloads that are run without --workloads: main or small")
    starts: int = arg(5, "learning rates, and weight decays, to start from", quick=2)
    seeds: int = arg(3, "runs of each start", quick=1)
    seed: int = arg(0, "the first of the seeds; test losses are read from 1000 on")
    steps: int = arg(0, "training steps of a run; 0: the workload's own", quick=40)
    full: bool = arg(False, "the larger version of each workload")
    jobs: int = arg(os.cpu_count() or 1, "processes, each with one thread", quick=1)
    pools: str = arg("", "folder of pools.json (default: experiments/results)")
    out: str = arg("runs/invariance", "folder of finished runs and result", quick="runs/invariance_quick")
    quick: bool = arg(False, "a few steps from a few starts: a test of the machinery")


def run(item: Row) -> Row:
    """One item of the sweep."""
    task = WORKLOADS[item["workload"]].build(item["seed"], item["full"], item["steps"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # roll-backs are counted
        row = train_tuned(task, item["start_lr"], item["start_weight_decay"])
    if item["seed"] < UNSEEN:
        del row["test"]
    return item | row


def summary(workload: str, rows: list[Row], pool: Row | None) -> Row:
    """One workload's summary row; without a pool, or where a run ended without a number, what needs it is null."""
    unseen = all(row["seed"] >= UNSEEN for row in rows)
    split, prefix = ("test", "") if unseen else ("val", "val_")
    starts: dict[tuple, list[float]] = defaultdict(list)
    for row in rows:
        loss = row[split]
        starts[row["start_lr"], row["start_weight_decay"]].append(math.nan if loss is None else loss)
    means = {start: fmean(losses) for start, losses in starts.items()}
    worst = max(means, key=lambda start: means[start] if math.isfinite(means[start]) else math.inf)
    out = {"workload": workload, "kind": "summary", "split": split, "runs": len(rows), "starts": len(starts)}
    out |= {"start_lr": worst[0], "start_weight_decay": worst[1], "worst": means[worst], "mean": fmean(means.values())}
    out |= {"rollbacks": sum(row["rollbacks"] for row in rows)}
    star, sigma, l0 = (pool[prefix + name] if pool else None for name in ("l_star", "sigma", "l0"))
    numbers = ("l_star", "excess", "floor", "aim", "excess_over_floor", "excess_over_aim", "regret")
    if star is None or sigma is None or l0 is None:
        return out | dict.fromkeys(numbers)
    excess = means[worst] - star
    floor, aim = (max(share * (l0 - star), SIGMAS * sigma) for share in (FLOOR, AIM))
    return out | dict(zip(numbers, (star, excess, floor, aim, excess / floor, excess / aim, out["mean"] / star)))


def overall(rows: list[Row]) -> Row:
    """The row of all workloads; null where one of them has no regret."""
    regrets = [row["regret"] for row in rows]
    known = all(x is not None and math.isfinite(x) for x in regrets)
    return {
        "workload": "all",
        "kind": "overall",
        "split": rows[0]["split"],
        "runs": sum(row["runs"] for row in rows),
        "regret": geometric_mean(regrets) if known else None,
    }


def check(args: Any) -> None:
    """End with what to change where seeds or jobs of an experiment's arguments are wrong."""
    if min(args.seeds, args.jobs) < 1:
        raise SystemExit("--seeds and --jobs are at least 1")
    if args.seed < UNSEEN < args.seed + args.seeds:
        raise SystemExit(f"--seed {args.seed}: seeds are all below {UNSEEN}, or none is")


def main(args: Args) -> list[Row]:
    family, names = chosen(args)
    check(args)
    if args.starts < 1:
        raise SystemExit("--starts is at least 1")
    todo = [
        {
            "workload": name,
            "start_lr": significant(lr),
            "start_weight_decay": significant(wd),
            "seed": seed,
            "steps": WORKLOADS[name].length(args.full, args.steps),
            "full": args.full,
        }
        for name in names
        for seed in range(args.seed, args.seed + args.seeds)
        for lr in np.logspace(*TRIAL_LR, args.starts)
        for wd in np.logspace(*GRID_WD, args.starts)
    ]
    out, file = Path(args.out), results.stem("invariance", family)
    kept = sweep(run, todo, out / f"{file}.jsonl", min(args.jobs, len(todo)))
    rows = [row for item in todo for row in kept if item.items() <= row.items()]

    pools = summaries(Path(args.pools) if args.pools else results.FOLDER, args.full, family)
    ends = [summary(name, [row for row in rows if row["workload"] == name], pools.get(name)) for name in names]
    ends.append(overall(ends))
    rows = [*ends, *({"kind": "run"} | row for row in rows)]
    results.write(out / f"{file}.json", command(args), rows, one_line_a_row=True)

    print(f"\n{ends[0]['split']} losses: the worst start's mean over seeds, of {len(todo)} runs")
    columns = ("l_star", "mean", "worst", "excess", "floor", "aim", "regret")
    print(f"{'workload':<22}" + "".join(f"{name:>9}" for name in columns) + f"{'worst lr, wd':>18}")
    for row in ends[:-1]:
        numbers = "".join(f"{'–' if row[name] is None else format(row[name], '.4g'):>9}" for name in columns)
        print(f"{row['workload']:<22}{numbers}{row['start_lr']:>10.2g}{row['start_weight_decay']:>8.2g}")
    regret = ends[-1]["regret"]
    print(f"geometric mean regret {'– (no pool, or a run without a number)' if regret is None else f'{regret:.4f}'}")
    return rows


if __name__ == "__main__":
    main(parse(Args))
