"""A tuner beside the schedulers of torch: from any start, does it end where the best lr under that scheduler does?

    python -m experiments.schedulers [--workloads mlp_digits] [--schedulers StepLR OneCycleLR] [--seed 1000] [--quick]

For every scheduler and workload: the plain run under it from each lr of a grid, and runs tuned with the defaults (lr and weight
decay, `total_steps`) under it from lr 1e-6 and 1e-1; and the same without a scheduler, where the plain run decays linearly to
zero. All have weight decay 1e-4 to start from, and the same seeds. A summary row has, as means over seeds,

    val, best_val            validation loss at the end, tuned from start_lr; of the grid's winner by it, best_lr
    test, best_test          test loss of both, from seed 1000 on
    over_best                test / best_test (val / best_val on seeds below 1000)
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim import lr_scheduler as torchs

import hypergrad
from experiments import results
from experiments.arguments import arg, command, parse
from experiments.invariance import UNSEEN
from experiments.sweep import sweep
from experiments.workloads import WORKLOADS, Task, fit

Row = dict[str, Any]
START_WD = 1e-4
STARTS = (1e-6, 1e-1)
GRID = tuple(float(f"{10 ** (k / 2):.3g}") for k in range(-8, 2))  # 1e-4 … 3.16
VALIDATIONS = 20  # of ReduceLROnPlateau in a run


def _warm_up_then_cosine(t: int, total: int) -> float:
    """The factor of Hugging Face's get_cosine_schedule_with_warmup, over 5 % of the steps."""
    warm_up = max(total // 20, 1)
    return t / warm_up if t < warm_up else 0.5 * (1 + math.cos(math.pi * (t - warm_up) / (total - warm_up)))


def _sequential(opt: Optimizer, total: int) -> torchs.LRScheduler:
    warm_up = max(total // 20, 1)
    parts = [torchs.LinearLR(opt, 0.01, total_iters=warm_up), torchs.CosineAnnealingLR(opt, total - warm_up)]
    return torchs.SequentialLR(opt, parts, milestones=[warm_up])


SCHEDULERS: dict[str, Callable[[Optimizer, int], torchs.LRScheduler]] = {
    "none": lambda opt, total: torchs.LinearLR(opt, 1.0, 0.0, total_iters=total),  # of the plain runs
    "StepLR": lambda opt, total: torchs.StepLR(opt, max(total // 4, 1), 0.3),
    "MultiStepLR": lambda opt, total: torchs.MultiStepLR(opt, [total // 2, 3 * total // 4], 0.1),
    "CosineAnnealingLR": lambda opt, total: torchs.CosineAnnealingLR(opt, total),
    "CosineAnnealingWarmRestarts": lambda opt, total: torchs.CosineAnnealingWarmRestarts(opt, max(total // 3, 1)),
    "OneCycleLR": lambda opt, total: torchs.OneCycleLR(
        opt, [group["lr"] for group in opt.param_groups], total_steps=total + 1, cycle_momentum=False
    ),
    "LambdaLR": lambda opt, total: torchs.LambdaLR(opt, partial(_warm_up_then_cosine, total=total)),
    "SequentialLR": _sequential,
    "ReduceLROnPlateau": lambda opt, total: torchs.ReduceLROnPlateau(opt, factor=0.3, patience=2),
}


@dataclass
class Args:
    """Train under every scheduler, plain and tuned. Finished runs are kept; call it again to go on."""

    workloads: tuple = arg(
        ("logistic_fashion", "mlp_digits", "cnn_mnist1d"), "any of the workloads", quick=("mlp_digits",)
    )
    schedulers: tuple = arg(tuple(SCHEDULERS), "any of them", quick=("none", "OneCycleLR"))
    seeds: int = arg(2, "runs of each", quick=1)
    seed: int = arg(0, "the first of the seeds; test losses are read from 1000 on")
    steps: int = arg(0, "training steps of a run; 0: the workload's own", quick=40)
    jobs: int = arg(os.cpu_count() or 1, "processes, each with one thread", quick=1)
    out: str = arg("runs/schedulers", "folder of finished runs and result", quick="runs/schedulers_quick")
    quick: bool = arg(False, "a few steps of one workload: a test of the machinery")


def items(args: Args) -> list[Row]:
    return [
        {
            "scheduler": scheduler, "workload": workload, "seed": seed, "kind": kind, "start_lr": lr,
            "steps": WORKLOADS[workload].length(False, args.steps),
        }
        for seed in range(args.seed, args.seed + args.seeds)
        for scheduler in args.schedulers
        for workload in args.workloads
        for kind, lrs in (("tuned", STARTS), ("plain", GRID))
        for lr in lrs
    ]  # fmt: skip


def run(item: Row) -> Row:
    """One item of the sweep."""
    task = WORKLOADS[item["workload"]].build(item["seed"], False, item["steps"])
    optimizers, tuned = task.make_optimizers(item["start_lr"], START_WD), item["kind"] == "tuned"
    beside = () if tuned and item["scheduler"] == "none" else optimizers
    schedulers = [SCHEDULERS[item["scheduler"]](opt, task.steps) for opt in beside]
    backward, ends = Tensor.backward, {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuner = None
        if tuned:
            tuner = hypergrad.Tuner(task.model, optimizers, task.val_loss, total_steps=task.steps, seed=task.seed)
            backward = tuner.backward
        row = fit(task, optimizers, backward, _stepping(task, schedulers), to_the_end=tuned)
        if tuner is not None:
            ends = {f"end_{name}": x.log().mean().exp().item() for name, x in tuner.values.items()}
    return item | {name: x for name, x in (row | ends).items() if name != "test" or item["seed"] >= UNSEEN}


def _stepping(task: Task, schedulers: list[torchs.LRScheduler]) -> Callable[[], None]:
    """What a loop does with its schedulers after a step."""
    t, every = 0, max(task.steps // VALIDATIONS, 1)

    def after_step() -> None:
        nonlocal t
        t += 1
        for scheduler in schedulers:
            if not isinstance(scheduler, torchs.ReduceLROnPlateau):
                scheduler.step()
            elif t % every == 0:
                scheduler.step(task.evaluate("val"))

    return after_step


def summarised(args: Args, rows: list[Row]) -> list[Row]:
    """A row for each scheduler, workload and start."""
    wanted = items(args)
    rows = [row for row in rows if any(item.items() <= row.items() for item in wanted)]
    out = []
    for scheduler in args.schedulers:
        for workload in args.workloads:
            mine = [row for row in rows if row["scheduler"] == scheduler and row["workload"] == workload]
            plain = {lr: _mean(mine, "plain", lr, "val") for lr in GRID}
            best = min(GRID, key=lambda lr: _or_infinity(plain[lr]))
            field = "test" if args.seed >= UNSEEN else "val"
            for lr in STARTS:
                row = {
                    "scheduler": scheduler,
                    "workload": workload,
                    "start_lr": lr,
                    "runs": args.seeds,
                    "best_lr": best,
                }
                for name in ("val", "test"):
                    row |= {name: _mean(mine, "tuned", lr, name), f"best_{name}": _mean(mine, "plain", best, name)}
                row["end_lr"] = _mean(mine, "tuned", lr, "end_lr")
                one, other = row[field], row[f"best_{field}"]
                out.append(row | {"over_best": None if one is None or other is None else one / other})
    return out


def _mean(rows: list[Row], kind: str, lr: float, field: str) -> float | None:
    values = [row.get(field) for row in rows if row["kind"] == kind and row["start_lr"] == lr]
    found = [x for x in values if x is not None and math.isfinite(x)]
    return fmean(found) if found and len(found) == len(values) else None


def _or_infinity(x: float | None) -> float:
    return math.inf if x is None else x


def main(args: Args) -> None:
    for name in args.schedulers:
        if name not in SCHEDULERS:
            raise ValueError(f"no scheduler {name!r}: choose from {', '.join(SCHEDULERS)}.")
    out = Path(args.out)
    rows = summarised(args, sweep(run, items(args), out / "schedulers.jsonl", args.jobs))
    results.write(out / "schedulers.json", command(args), rows, one_line_a_row=True)
    for row in rows:
        over = "–" if row["over_best"] is None else f"{row['over_best']:.3f}"
        print(
            f"{row['scheduler']:30s}{row['workload']:20s}{row['start_lr']:8.0e}{over:>8s} of the best lr, {row['best_lr']:g}"
        )


if __name__ == "__main__":
    main(parse(Args))
