"""Fashion-MNIST from a hundred blind starts: the protocol of Clarke et al., ICLR 2022 (arXiv 2110.10461), section 4.2.

    python -m experiments.fashion_mnist [--starts 100] [--methods grid untuned tuned] [--replay] [--quick]

An MLP 784-50-10 is trained by SGD for 10,000 steps of 50 images from a random learning rate, weight decay and momentum.
Each start is one row: how the same start ends untuned, and tuned by hypergrad while it trains. Three losses, each the
cross-entropy on the whole test set after the last step:

    test_loss            at the model's own weights
    averaged_test_loss   at their running average, of which a tuner has one
    replay_test_loss     with --replay: of a model trained anew, from the same seed, by plain SGD on training and validation
                         images together, each step with the lr, weight decay and momentum that this run took it with

The bar for each is "grid": 48 settings with lr decaying linearly to zero, the best by validation loss ("winner") on ten seeds
that chose nothing, its weights averaged by the tuner's rule, and itself on training and validation images. `fashion_mnist.json`
has a row for every run, `fashion_mnist_paths.json` what lr, weight decay and momentum were along the tuned ones.

`--methods clarke` is the protocol's own method (clarke.py).
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hypergrad
from experiments import datasets, flops, grid, results
from experiments.arguments import arg, command, parse
from experiments.clarke import LookBack
from experiments.sweep import sweep
from hypergrad.online.weight_average import SHARE

METHODS: dict[str, dict[str, Any]] = {
    "grid": {"decay": True, "average": True},
    "winner": {"decay": True, "average": True},
    "untuned": {},
    "untuned_decay": {"decay": True},
    "tuned": {"tune": ("lr", "weight_decay")},
    "tuned_lr": {"tune": ("lr",)},
    "tuned_momentum": {"tune": ("lr", "weight_decay", "momentum")},
    "clarke": {"look_back": ("lr", "weight_decay")},
    "clarke_momentum": {"look_back": ("lr", "weight_decay", "momentum")},
}
CHOICES = tuple(name for name in METHODS if name != "winner")  # "grid" runs that too
GRID = {
    "lr": (0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
    "momentum": (0.0, 0.9),
    "weight_decay": (3e-4, 1e-3, 3e-3, 1e-2),
}
FRESH_SEEDS = range(1001, 1011)
EVERY = 11  # the odd number from a tuner's default on
LOSSES = "test_loss", "averaged_test_loss", "replay_test_loss"
BATCH, VAL_BATCH = 50, 250
VALUES = "lr", "weight_decay", "momentum"
KEY = "method", "seed", "steps", "device", *GRID  # of a row
POINTS, DIGITS = 60, 4  # of a path: about so many, of so many digits
Row = dict[str, Any]
Values = dict[str, Any]  # name → number, as in a param group


@dataclass
class Args:
    """Fashion-MNIST from random starts, untuned and tuned online. Finished starts are kept; call it again to go on."""

    methods: tuple = arg(("grid", "untuned", "untuned_decay", "tuned"), f"any of {', '.join(CHOICES)}")
    starts: int = arg(16, "random starts of each method", quick=1)
    seed: int = arg(0, "seed of the first start; the next ones count up from it")
    steps: int = arg(10_000, "training steps of one run", quick=200)
    replay: bool = arg(False, "a plain run more for each tuned one and the grid's winner: replay_test_loss")
    jobs: int = arg(os.cpu_count() or 1, "processes, each with one thread")
    device: str = arg("cpu", "where to train: cpu or cuda")
    data_dir: str = arg(None, "folder of the set's IDX files (default: a cache, Debian's package, download)")
    out: str = arg("runs/fashion_mnist", "folder of finished starts and result", quick="runs/fashion_mnist_quick")
    quick: bool = arg(False, "one short start of each method: a test of the machinery, under a minute")


class Fit(NamedTuple):
    """A trained model, what the run was and cost, and what it leaves behind."""

    model: nn.Module
    row: Row
    average: nn.Module | None  # the model at the running average of its weights, of runs that have one
    values: list[Values]  # lr, weight decay and momentum of every step, as the optimizer took it


def start(seed: int) -> Values:
    """The protocol's distribution of starts."""
    rng = np.random.default_rng(seed)
    return {
        "lr": float(10 ** rng.uniform(-6, -1)),
        "weight_decay": float(10 ** rng.uniform(-7, -2)),
        "momentum": float(rng.uniform(0, 1)),
    }


def network(seed: int, like: Tensor) -> nn.Module:
    """The untrained model of that seed, from which on torch's random numbers are that seed's."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(like.shape[1], 50), nn.ReLU(), nn.Linear(50, 10)).to(like.device)


def fit(data: datasets.Data, method: str, seed: int, steps: int, hyper: Values | None = None) -> Fit:
    """Train once from ``hyper``, by default the start of that seed."""
    options, hyper = METHODS[method], hyper or start(seed)
    device = data.train.x.device
    model = network(seed, data.train.x)
    optimizer = torch.optim.SGD(model.parameters(), **hyper)
    draws = torch.Generator(device).manual_seed(seed)

    def val_loss() -> Tensor:
        picked = torch.randint(len(data.val.y), (VAL_BATCH,), generator=draws, device=device)
        return cross_entropy(model(data.val.x[picked]), data.val.y[picked])

    def training_loss(model: nn.Module, batch: Tensor) -> Tensor:
        return cross_entropy(model(data.train.x[batch]), data.train.y[batch])

    tuner = rival = plan = average = None
    if "tune" in options:
        tuner = hypergrad.Tuner(
            model, optimizer, val_loss, tune=options["tune"], total_steps=steps, every=10, hyper_lr=0.1, seed=seed
        )
    if "look_back" in options:
        rival = LookBack(model, optimizer, training_loss, val_loss, tune=options["look_back"], seed=seed)
    if options.get("decay"):
        plan = lambda step: {"lr": hyper["lr"] * (1 - step / steps)}  # noqa: E731
    if options.get("average"):
        average = copy.deepcopy(model)

    began = time.perf_counter()
    backward = tuner.backward if tuner else Tensor.backward
    values = train(data.train, model, optimizer, steps, backward, plan, average, rival)
    row: Row = {f"start_{name}": value for name, value in hyper.items()}
    tuning = tuner or rival
    ended = {name: values.item() for name, values in tuning.values.items()} if tuning else {}
    row |= {f"end_{name}": ended.get(name, value) for name, value in hyper.items()}
    row["gradient_evaluations"] = flops.gradient_evaluations(tuning.stats) if tuning else steps
    row["seconds"] = round(time.perf_counter() - began, 3)
    if tuner:
        with tuner.averaged():
            average = copy.deepcopy(model)
        tuner.close()
    return Fit(model, row, average, values)


def replay(data: datasets.Data, seed: int, values: list[Values]) -> nn.Module:
    """Train anew on training and validation images, by plain SGD with the values of each step given."""
    both = datasets.Split(*(torch.cat(parts) for parts in zip(data.train, data.val)))
    model = network(seed, both.x)
    train(both, model, torch.optim.SGD(model.parameters(), **values[0]), len(values), plan=values.__getitem__)
    return model


def train(
    split: datasets.Split,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    backward: Callable[[Tensor], Any] = Tensor.backward,
    plan: Callable[[int], Values] | None = None,
    average: nn.Module | None = None,
    rival: LookBack | None = None,
) -> list[Values]:
    """Steps on shuffled batches of ``split``. Returns the values that each was taken with.

    Args:
        plan: step → values it is to be taken with.
        average: a copy of ``model``, made to follow its weights.
        rival: tunes the optimizer's values as the loop goes on.
    """
    group, device, per_epoch = optimizer.param_groups[0], split.x.device, len(split.y) // BATCH
    used, order = [], torch.empty(0)
    for step in range(steps):
        at = step % per_epoch * BATCH
        if at == 0:
            order = torch.randperm(len(split.y), device=device)
        if plan:
            group.update(plan(step))
        if average:
            follow(average, model, step, steps)
        batch = order[at : at + BATCH]
        if rival:
            rival.look(batch)
        loss = cross_entropy(model(split.x[batch]), split.y[batch])
        optimizer.zero_grad()
        backward(loss)
        optimizer.step()
        used.append({name: group[name] for name in VALUES})
        if rival:
            rival.move()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return used


# θ̄ ← θ̄ + a (θ − θ̄), a = 1/(share of the steps so far), before every step; in the last tenth, where nothing is tuned, before one
# in EVERY with a EVERY times as large: as in WeightAverage.follow
@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, step: int, steps: int) -> None:
    every = EVERY if step >= 0.9 * steps else 1
    if step % every:
        return
    a = min(1.0, every / (SHARE * (step + 1)))
    for mean, p in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(p, a)


@torch.no_grad()
def whole_loss(model: nn.Module, split: datasets.Split) -> float:
    """Mean cross-entropy of all of ``split`` at the model's own weights."""
    return cross_entropy(model(split.x), split.y).item()


@cache
def load(data_dir: str | None, device: str) -> datasets.Data:
    return datasets.fashion_mnist(data_dir).to(device)


@cache
def flops_ratio(method: str, steps: int, data_dir: str | None, device: str) -> float:
    """FLOPs of a tuned run over those of the plain one; see flops.whole_run."""
    if not {"tune", "look_back"} & METHODS[method].keys():
        return 1.0
    data = load(data_dir, device)
    tuned, plain = (flops.whole_run(partial(fit, data, name, 0), steps) for name in (method, "untuned"))
    return tuned / plain


def run(item: Row, data_dir: str | None) -> Row:
    """One item of the sweep: its row is the item's own fields, then what was measured."""
    data = load(data_dir, item["device"])
    hyper = {name: item[name] for name in VALUES} if "lr" in item else None
    model, row, average, values = fit(data, item["method"], item["seed"], item["steps"], hyper)
    row |= {"val_loss": whole_loss(model, data.val), "test_loss": (test_loss := whole_loss(model, data.test))}
    if average:
        row |= {f"averaged_{name}_loss": whole_loss(average, getattr(data, name)) for name in ("val", "test")}
    if item.get("replay"):
        began = time.perf_counter()
        again = replay(data, item["seed"], values)
        row["replay_seconds"] = round(time.perf_counter() - began, 3)
        row["replay_test_loss"] = whole_loss(again, data.test)
    if "tune" in METHODS[item["method"]]:
        row["path"] = path([hyper or start(item["seed"]), *values])
    row = item | row | {"diverged": not math.isfinite(test_loss)}
    return row | {"flops_ratio": flops_ratio(item["method"], item["steps"], data_dir, item["device"])}


def path(values: list[Values]) -> list[list[float]]:
    """Points [step, lr, weight decay, momentum]; step 0 is the start, and half of the steps crowd there."""
    last = len(values) - 1
    steps = np.r_[0, np.linspace(1, last, POINTS // 2), np.geomspace(1, last, POINTS // 2)]
    steps = np.unique(steps.round().astype(int))
    return [[int(step), *(float(f"{values[step][name]:.{DIGITS}g}") for name in VALUES)] for step in steps]


def publish(args: Args, rows: list[Row]) -> list[Row]:
    """Write both result files; returns the rows of the first. A run made again with its replay takes the place of the other."""
    rows = list({tuple(row.get(name) for name in KEY): row for row in rows}.values())
    rows.sort(key=lambda row: tuple(row.get(name, 0) for name in KEY))
    points: list[Row] = [
        dict(zip(("method", "seed", "step", *VALUES), (row["method"], row["seed"], *point)))
        for row in rows
        for point in row.pop("path", [])
        if row["steps"] == args.steps
    ]
    out, made_by = Path(args.out), command(args)
    results.write(out / "fashion_mnist.json", made_by, rows, args.device)
    if points:
        results.write(out / "fashion_mnist_paths.json", made_by, points, args.device, one_line_a_row=True)
    return rows


def main(args: Args) -> list[Row]:
    unknown = [name for name in args.methods if name not in CHOICES]
    if unknown:
        raise SystemExit(f"--methods: unknown {', '.join(unknown)}; choose from {', '.join(CHOICES)}")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("--device cuda: this machine has no GPU that torch can use; leave --device away")
    if min(args.starts, args.steps, args.jobs) < 1:
        raise SystemExit("--starts, --steps and --jobs are at least 1")
    try:
        datasets.find_fashion_mnist(args.data_dir)
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from None

    again = {"replay": True} if args.replay else {}
    kept, do = Path(args.out, "fashion_mnist.jsonl"), partial(run, data_dir=args.data_dir)
    cell = {"steps": args.steps, "device": args.device}
    if "grid" in args.methods:
        fresh = [{"seed": seed} | again for seed in FRESH_SEEDS]
        grid.measure(do, [cell], GRID, "val_loss", fresh, kept, args.jobs)
    todo = [
        cell | {"method": method, "seed": seed} | (again if "tune" in METHODS[method] else {})
        for seed in range(args.seed, args.seed + args.starts)
        for method in args.methods
        if method != "grid"
    ]
    rows = publish(args, sweep(do, todo, kept, min(args.jobs, len(todo))))
    report(args, rows)
    return rows


def report(args: Args, rows: list[Row]) -> None:
    print(
        f"\n{'method':<16}{'runs':>6}{'test loss: mean':>18}{'median':>9}{'best':>9}{'worst':>9}{'NaN':>5}{'flops':>8}"
    )
    for method in METHODS:
        own = [row for row in rows if (row["method"], row["steps"]) == (method, args.steps)]
        for loss in LOSSES:
            having = [row for row in own if loss in row]
            if having:
                ended = sorted(row[loss] for row in having if row[loss] is not None) or [math.nan]
                numbers = (np.mean(ended), np.median(ended), ended[0], ended[-1])
                name = method if loss == "test_loss" else f"  {loss.split('_')[0]}"
                nan, flops_ratio = sum(row[loss] is None for row in having), own[0]["flops_ratio"]
                print(
                    f"{name:<16}{len(having):>6}{numbers[0]:>18.4g}{''.join(f'{x:>9.4g}' for x in numbers[1:])}{nan:>5}"
                    f"{flops_ratio:>7.2f}x"
                )
    print(f"\nNaN are left out of the means. {Path(args.out) / 'fashion_mnist.json'}")


if __name__ == "__main__":
    main(parse(Args))
