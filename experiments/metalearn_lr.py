"""MNIST-1D, "metalearn a learning rate": one lr by gradient descent through whole training runs.

    python -m experiments.metalearn_lr [--outer-steps 15] [--quick]

The setting of the MNIST-1D paper's notebook (Greydanus, arXiv 2011.14439): an MLP 40-50-10 with tanh, `manual_seed(0)`, 200
SGD steps on batches of 50 in stored order; the objective is the mean training loss over the 200 steps. There, 50 outer steps of
SGD at 0.3 from lr 1.5 and from 0.15 both end at lr 0.620, mean loss 1.716 and final loss 1.506. "sgd" is that rule on lr itself,
"sign" and "adam" move log lr; all of them with the step halving of `hypergrad.tune_run`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hypergrad
from experiments import datasets, results
from experiments.arguments import arg, command, parse

STARTS = (1.5, 0.15)
RULES = {
    "sgd": ("free", 0.3),
    "sign": ("positive", 0.5),
    "adam": ("positive", 0.3),
}  # kind of lr, length of the first step
LR, MEAN_LOSS, FINAL_LOSS = 0.620, 1.716, 1.506  # published
CLOSE = 0.01  # of lr
BATCH = 50
Row = dict[str, Any]


@dataclass
class Args:
    """One learning rate learned through whole training runs on MNIST-1D."""

    outer: tuple = arg(tuple(RULES), "any of its default", quick=("sgd",))
    outer_steps: int = arg(15, "outer steps", quick=4)
    steps: int = arg(200, "training steps of one run", quick=20)
    out: str = arg("runs/metalearn_lr", "folder of the result", quick="runs/metalearn_lr_quick")
    quick: bool = arg(False, "few outer steps of one rule: a test of the machinery")


@cache
def training_set() -> datasets.Split:
    """The 4000 training examples of the standard set, in stored order."""
    from mnist1d.data import make_dataset

    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    made = make_dataset()  # it seeds the global random numbers
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    return datasets.Split(torch.tensor(made["x"], dtype=torch.float32), torch.tensor(made["y"], dtype=torch.int64))


def build(seed: int, steps: int) -> hypergrad.Run:
    """The run: after t steps the objective is the loss of the batch that step t would take."""
    x, y = training_set()
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(40, 50), nn.Tanh(), nn.Linear(50, 10))
    batches = [torch.arange(t * BATCH, (t + 1) * BATCH) % len(y) for t in range(steps)]

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return cross_entropy(model(x[batch]), y[batch])

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return hypergrad.Run(model, optimizer, batches, loss, lambda t: loss(model, batches[t]), range(steps))


def plain(lr: float, steps: int) -> tuple[float, float]:
    """Mean and last training loss of torch's own loop."""
    model, _, batches, loss, *_ = build(0, steps)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=lr), []
    for batch in batches:
        found = loss(model, batch)
        optimizer.zero_grad()
        found.backward()
        optimizer.step()
        losses.append(found.item())
    return sum(losses) / len(losses), losses[-1]


def learn(args: Args, outer: str, start: float) -> list[Row]:
    """A row an outer step, and one of the end."""
    kind, outer_lr = RULES[outer]
    found = hypergrad.tune_run(
        lambda seed: build(seed, args.steps),
        {"lr": hypergrad.Hyperparameter(start, kind=kind)},
        outer=outer,
        outer_lr=outer_lr,
        outer_steps=args.outer_steps,
        horizons=(1.0,),
    )
    common = {"outer": outer, "start": start, "steps": args.steps}
    path: list[Row] = [
        {"kind": "outer step"}
        | common
        | {"step": row["step"], "lr": row["values"]["lr"][0], "mean_loss": row["value"], "best": row["best"]}
        for row in found.history
    ]
    lr = float(found.values["lr"])
    mean_loss, final_loss = plain(lr, args.steps)
    bests = [row for row in path if row["best"]]
    far = max((row["step"] for row in bests if abs(row["lr"] - LR) > CLOSE), default=-1)
    close = next((row["step"] for row in bests if row["step"] > far), None)
    end: Row = {"kind": "end"} | common | {"lr": lr, "lr_error": abs(lr - LR), "objective": found.value}
    end |= {"mean_loss": mean_loss, "mean_loss_error": abs(mean_loss - MEAN_LOSS)}
    end |= {"final_loss": final_loss, "final_loss_error": abs(final_loss - FINAL_LOSS)}
    end |= {"outer_steps": len(found.history), "close_from_step": close, "run_equivalents": found.run_equivalents}
    return [*path, end]


def main(args: Args) -> list[Row]:
    wrong = [name for name in args.outer if name not in RULES]
    if wrong:
        raise SystemExit(f"--outer: unknown {', '.join(wrong)}; choose from {', '.join(RULES)}")
    if min(args.outer_steps, args.steps) < 1:
        raise SystemExit("--outer-steps and --steps are at least 1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = [row for outer in args.outer for start in STARTS for row in learn(args, outer, start)]
    finally:
        torch.set_num_threads(threads)
    results.write(Path(args.out, "metalearn_lr.json"), command(args), rows, one_line_a_row=True)
    print(f"{'outer':<7}{'from':>6}{'lr':>9}{'mean loss':>11}{'final loss':>12}{'close from step':>17}{'cost':>8}")
    for row in results.select(rows, {"kind": "end"}):
        print(
            f"{row['outer']:<7}{row['start']:>6}{row['lr']:>9.4f}{row['mean_loss']:>11.4f}{row['final_loss']:>12.4f}"
            f"{row['close_from_step']!s:>17}{row['run_equivalents']:>7.1f}x"
        )
    return rows


if __name__ == "__main__":
    main(parse(Args))
