"""Is a tuner's recipe worth pasting? The plain run by `tuner.recipe()` over the tuned run that it is from.

    python -m experiments.recipe [--workloads mlp_digits] [--seed 0] [--quick]

Every workload is tuned with the defaults (lr and weight decay, `total_steps`) from lr 1e-6 and 1e-1, weight decay 1e-4. Then the
same workload, same seed, is trained plainly by the optimizer and scheduler that the printed recipe makes. A run's row has

    val, plain_val           validation loss at the end: tuned, and plain by the recipe; test, plain_test from seed 1000 on
    over_tuned               plain_val / val; null where either has no number
    lr, weight_decay         the recipe's, geometric means over param groups
    doubts                   how many things the recipe says against itself

A workload's summary row has the geometric mean of over_tuned, the row of all workloads that of theirs (`over_tuned`), their
`median`, the worst (`worst`, `worst_workload`), and how many runs have no number (`lost`); `undoubted` is the mean over runs
without a doubt. Where seeds are from 1000 on the same of test losses stands beside it (`test_over_tuned`).
"""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from torch import Tensor

import hypergrad
from experiments import results
from experiments.arguments import arg, command, parse
from experiments.invariance import UNSEEN
from experiments.sweep import sweep
from experiments.workloads import COMPARED, WORKLOADS, Task, fit

Row = dict[str, Any]
STARTS = (1e-6, 1e-1)
START_WD = 1e-4


@dataclass
class Args:
    """Tune, and train plainly by the recipe. Finished runs are kept; call it again to go on."""

    workloads: tuple = arg(COMPARED, "any of the workloads", quick=("mlp_digits", "diabetes"))
    seeds: int = arg(3, "runs of each start", quick=1)
    seed: int = arg(0, "the first of the seeds; test losses are read from 1000 on")
    steps: int = arg(0, "training steps of a run; 0: the workload's own", quick=40)
    jobs: int = arg(os.cpu_count() or 1, "processes, each with one thread", quick=1)
    out: str = arg("runs/recipe", "folder of finished runs and result", quick="runs/recipe_quick")
    quick: bool = arg(False, "a few steps of two workloads: a test of the machinery")


def items(args: Args) -> list[Row]:
    return [
        {"workload": name, "seed": seed, "start_lr": lr, "steps": WORKLOADS[name].length(False, args.steps)}
        for seed in range(args.seed, args.seed + args.seeds)
        for name in args.workloads
        for lr in STARTS
    ]


def run(item: Row) -> Row:
    """One item of the sweep: a tuned run and a plain one."""
    made = WORKLOADS[item["workload"]]
    task = made.build(item["seed"], False, item["steps"])
    optimizers = task.make_optimizers(item["start_lr"], START_WD)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what happened is in the recipe's doubts
        tuner = hypergrad.Tuner(task.model, optimizers, task.val_loss, total_steps=task.steps, seed=task.seed)
        tuned = fit(task, optimizers, tuner.backward, to_the_end=True)
        recipe = tuner.recipe()
    tuner.close()
    plain = by_recipe(made.build(item["seed"], False, item["steps"]), str(recipe))
    groups = [group for each in recipe.optimizers for group in each.groups]
    row = item | {"val": tuned["val"], "plain_val": plain["val"], "over_tuned": over(plain["val"], tuned["val"])}
    row |= {name: math.exp(fmean(math.log(g[name]) for g in groups)) for name in ("lr", "weight_decay")}
    row |= {"doubts": len(recipe.doubts), "seconds": tuned["seconds"], "plain_seconds": plain["seconds"]}
    if item["seed"] >= UNSEEN:
        row |= {
            "test": tuned["test"],
            "plain_test": plain["test"],
            "test_over_tuned": over(plain["test"], tuned["test"]),
        }
    return row


def by_recipe(task: Task, code: str) -> Row:
    """A plain run of what the code makes."""
    optimizers = task.make_optimizers(1.0, 0.0)  # for their param groups
    names: Row = {"model": task.model, "groups": [group["params"] for opt in optimizers for group in opt.param_groups]}
    exec(code, names)
    ends = [""] if len(optimizers) == 1 else [f"_{i + 1}" for i in range(len(optimizers))]

    def after_step() -> None:
        for end in ends:
            names[f"scheduler{end}"].step()

    return fit(task, [names[f"optimizer{end}"] for end in ends], Tensor.backward, after_step)


def over(plain: float, tuned: float) -> float | None:
    return plain / tuned if math.isfinite(plain) and math.isfinite(tuned) else None


def mean(values: list[float | None]) -> float | None:
    """The geometric mean of those that are there."""
    found = [math.log(x) for x in values if x is not None]
    return math.exp(fmean(found)) if found else None


def summarised(rows: list[Row], names: tuple[str, ...]) -> list[Row]:
    """The row of all workloads, and one of each."""
    fields = [name for name in ("over_tuned", "test_over_tuned") if all(name in row for row in rows)]
    out = []
    for name in names:
        mine = [row for row in rows if row["workload"] == name]
        means = {field: mean([row[field] for row in mine]) for field in fields}
        lost = sum(row["over_tuned"] is None for row in mine)
        out.append({"kind": "summary", "workload": name, "runs": len(mine), **means, "lost": lost})
    known = [row for row in out if row["over_tuned"] is not None]
    worst = max(known, key=lambda row: row["over_tuned"], default=None)
    whole = {
        "kind": "overall",
        "workload": "all",
        "runs": len(rows),
        **{field: mean([row[field] for row in out]) for field in fields},
        "undoubted": mean([row["over_tuned"] for row in rows if not row["doubts"]]),
        "undoubted_runs": sum(not row["doubts"] for row in rows),
        "median": median(row["over_tuned"] for row in known) if known else None,
        "worst": worst and worst["over_tuned"],
        "worst_workload": worst and worst["workload"],
        "lost": sum(row["lost"] for row in out),
    }
    return [whole, *out]


def main(args: Args) -> list[Row]:
    for name in args.workloads:
        if name not in WORKLOADS:
            raise SystemExit(f"--workloads: unknown {name}; choose from {', '.join(WORKLOADS)}")
    if args.seed < UNSEEN < args.seed + args.seeds:
        raise SystemExit(f"--seed and --seeds: all below {UNSEEN}, or all from it on")
    todo, out = items(args), Path(args.out)
    kept = sweep(run, todo, out / "recipe.jsonl", min(args.jobs, len(todo)))
    rows = [row for item in todo for row in kept if item.items() <= row.items()]
    ends = summarised(rows, args.workloads)
    rows = [*ends, *({"kind": "run"} | row for row in rows)]
    results.write(out / "recipe.json", command(args), rows, one_line_a_row=True)
    print("validation loss of the plain run by the recipe over that of the tuned run")
    for row in ends:
        shown = "–" if row["over_tuned"] is None else f"{row['over_tuned']:.3f}"
        print(f"{row['workload']:24s}{row['runs']:4d} runs{shown:>9s}{row['lost']:4d} lost")
    print(
        f"worst {ends[0]['worst_workload']}; mean of the {ends[0]['undoubted_runs']} runs without a doubt {ends[0]['undoubted']}"
    )
    return rows


if __name__ == "__main__":
    main(parse(Args))
