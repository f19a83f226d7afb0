"""Worked examples: medicine, finance, logistics and feature selection, tuned through whole runs.

    python -m experiments.worked_examples [--seeds 5] [--quick]

Each is a linear model trained by full-batch Adam; tuned are lr, weight decay and tensors in the loss. Beside it: its start,
untuned, and random search over the same numbers at the same budget in gradient evaluations. Every row is one seed: another
split (medicine) or another draw of the synthetic data.

medicine    breast cancer; one gate a feature. Validation: log loss.
finance     synthetic credit defaults, 5 % positive; a weight a class. A missed default costs 20, a refused good client 1.
logistics   synthetic demand of 40 products with few or many records; one decay a product. Pinball loss at 0.9: stock that
            suffices nine times in ten.
selection   synthetic, 5 of 30 features relevant; one gate a feature. Also: AUROC of gates against relevance.

A gate g = 1/(1 + eᵃ) in (0, 1) multiplies a feature's weight by what a decay λ(1/g − 1) = λ eᵃ of that weight leaves of it;
an L1 penalty on the weights in the validation loss closes gates that are of no use.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

import hypergrad
from experiments import results
from experiments.arguments import arg, command, parse

Row = dict[str, Any]
LAMBDA, L1, MISSED, QUANTILE, PRODUCTS, RELEVANT = 0.01, 0.002, 20.0, 0.9, 40, 5
LOW, HIGH = math.log(1e-3), math.log(1e3)  # of the tensors in the loss, for random search and as bounds


@dataclass
class Args:
    """Examples from medicine, finance and logistics, and feature selection."""

    seeds: int = arg(5, "seeds of each example", quick=1)
    outer_steps: int = arg(24, "outer steps of hypergrad", quick=3)
    steps: int = arg(100, "training steps of one run", quick=20)
    out: str = arg("runs/worked_examples", "folder of the result", quick="runs/worked_examples_quick")
    quick: bool = arg(False, "one seed, few steps: a test of the machinery")


class Example(NamedTuple):
    x: tuple[Tensor, ...]  # train, validation, test
    y: tuple[Tensor, ...]
    size: int  # of the tensor in the loss
    train: Callable[[nn.Module, Tensor], Tensor]  # the training loss with that tensor
    score: Callable[[Tensor, Tensor], Tensor]  # of outputs and targets
    extra: Callable[[Tensor, Tensor], Row]
    relevant: Tensor | None = None
    l1: float = 0.0


def _split(x: Tensor, y: Tensor, order: Tensor, train: int, val: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    cuts = (order[:train], order[train : train + val], order[train + val :])
    return tuple(x[c] for c in cuts), tuple(y[c] for c in cuts)


def recall(out: Tensor, y: Tensor) -> Row:
    return {"recall": float((out[y == 1] > 0).double().mean())}


def _gated(x: Tensor, y: Tensor) -> Callable[[nn.Module, Tensor], Tensor]:
    def train(model: Any, a: Tensor) -> Tensor:
        decay = LAMBDA * (a.exp() * model.weight[0].square()).sum()
        return binary_cross_entropy_with_logits(model(x)[:, 0], y) + decay

    return train


def medicine(seed: int) -> Example:
    from sklearn.datasets import load_breast_cancer

    features, labels = load_breast_cancer(return_X_y=True)
    x, y = torch.tensor(features), 1.0 - torch.tensor(labels, dtype=torch.float64)  # 1: malignant
    xs, ys = _split(x, y, torch.randperm(len(y), generator=torch.Generator().manual_seed(seed)), 200, 169)
    std, mean = torch.std_mean(xs[0], 0)
    xs = tuple((x - mean) / std for x in xs)
    return Example(xs, ys, 30, _gated(xs[0], ys[0]), binary_cross_entropy_with_logits, recall, None, L1)


def selection(seed: int) -> Example:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(1200, 30, generator=g, dtype=torch.float64)
    relevant = torch.zeros(30, dtype=torch.float64)
    relevant[torch.randperm(30, generator=g)[:RELEVANT]] = 1
    y = (torch.rand(1200, generator=g, dtype=torch.float64) < (1.5 * x @ relevant).sigmoid()).double()
    xs, ys = _split(x, y, torch.arange(1200), 100, 100)
    return Example(xs, ys, 30, _gated(xs[0], ys[0]), binary_cross_entropy_with_logits, recall, relevant, L1)


def finance(seed: int) -> Example:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(6000, 12, generator=g, dtype=torch.float64)
    score = x @ torch.randn(12, generator=g, dtype=torch.float64) * 0.5 + 0.5 * x[:, 0] * x[:, 1]
    y = (score + torch.randn(6000, generator=g, dtype=torch.float64) > score.std() * 2.2).double()
    xs, ys = _split(x, y, torch.arange(6000), 1500, 1500)

    def train(model: nn.Module, a: Tensor) -> Tensor:
        each = binary_cross_entropy_with_logits(model(xs[0])[:, 0], ys[0], reduction="none")
        return (each * a.exp()[ys[0].long()]).mean()

    def cost(out: Tensor, y: Tensor) -> Tensor:
        p = out.sigmoid()
        return (MISSED * y * (1 - p) + (1 - y) * p).mean()

    return Example(xs, ys, 2, train, cost, recall)


def logistics(seed: int) -> Example:
    """A column an indicator of each product, and 4 shared features; products have 2 to 30 records to learn from."""
    g = torch.Generator().manual_seed(seed)
    level = torch.randn(PRODUCTS, generator=g, dtype=torch.float64) * (
        torch.arange(PRODUCTS) % 2
    )  # half are like the rest
    shared = torch.randn(4, generator=g, dtype=torch.float64)

    def draw(counts: Tensor) -> tuple[Tensor, Tensor]:
        product = torch.arange(PRODUCTS).repeat_interleave(counts)
        features = torch.randn(len(product), 4, generator=g, dtype=torch.float64)
        noise = torch.randn(len(product), generator=g, dtype=torch.float64)
        return torch.cat([torch.eye(PRODUCTS, dtype=torch.float64)[product], features], 1), features @ shared + level[
            product
        ] + noise

    counts = torch.randint(2, 31, (PRODUCTS,), generator=g)
    parts = [draw(n) for n in (counts, torch.full((PRODUCTS,), 8), torch.full((PRODUCTS,), 50))]
    xs, ys = tuple(p[0] for p in parts), tuple(p[1] for p in parts)

    def pinball(out: Tensor, y: Tensor) -> Tensor:
        """Smoothed over a tenth, as a kink has no curvature."""
        u = y - out
        return (QUANTILE * u + 0.1 * softplus(-u / 0.1)).mean()

    def train(model: Any, a: Tensor) -> Tensor:
        decay = LAMBDA * (a.exp() * model.weight[0, :PRODUCTS].square()).sum()
        return pinball(model(xs[0])[:, 0], ys[0]) + decay

    return Example(xs, ys, PRODUCTS, train, pinball, lambda out, y: {"covered": float((out >= y).double().mean())})


EXAMPLES: dict[str, Callable[[int], Example]] = {
    "medicine": medicine,
    "finance": finance,
    "logistics": logistics,
    "selection": selection,
}


def build(example: Example, steps: int) -> hypergrad.Run:
    model = nn.Linear(example.x[0].shape[1], 1).double()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=1e-3, eps=1e-6)

    def val_loss() -> Tensor:
        penalty = example.l1 * (model.weight**2 + 1e-6).sqrt().sum()
        return example.score(model(example.x[1])[:, 0], example.y[1]) + penalty

    return hypergrad.Run(model, optimizer, [None] * steps, lambda m, batch, h: example.train(m, h["a"]), val_loss)


def trained(example: Example, steps: int, lr: float, weight_decay: float, a: Tensor) -> tuple[float, Row]:
    """Validation loss, and what the test set says, of torch's own loop."""
    model, optimizer, _, _, val_loss, *_ = build(example, steps)
    assert isinstance(optimizer, torch.optim.Optimizer)
    optimizer.param_groups[0].update(lr=lr, weight_decay=weight_decay)
    for _ in range(steps):
        optimizer.zero_grad()
        example.train(model, a).backward()
        optimizer.step()
    with torch.no_grad():
        out, y = model(example.x[2])[:, 0], example.y[2]
        return float(val_loss()), {"test": float(example.score(out, y))} | example.extra(out, y)


def compare(args: Args, name: str, seed: int) -> list[Row]:
    from sklearn.metrics import roc_auc_score

    example = EXAMPLES[name](seed)
    zeros = torch.zeros(example.size, dtype=torch.float64)
    found = hypergrad.tune_run(
        lambda _: build(example, args.steps),
        {
            "lr": hypergrad.Hyperparameter(0.01, (1e-4, 1.0)),
            "weight_decay": hypergrad.Hyperparameter(1e-3, (1e-5, 1.0)),
            "a": hypergrad.Hyperparameter(zeros, (LOW, HIGH), "free"),
        },
        outer="adam",
        outer_lr=0.3,
        outer_steps=args.outer_steps,
        horizons=(1.0,),
        progress=False,
    )
    trials = max(1, round(found.run_equivalents))
    g = torch.Generator().manual_seed(1000 + seed)
    draws = []
    for _ in range(trials):
        u = torch.rand(2 + example.size, generator=g, dtype=torch.float64)
        draws.append((float(10 ** (-4 + 4 * u[0])), float(10 ** (-5 + 5 * u[1])), LOW + (HIGH - LOW) * u[2:]))
    best = min(draws, key=lambda draw: trained(example, args.steps, *draw)[0])
    tuned = (float(found.values["lr"]), float(found.values["weight_decay"]), found.values["a"].reshape(-1).double())
    rows = []
    methods: dict[str, tuple[tuple[float, float, Tensor], float]] = {
        "untuned": ((0.01, 1e-3, zeros), 1.0),
        "random search": (best, float(trials)),
        "hypergrad": (tuned, found.run_equivalents),
    }
    for method, (numbers, cost) in methods.items():
        val, test = trained(example, args.steps, *numbers)
        row: Row = {"example": name, "method": method, "seed": seed, "val": val} | test
        row |= {"lr": numbers[0], "weight_decay": numbers[1], "gradient_evaluations": cost * args.steps}
        if example.relevant is not None:
            row["auroc"] = float(roc_auc_score(example.relevant.numpy(), -numbers[2].numpy()))
        rows.append(row)
    ours, theirs = rows[2]["test"], rows[1]["test"]
    rows[2] |= {"over_random": ours / theirs, "over_untuned": ours / rows[0]["test"], "wins": int(ours < theirs)}
    return rows


def main(args: Args) -> list[Row]:
    if min(args.seeds, args.outer_steps, args.steps) < 1:
        raise SystemExit("--seeds, --outer-steps and --steps are at least 1")
    rows = [row for name in EXAMPLES for seed in range(args.seeds) for row in compare(args, name, seed)]
    results.write(Path(args.out, "worked_examples.json"), command(args), rows, one_line_a_row=True)
    print(f"{'example':<12}{'method':<15}{'val':>9}{'test':>9}")
    for name in EXAMPLES:
        for method in ("untuned", "random search", "hypergrad"):
            mine = results.select(rows, {"example": name, "method": method})
            val, test = (statistics.fmean(row[key] for row in mine) for key in ("val", "test"))
            print(f"{name:<12}{method:<15}{val:>9.4f}{test:>9.4f}")
    return rows


if __name__ == "__main__":
    main(parse(Args))
