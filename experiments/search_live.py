"""Live runs of the search benchmark: a run tuned online on one fold, its learned values replayed on all five.

The training part of the first fold is split into four fifths that train and one that validates; a Tuner of default settings moves
lr and weight decay while it trains there for EPOCHS. The learned lr is then the scale of a linear decay to zero,
and α = weight decay · batch, in plain runs of all five folds, whose held-out parts score them and are seen by nothing else.

Cost in run-equivalents (the five fold fits of one configuration, 5 · EPOCHS · ⌈n/batch⌉ gradients): gradients of training batches
count 1, Hessian-vector products 2, and a validation gradient its rows over the batch's; the replay is one run-equivalent more.
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import hypergrad
from experiments.search_problems import EPOCHS, FOLDS, METRICS, SPACES, Folds, Values, fit, folds
from experiments.search_table import values_at

Row = dict[str, Any]
INNER = 0.8  # share of a fold's training part that trains while tuning
FIRST_FINAL_SEED = 1000


def start(space: str, seed: int) -> Values:
    """Random discrete entries and starting values."""
    entries = SPACES[space]
    return values_at(entries, np.random.default_rng(seed).random(len(entries)))


def build(data: Folds, values: Values, seed: int) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    """The torch model and optimizer of a configuration; biases are in a group without decay."""
    torch.manual_seed(seed)
    first, second = (
        nn.Linear(data.x.shape[2], values["hidden"]),
        nn.Linear(values["hidden"], data.y.shape[2]),
    )
    for layer in (first, second):
        nn.init.xavier_uniform_(layer.weight)
    decay = values["alpha"] / values["batch"]
    groups = [
        {"params": [first.weight, second.weight], "weight_decay": decay},
        {"params": [first.bias, second.bias], "weight_decay": 0.0},
    ]
    if "momentum" in values:
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            groups, lr=values["lr"], momentum=values["momentum"], nesterov=True
        )
    else:
        betas = (values["beta1"], values["beta2"])
        optimizer = torch.optim.Adam(groups, lr=values["lr"], betas=betas, eps=values["eps"])
    return nn.Sequential(first, nn.ReLU(), second), optimizer


def loss(output: Tensor, y: Tensor, kind: str) -> Tensor:
    if kind == "softmax":
        return nn.functional.cross_entropy(output, y)
    if kind == "logistic":
        return nn.functional.binary_cross_entropy_with_logits(output, y)
    return (output - y).square().mean() / 2


def learn(data: Folds, values: Values, seed: int, tune: tuple[str, ...], epochs: int = EPOCHS) -> tuple[Values, float]:
    """The values that a tuned run ends at, and its cost in run-equivalents."""
    rows = data.x.shape[1]
    n, batch = int(INNER * rows), min(values["batch"], rows)
    x, y, x_val, y_val = data.x[0, :n], data.y[0, :n], data.x[0, n:], data.y[0, n:]
    model, optimizer = build(data, values | {"batch": batch}, seed)
    inner = min(batch, n)
    total = epochs * math.ceil(n / inner)
    tuner = hypergrad.Tuner(
        model, optimizer, lambda: loss(model(x_val), y_val, data.kind), tune=tune, total_steps=total, seed=seed
    )
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = torch.as_tensor(rng.permutation(n))
        for first in range(0, n, inner):
            rows_now = order[first : first + inner]
            optimizer.zero_grad()
            tuner.backward(loss(model(x[rows_now]), y[rows_now], data.kind))
            optimizer.step()
    learned, stats = dict(values), tuner.stats
    found = tuner.values
    learned["lr"] = float(found["lr"][0])
    if "weight_decay" in found:
        learned["alpha"] = float(found["weight_decay"][0]) * batch
    if "momentum" in found:
        learned["momentum"] = float(found["momentum"][0])
    if "betas" in found:
        learned["beta1"], learned["beta2"] = map(float, found["betas"][0])
    tuner.close()
    gradients = total + 2 * stats["hessian_products"] + stats["val_evaluations"] * (rows - n) / inner
    return learned, gradients / (FOLDS * EPOCHS * math.ceil(rows / batch))


def tuned_run(name: str, space: str, values: Values, seed: int, momenta: bool, epochs: int = EPOCHS) -> Row:
    """One trial: tuned on a fold, replayed on five; its scores by metric, its cost and what it learned."""
    data, began = folds(name), time.perf_counter()
    tune = ("lr", "weight_decay", *((("momentum",) if space == "sgd" else ("betas",)) if momenta else ()))
    learned, cost = learn(data, values, seed, tune, epochs)
    ends = fit(data, learned, seed, epochs, decay=True)[-1]
    row = {f"start_{k}": v for k, v in values.items()} | {f"learned_{k}": v for k, v in learned.items()}
    row |= dict(zip(METRICS[name], ends, strict=True))
    return row | {"cost": cost + epochs / EPOCHS, "seconds": time.perf_counter() - began}


def run(item: Row) -> Row:
    """One hypergradient trial of the sweep."""
    values = start(item["space"], item["seed"] + 100_000 * item["trial"])
    return item | tuned_run(item["set"], item["space"], values, item["seed"], item["momenta"], item["epochs"])
