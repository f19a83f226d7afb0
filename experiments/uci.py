"""UCI regression from blind starts: the protocol of Clarke et al., ICLR 2022 (arXiv 2110.10461), section 4.1.

    python -m experiments.uci --data-dir FOLDER [--starts 200] [--methods grid untuned tuned] [--quick]

An MLP d-50-1 is trained on all training rows at once (full batch) for 4000 steps of SGD with momentum and L2 weight decay, on
inputs and outputs standardised by training and validation rows; errors are mean squared errors in original units, at the
model's own last weights. Starts are those of the Fashion-MNIST protocol. The bar that tuned runs are held against is
"grid": 48 settings of lr × momentum × weight decay with lr decaying linearly to zero, the best of them by validation error, and
the mean test error of that one ("winner") over 10 seeds that chose nothing. `ratio` is a run's test error over the bar;
`val_ratio` the same of validation errors, by which variants of a method are to be chosen.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import hypergrad
from experiments import datasets, flops, grid, results
from experiments.arguments import arg, command, parse
from experiments.fashion_mnist import start
from experiments.sweep import sweep

METHODS: dict[str, dict[str, Any]] = {
    "grid": {"decay": True},
    "winner": {"decay": True},
    "untuned": {},
    "untuned_decay": {"decay": True},
    "tuned": {"tune": ("lr", "weight_decay")},
    "tuned_momentum": {"tune": ("lr", "weight_decay", "momentum")},
}
GRID = {
    "lr": tuple(round(float(lr), 6) for lr in np.geomspace(1e-3, 1, 6)),
    "momentum": (0.0, 0.9),
    "weight_decay": (1e-5, 1e-4, 1e-3, 1e-2),
}
HIDDEN, FRESH_SEEDS = 50, range(1, 11)
Row = dict[str, Any]


@dataclass
class Args:
    """UCI regression from random starts, untuned and tuned online. Finished runs are kept; call it again to go on."""

    methods: tuple = arg(("grid", "untuned", "untuned_decay", "tuned", "tuned_momentum"), "any of its default")
    sets: tuple = arg(datasets.UCI_SETS, "data sets")
    starts: int = arg(200, "random starts of each set and method", quick=1)
    seed: int = arg(0, "seed of the first start; the next ones count up from it")
    steps: int = arg(4000, "training steps of one run", quick=100)
    jobs: int = arg(os.cpu_count() or 1, "processes, each with one thread")
    data_dir: str = arg("data/uci", f"folder of {', '.join(f'{name}.npz' for name in datasets.UCI_SETS)}")
    out: str = arg("runs/uci", "folder of finished runs and results", quick="runs/uci_quick")
    quick: bool = arg(False, "the grid and one start of each method, all short: a test of the machinery")


class MLP(nn.Module):
    """An MLP d-50-1 with ReLU and torch's default initialisation, on columns: x is [d, n].

    With examples along the contiguous dimension the biases' gradients are sums of rows: a step on thousands of examples takes a
    third less time than with `nn.Sequential` on [n, d].
    """

    def __init__(self, inputs: int):
        super().__init__()
        self.hidden, self.out = nn.Linear(inputs, HIDDEN), nn.Linear(HIDDEN, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.addmm(self.hidden.bias.unsqueeze(1), self.hidden.weight, x).relu()
        return torch.addmm(self.out.bias.unsqueeze(1), self.out.weight, hidden).squeeze(0)


def mse(model: nn.Module, split: datasets.Split) -> Tensor:
    residual = model(split.x) - split.y
    return residual.dot(residual) / len(split.y)


@cache
def load(name: str, data_dir: str) -> tuple[datasets.Data, float]:
    """The set with x as contiguous columns [d, n], and the standard deviation of y."""
    data, y_std = datasets.uci(name, data_dir)
    return datasets.Data(*(datasets.Split(x.t().contiguous(), y) for x, y in data)), y_std


def fit(
    data: datasets.Data, method: str, hyper: dict[str, Any], seed: int, steps: int, **tuner_options: Any
) -> tuple[nn.Module, Row]:
    """Train once from ``hyper``, values of SGD; returns the model, and what the run ended in and cost.

    Args:
        tuner_options: arguments of `hypergrad.Tuner` that are to differ from this experiment's.
    """
    torch.manual_seed(seed)
    model = MLP(len(data.train.x))
    optimizer = torch.optim.SGD(model.parameters(), **hyper)
    group, tuner, decay = optimizer.param_groups[0], None, METHODS[method].get("decay", False)
    if "tune" in METHODS[method]:
        options = {"tune": METHODS[method]["tune"], "total_steps": steps, "every": 10, "seed": seed} | tuner_options
        tuner = hypergrad.Tuner(model, optimizer, lambda: mse(model, data.val), **options)
    backward = tuner.backward if tuner else Tensor.backward

    began = time.perf_counter()
    for step in range(steps):
        if decay:
            group["lr"] = hyper["lr"] * (1 - step / steps)
        loss = mse(model, data.train)
        optimizer.zero_grad()
        backward(loss)
        optimizer.step()
    row: Row = {f"start_{name}": value for name, value in hyper.items()}
    ended = {name: values.item() for name, values in tuner.values.items()} if tuner else {}
    row |= {f"end_{name}": ended.get(name, value) for name, value in hyper.items()}
    row["gradient_evaluations"] = flops.gradient_evaluations(tuner.stats) if tuner else steps
    row["seconds"] = round(time.perf_counter() - began, 3)
    if tuner:
        tuner.close()
    return model, row


def run(item: Row, data_dir: str) -> Row:
    """One item of the sweep: its row is the item's own fields, then what was measured."""
    data, y_std = load(item["set"], data_dir)
    hyper = {name: item[name] for name in GRID} if "lr" in item else start(item["seed"])
    model, row = fit(data, item["method"], hyper, item["seed"], item["steps"])
    with torch.no_grad():
        row |= {f"{name}_mse": y_std**2 * float(mse(model, split)) for name, split in zip(data._fields, data)}
    return item | row | {"diverged": not math.isfinite(row["test_mse"] + row["val_mse"])}


# ---- the bar


def of_grid(args: Args) -> list[Row]:
    """Rows of the 48 settings on each set, and of each set's winner with fresh seeds."""
    cells = [{"set": name, "steps": args.steps} for name in args.sets]
    fresh = [{"seed": seed} for seed in FRESH_SEEDS]
    do, path = partial(run, data_dir=args.data_dir), Path(args.out, "uci_grid.jsonl")
    rows = grid.measure(do, cells, GRID, "val_mse", fresh, path, args.jobs)
    rows.sort(key=lambda row: (row["set"], row["method"], row["steps"], *(row[name] for name in GRID), row["seed"]))
    results.write(Path(args.out, "uci_grid.json"), command(args), rows)
    return rows


def bar(rows: list[Row], name: str, steps: int) -> dict[str, float] | None:
    """Mean errors of the winner with fresh seeds, None where not measured; a seed that diverged would only lower the bar."""
    own = results.select(rows, {"set": name, "method": "winner", "steps": steps, "diverged": False}) if rows else []
    return {error: float(np.mean([row[error] for row in own])) for error in ("test_mse", "val_mse")} if own else None


# ---- the command


def main(args: Args) -> list[Row]:
    wrong = [name for name in args.methods if name not in METHODS or name == "winner"]
    wrong += [name for name in args.sets if name not in datasets.UCI_SETS]
    if wrong:
        known = [name for name in METHODS if name != "winner"]
        raise SystemExit(
            f"unknown {', '.join(wrong)}: --methods {' '.join(known)}, --sets {' '.join(datasets.UCI_SETS)}"
        )
    if min(args.starts, args.steps, args.jobs) < 1:
        raise SystemExit("--starts, --steps and --jobs are at least 1")
    try:
        for name in args.sets:
            datasets.uci(name, args.data_dir)
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from None

    out = Path(args.out)
    kept = results.load("uci_grid.json", out) or results.load("uci_grid.json") or {"rows": []}
    grid_rows = of_grid(args) if "grid" in args.methods else kept["rows"]
    bars = {name: bar(grid_rows, name, args.steps) for name in args.sets}
    methods = [name for name in args.methods if name != "grid"]
    todo = [
        {"set": name, "method": method, "seed": seed, "steps": args.steps}
        for seed in range(args.seed, args.seed + args.starts)
        for name in args.sets
        for method in methods
    ]
    rows = sweep(partial(run, data_dir=args.data_dir), todo, out / "uci.jsonl", args.jobs) if todo else []
    for row in rows:
        own = bars.get(row["set"]) if row["steps"] == args.steps else None
        for ratio, error in (("ratio", "test_mse"), ("val_ratio", "val_mse")):
            row[ratio] = row[error] / own[error] if own and not row["diverged"] else None
    rows.sort(key=lambda row: (row["set"], row["method"], row["seed"], row["steps"]))
    if rows:
        results.write(out / "uci.json", command(args), rows)
    report(args, rows, grid_rows, bars, methods)
    return rows


def report(
    args: Args, rows: list[Row], grid_rows: list[Row], bars: dict[str, dict[str, float] | None], methods: list[str]
) -> None:
    print(
        f"\n{'test error':<24}{'runs':>5}{'mean':>10}{'median':>10}{'best':>10}{'worst':>10}{'NaN':>5}{'s a run':>9}",
        end="",
    )
    print(f"{'mean/bar':>10}{'worst/bar':>10}")
    for name, method in itertools.product(args.sets, ["winner", *methods]):
        source = grid_rows if method == "winner" else rows
        own = [r for r in source if (r["set"], r["method"], r["steps"]) == (name, method, args.steps)]
        if own:
            errors = [r["test_mse"] for r in own if not r["diverged"]] or [math.nan]
            numbers = (np.mean(errors), np.median(errors), min(errors), max(errors))
            shown = "".join(f"{number:>10.4g}" for number in numbers)
            nan, bar = sum(r["diverged"] for r in own), bars[name]
            ratios = [math.inf if nan else error / bar["test_mse"] for error in (numbers[0], numbers[3])] if bar else []
            over = "".join(f"{ratio:>10.3f}" for ratio in ratios)
            print(
                f"{name + ' ' + method:<24}{len(own):>5}{shown}{nan:>5}{np.mean([r['seconds'] for r in own]):>9.2f}{over}"
            )
    for name in args.sets if grid_rows else ():
        if bars[name]:
            own = results.select(grid_rows, {"set": name, "method": "grid", "steps": args.steps})
            print(f"{name}: the grid's winner is {grid.winner(own, GRID, 'val_mse')}")
    print(
        "Diverged runs (NaN) are left out of these errors; over the bar they count as infinite, in the result as null."
    )


if __name__ == "__main__":
    main(parse(Args))
