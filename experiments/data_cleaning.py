"""Data cleaning: which labels of Fashion-MNIST are wrong, by one learned weight for each training example.

    python -m experiments.data_cleaning [--seeds 5] [--seed 1000] [--quick]

2,000 training images, half of whose labels were replaced by one of the nine others at random; 1,000 other images with clean
labels validate, and the test set tests. The training loss is Σ_i σ(w_i) ℓ_i / Σ_i σ(w_i) over the whole set (full batch);
`hypergrad.tune_run` learns w from 0 by gradient descent on the validation loss at the end of `steps` steps of SGD with momentum.
`auroc` is that of 1 − σ(w) against corruption. Accuracies are those of models trained anew: on all labels with equal weights
("before"), with the learned weights ("after"), and on the clean half alone ("clean").
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import hypergrad
from experiments import datasets, results
from experiments.arguments import arg, command, parse
from experiments.fashion_mnist import load, network

LR, MOMENTUM = 0.1, 0.9
Row = dict[str, Any]


@dataclass
class Args:
    """Wrong labels found by one learned weight for each example."""

    examples: int = arg(2000, "training images", quick=60)
    validation: int = arg(1000, "validation images, whose labels are clean", quick=30)
    share: float = arg(0.5, "share of the training labels that is wrong")
    steps: int = arg(50, "training steps of one run", quick=10)
    outer: str = arg("adam", "rule of the outer steps")
    outer_lr: float = arg(1.0, "length of the first of them")
    outer_steps: int = arg(10, "outer steps", quick=3)
    seeds: int = arg(5, "draws of images, wrong labels and networks", quick=1)
    seed: int = arg(1000, "the first of them")
    data_dir: str = arg(None, "folder of the set's IDX files (default: a cache, Debian's package, download)")
    out: str = arg("runs/data_cleaning", "folder of the result", quick="runs/data_cleaning_quick")
    quick: bool = arg(False, "a few short runs: a test of the machinery")


class Task(NamedTuple):
    train: datasets.Split
    wrong: Tensor  # [n], whether a label was replaced
    val: datasets.Split
    test: datasets.Split


def corrupted(data: datasets.Data, args: Args, seed: int) -> Task:
    """Images drawn by the seed, and a share of their labels replaced by another class."""
    rng = np.random.default_rng(seed)
    picked = torch.from_numpy(rng.choice(len(data.train.y), args.examples, replace=False))
    x, y = data.train.x[picked], data.train.y[picked].clone()
    wrong = torch.zeros(args.examples, dtype=torch.bool)
    wrong[torch.from_numpy(rng.choice(args.examples, round(args.share * args.examples), replace=False))] = True
    y[wrong] = (y[wrong] + torch.from_numpy(rng.integers(1, 10, int(wrong.sum())))) % 10
    validating = torch.from_numpy(rng.choice(len(data.val.y), args.validation, replace=False))
    return Task(datasets.Split(x, y), wrong, datasets.Split(*(part[validating] for part in data.val)), data.test)


def weighted(model: torch.nn.Module, split: datasets.Split, weight: Tensor) -> Tensor:
    losses = cross_entropy(model(split.x), split.y, reduction="none")
    return (weight * losses).sum() / weight.sum()


def learn(task: Task, args: Args, seed: int) -> hypergrad.RunResult:
    """One weight for each training example."""

    def build(seed: int) -> hypergrad.Run:
        model = network(seed, task.train.x)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)

        def loss(model: torch.nn.Module, batch: datasets.Split, hypers: Any) -> Tensor:
            return weighted(model, batch, hypers["w"].sigmoid())

        batches = [task.train] * args.steps
        return hypergrad.Run(model, optimizer, batches, loss, lambda: cross_entropy(model(task.val.x), task.val.y))

    return hypergrad.tune_run(
        build,
        {"w": hypergrad.Hyperparameter(torch.zeros(args.examples), kind="free")},
        outer=args.outer,
        outer_lr=args.outer_lr,
        outer_steps=args.outer_steps,
        seeds=(seed,),
        horizons=(1.0,),
        every=1,
    )


def accuracies(task: Task, weight: Tensor, args: Args, seed: int) -> tuple[float, float]:
    """Train anew with fixed weights; accuracy on validation and test images."""
    model = network(seed, task.train.x)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    for _ in range(args.steps):
        loss = weighted(model, task.train, weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        val, test = ((model(s.x).argmax(1) == s.y).float().mean().item() for s in (task.val, task.test))
    return val, test


def run(data: datasets.Data, args: Args, seed: int) -> list[Row]:
    """A row of one seed, and one for each of its outer steps."""
    from sklearn.metrics import roc_auc_score

    task = corrupted(data, args, seed)
    found = learn(task, args, seed)
    wrong = task.wrong.numpy()
    path = [
        {"kind": "outer step", "seed": seed, "step": row["step"], "val_loss": row["value"], "best": row["best"]}
        | {"auroc": float(roc_auc_score(wrong, -np.array(row["values"]["w"])))}
        for row in found.history
    ]
    w = found.values["w"]
    weights = {"before": torch.ones_like(w), "after": w.sigmoid(), "clean": (~task.wrong).float()}
    row: Row = {"kind": "end", "seed": seed, "examples": args.examples, "wrong": int(wrong.sum()), "steps": args.steps}
    row |= {"auroc": float(roc_auc_score(wrong, -w.numpy())), "val_loss": found.value}
    for name, weight in weights.items():
        row[f"val_accuracy_{name}"], row[f"test_accuracy_{name}"] = accuracies(task, weight, args, seed)
    row["mean_weight_right"], row["mean_weight_wrong"] = (
        float(w.sigmoid()[m].mean()) for m in (~task.wrong, task.wrong)
    )
    counts = zip(_histogram(w[~task.wrong]), _histogram(w[task.wrong]), strict=True)
    bins = [{"kind": "bin", "seed": seed, "bin": i, "right": a, "wrong": b} for i, (a, b) in enumerate(counts)]
    return [*path, *bins, row | {"run_equivalents": found.run_equivalents}]


def _histogram(w: Tensor) -> list[int]:
    """Numbers of examples by weight, in 20 bins over [0, 1]."""
    return torch.histc(w.sigmoid(), 20, 0, 1).int().tolist()


def main(args: Args) -> list[Row]:
    if min(args.examples, args.validation, args.steps, args.outer_steps, args.seeds) < 1 or not 0 < args.share < 1:
        raise SystemExit("--share lies between 0 and 1, and the other numbers are at least 1")
    try:
        data = load(args.data_dir, "cpu")
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from None
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = [row for seed in range(args.seed, args.seed + args.seeds) for row in run(data, args, seed)]
    finally:
        torch.set_num_threads(threads)
    results.write(Path(args.out, "data_cleaning.json"), command(args), rows, one_line_a_row=True)
    print(f"{'seed':>6}{'AUROC':>8}{'before':>9}{'after':>8}{'clean':>8}   test accuracy")
    for row in results.select(rows, {"kind": "end"}):
        shown = "".join(f"{row[f'test_accuracy_{name}']:>8.1%}" for name in ("before", "after", "clean"))
        print(f"{row['seed']:>6}{row['auroc']:>8.3f} {shown}")
    return rows


if __name__ == "__main__":
    main(parse(Args))
