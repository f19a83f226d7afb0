"""A learning rate schedule learned from a flat one that is 100 times wrong, beside a grid of 200 schedules.

    python -m experiments.learned_schedule [--seed 1000] [--steps 1000] [--quick]

The MLP of the Fashion-MNIST protocol (784-50-10, batch 50, standardised pixels) is trained for `steps` steps of plain SGD; what
counts is the cross-entropy on the 10,000 validation images at the last weights. "grid": lr(x) = peak (1 − x)^power on normalised
time x, 20 peaks × 10 powers. "learned": 9 knots, linear between them, moved in their logarithms by sign steps of
`hypergrad.tune_run` over horizons T/16, T/4 and T; it starts flat, at 1/100 or at 100 times the grid's best flat lr. Every run of
a seed has the same batches, in the grid too. Both winners then train on fresh seeds, which chose nothing. Costs are in plain
runs: a gradient counts 1, a Hessian product 2.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import hypergrad
from experiments import results
from experiments.arguments import arg, command, parse
from experiments.fashion_mnist import BATCH, load, network, whole_loss
from experiments.sweep import sweep
from hypergrad import schedules

PEAKS = tuple(round(float(x), 5) for x in np.geomspace(0.01, 1, 20))
POWERS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
KNOTS = 9
WRONG = {"learned, from lr / 100": 0.01, "learned, from lr × 100": 100.0}
Row = dict[str, Any]


@dataclass
class Args:
    """A learned learning rate schedule on Fashion-MNIST, and a grid of them. Finished runs are kept; call it again to go on."""

    steps: int = arg(1000, "training steps of one run", quick=64)
    seed: int = arg(1000, "seed of the runs that choose")
    fresh: int = arg(5, "fresh seeds for both winners", quick=1)
    outer_steps: int = arg(24, "outer steps of the learned schedule", quick=6)
    outer_lr: float = arg(0.5, "first outer step, in log lr")
    starts: tuple = arg(tuple(WRONG), "any of its default", quick=tuple(WRONG)[:1])
    points: int = arg(200, "points of the grid: the first so many of every so manieth", quick=4)
    data_dir: str = arg(None, "folder of the set's IDX files (default: a cache, Debian's package, download)")
    out: str = arg("runs/learned_schedule", "folder of finished runs and result", quick="runs/learned_schedule_quick")
    quick: bool = arg(False, "a few short runs: a test of the machinery")


@cache
def batches(seed: int, steps: int, examples: int) -> list[Tensor]:
    """Indices of each step: passes over the shuffled training images."""
    draws = torch.Generator().manual_seed(seed)
    out: list[Tensor] = []
    while len(out) < steps:
        out += torch.randperm(examples, generator=draws)[: examples // BATCH * BATCH].split(BATCH)
    return out[:steps]


def run(item: Row, data_dir: str | None) -> Row:
    """One plain run of the grid."""
    began = time.perf_counter()
    row = item | fit(lambda x: item["peak"] * (1 - x) ** item["power"], item["seed"], item["steps"], data_dir)
    return row | {"seconds": round(time.perf_counter() - began, 3)}


def fit(schedule: Callable[[float], float], seed: int, steps: int, data_dir: str | None) -> Row:
    """Train once by torch's SGD with lr = schedule(step/steps)."""
    data = load(data_dir, "cpu")
    model = network(seed, data.train.x)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for step, batch in enumerate(batches(seed, steps, len(data.train.y))):
        optimizer.param_groups[0]["lr"] = schedule(step / steps)
        loss = cross_entropy(model(data.train.x[batch]), data.train.y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    losses = {f"{name}_loss": whole_loss(model, getattr(data, name)) for name in ("val", "test")}
    return losses | {"diverged": not math.isfinite(losses["val_loss"])}


def build(seed: int, horizon: float, steps: int, data_dir: str | None) -> hypergrad.Run:
    """The run, or a shorter one with the whole schedule in it."""
    data, n = load(data_dir, "cpu"), max(1, round(horizon * steps))
    model = network(seed, data.train.x)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

    def loss(model: torch.nn.Module, batch: Tensor) -> Tensor:
        return cross_entropy(model(data.train.x[batch]), data.train.y[batch])

    def val_loss() -> Tensor:
        return cross_entropy(model(data.val.x), data.val.y)

    plan = {"lr": lambda step, hypers: schedules.knots(step / n, hypers["lr_knots"])}
    return hypergrad.Run(model, optimizer, batches(seed, n, len(data.train.y)), loss, val_loss, schedules=plan)


def of_knots(knots: Tensor) -> Callable[[float], float]:
    """lr as a function of normalised time."""
    return lambda x: float(schedules.knots(x, knots))


def learn(args: Args, start: float, folder: Path) -> hypergrad.RunResult:
    """The learned schedule, from a flat one."""
    knots = hypergrad.Hyperparameter(torch.full((KNOTS,), start, dtype=torch.float64), kind="positive")
    return hypergrad.tune_run(
        lambda seed, horizon: build(seed, horizon, args.steps, args.data_dir),
        {"lr_knots": knots},
        outer="sign",
        outer_lr=args.outer_lr,
        outer_steps=args.outer_steps,
        seeds=(args.seed,),
        every=1,
        log_dir=folder,
    )


def main(args: Args) -> list[Row]:
    wrong = [name for name in args.starts if name not in WRONG]
    if wrong:
        raise SystemExit(f"--starts: unknown {', '.join(wrong)}; choose from {', '.join(WRONG)}")
    if min(args.steps, args.fresh, args.points) < 1 or args.outer_steps < 3:
        raise SystemExit("--steps, --fresh and --points are at least 1, --outer-steps 3")
    try:
        load(args.data_dir, "cpu")
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from None
    out, threads = Path(args.out), torch.get_num_threads()
    grid = [dict(zip(("peak", "power"), point)) for point in itertools.product(PEAKS, POWERS)]
    cell = {"method": "grid", "seed": args.seed, "steps": args.steps}
    todo = [cell | point for point in grid[:: len(grid) // args.points][: args.points]]
    kept = sweep(partial(run, data_dir=args.data_dir), todo, out / "learned_schedule.jsonl")
    rows = [row for row in kept if any(item.items() <= row.items() for item in todo)]
    best = min((row for row in rows if not row["diverged"]), key=lambda row: row["val_loss"])
    flat = [row for row in rows if row["power"] == 0 and not row["diverged"]] or [best]
    best_flat = min(flat, key=lambda row: row["val_loss"])["peak"]
    torch.set_num_threads(1)
    try:
        for name in args.starts:
            rows += of_learned(args, name, best_flat * WRONG[name], best["val_loss"])
        rows += on_fresh(args, "grid's winner", lambda x: best["peak"] * (1 - x) ** best["power"])
    finally:
        torch.set_num_threads(threads)
    results.write(out / "learned_schedule.json", command(args), rows, one_line_a_row=True)
    report(rows, best)
    return rows


def of_learned(args: Args, name: str, start: float, bar: float) -> list[Row]:
    """Rows of one learned schedule: each outer step, the result, and the result on fresh seeds."""
    found = learn(args, start, Path(args.out, f"tune_run_{list(WRONG).index(name)}_{args.seed}_{args.steps}"))
    common: Row = {"seed": args.seed, "steps": args.steps}
    path: list[Row] = [
        {"method": "outer step", "start": name}
        | common
        | {key: row[key] for key in ("step", "horizon", "value", "best", "run_equivalents")}
        | flat(row["values"]["lr_knots"])
        for row in found.history
    ]
    whole = [row for row in path if row["horizon"] == 1 and row["value"] is not None]
    reached = next((row["run_equivalents"] for row in whole if row["value"] <= bar), None)
    within = min((row["value"] for row in whole if row["run_equivalents"] <= 40), default=math.nan)
    knots = found.values["lr_knots"]
    result: Row = {"method": "learned", "start": name} | common
    result |= {"start_lr": start, "val_loss": found.value, "val_loss_of_grid": bar} | flat(knots.tolist())
    result |= {"val_loss_within_40": within, "ratio_within_40": within / bar, "run_equivalents": found.run_equivalents}
    result |= {"run_equivalents_to_grid": reached, "gradient_evaluations": found.stats["gradient_evaluations"]}
    result |= {"hessian_products": found.stats["hessian_products"], "stopped": found.stats["stopped"]}
    return [*path, result, *on_fresh(args, name, of_knots(knots))]


def flat(knots: list[float]) -> Row:
    return {f"knot_{i}": x for i, x in enumerate(knots)}


def on_fresh(args: Args, name: str, schedule: Callable[[float], float]) -> list[Row]:
    """A schedule on seeds that chose nothing."""
    seeds = range(args.seed + 1, args.seed + 1 + args.fresh)
    return [
        {"method": "fresh", "start": name, "seed": seed, "steps": args.steps}
        | fit(schedule, seed, args.steps, args.data_dir)
        for seed in seeds
    ]


def report(rows: list[Row], best: Row) -> None:
    print(f"\ngrid: val loss {best['val_loss']:.4f} at peak {best['peak']:g}, power {best['power']:g}")
    for row in rows:
        if row["method"] == "learned":
            print(
                f"{row['start']}: {row['val_loss']:.4f} ({row['run_equivalents']:.1f} plain runs), "
                f"{row['val_loss_within_40']:.4f} within 40, as good as the grid after {row['run_equivalents_to_grid']}"
            )
    for name in dict.fromkeys(row["start"] for row in rows if row["method"] == "fresh"):
        own = [row for row in rows if row["method"] == "fresh" and row["start"] == name]
        means = [np.mean([row[loss] for row in own]) for loss in ("val_loss", "test_loss")]
        print(f"{name}, {len(own)} fresh seeds: val loss {means[0]:.4f}, test loss {means[1]:.4f}")


if __name__ == "__main__":
    main(parse(Args))
