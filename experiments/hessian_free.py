"""What tuning without Hessian products loses: every workload tuned with exact tangents, with curvature="free", and not at all.

    python -m experiments.hessian_free [--workloads mlp_digits diabetes] [--family small] [--seed 1000] [--quick]

    exact    the tuner's defaults
    free     curvature="free": one product in 40 gradients, a validation gradient every 20 steps
    start    the same without a hyperparameter step: what the warm start finds, kept to the end

Each form runs from the same starts (lr from 1e-6 … 10, weight decay from 1e-7 … 0.1) with the same seeds. A summary row has the
mean loss over L* of `pools.json` (see experiments.pools), and the cost: gradient evaluations over those of a plain run, mean
and largest. The row of all workloads has the geometric mean of the former. Test losses from seed 1000 on, else validation losses.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from experiments import results
from experiments.arguments import arg, command, parse
from experiments.invariance import UNSEEN, overall, summary
from experiments.pools import GRID_WD, TRIAL_LR, significant, summaries
from experiments.sweep import sweep
from experiments.workloads import WORKLOADS, chosen, train_tuned

Row = dict[str, Any]
FORMS = {"exact": {}, "free": {"curvature": "free"}, "start": {"curvature": "free"}}
KEPT = ("form", "workload", "kind", "split", "runs", "starts", "mean", "worst", "rollbacks", "l_star", "regret")


@dataclass
class Args:
    """Tune every workload in every form. Finished runs are kept; call it again to go on."""

    workloads: tuple = arg((), "any of one family (default: the family's)")
    family: str = arg("main", "the workloads that are run without --workloads: main or small")
    starts: int = arg(2, "learning rates, and weight decays, to start from", quick=1)
    seeds: int = arg(2, "runs of each start", quick=1)
    seed: int = arg(0, "the first of the seeds; test losses are read from 1000 on")
    steps: int = arg(0, "training steps of a run; 0: the workload's own", quick=60)
    jobs: int = arg(os.cpu_count() or 1, "processes, each with one thread", quick=1)
    pools: str = arg("", "folder of pools.json (default: experiments/results)")
    out: str = arg("runs/hessian_free", "folder of finished runs and result", quick="runs/hessian_free_quick")
    quick: bool = arg(False, "a few steps from one start: a test of the machinery")


def run(item: Row) -> Row:
    """One item of the sweep."""
    task = WORKLOADS[item["workload"]].build(item["seed"], steps=item["steps"])
    options = FORMS[item["form"]] | ({"every": task.steps} if item["form"] == "start" else {})  # no step but the last
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # roll-backs are counted
        row = train_tuned(task, item["start_lr"], item["start_weight_decay"], **options)
    if item["seed"] < UNSEEN:
        del row["test"]
    return item | row


def costs(rows: list[Row]) -> Row:
    """Gradient evaluations over those of a plain run."""
    each = [row["gradient_evaluations"] / row["steps"] for row in rows]
    return {"cost": fmean(each), "largest_cost": max(each)}


def main(args: Args) -> list[Row]:
    family, names = chosen(args)
    if min(args.starts, args.seeds, args.jobs) < 1 or args.steps < 0:
        raise SystemExit("--starts, --seeds and --jobs are at least 1, --steps at least 0")
    if args.seed < UNSEEN < args.seed + args.seeds:
        raise SystemExit(f"--seed {args.seed}: seeds are all below {UNSEEN}, or none is")
    todo = [
        {
            "workload": name,
            "form": form,
            "start_lr": significant(lr),
            "start_weight_decay": significant(wd),
            "seed": seed,
            "steps": WORKLOADS[name].length(False, args.steps),
        }
        for name in names
        for seed in range(args.seed, args.seed + args.seeds)
        for lr in np.logspace(*TRIAL_LR, args.starts)
        for wd in np.logspace(*GRID_WD, args.starts)
        for form in FORMS
    ]
    out, file = Path(args.out), results.stem("hessian_free", family)
    kept = sweep(run, todo, out / f"{file}.jsonl", min(args.jobs, len(todo)))
    rows = [row for item in todo for row in kept if item.items() <= row.items()]

    pools, ends = summaries(Path(args.pools) if args.pools else results.FOLDER, family=family), []
    for form in FORMS:
        of_form = [row for row in rows if row["form"] == form]
        each = []
        for name in names:
            mine = [row for row in of_form if row["workload"] == name]
            each.append(summary(name, mine, pools.get(name)) | {"form": form} | costs(mine))
        each.append(overall(each) | {"form": form} | costs(of_form))
        ends += [{key: row[key] for key in (*KEPT, "cost", "largest_cost") if key in row} for row in each]
    rows = [*ends, *({"kind": "run"} | row for row in rows)]
    results.write(out / f"{file}.json", command(args), rows, one_line_a_row=True)

    print(f"\n{ends[0]['split']} loss over L*, and gradient evaluations over those of a plain run")
    print(f"{'workload':<22}" + "".join(f"{form:>9}{'cost':>8}" for form in FORMS))
    for name in (*names, "all"):
        cells = (row for row in ends if row["workload"] == name)
        shown = (
            f"{'–' if row['regret'] is None else format(row['regret'], '.4f'):>9}{row['cost']:>8.3f}" for row in cells
        )
        print(f"{name:<22}" + "".join(shown))
    return rows


if __name__ == "__main__":
    main(parse(Args))
