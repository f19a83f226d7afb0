"""Live runs of the search benchmark: two runs tuned online together, what they learned replayed on all five folds.

Of the training parts of two folds four fifths train and one fifth validates. Both train side by side with one lr and
one weight decay (of all weights, biases too), which a Tuner moves by the sum of their validation
losses, for LEARN_EPOCHS. The path of lr and of α = weight decay · batch, stretched over EPOCHS, is then that of plain
runs of all five folds, whose held-out parts score them.

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
from experiments.search_table import units, values_at

Row = dict[str, Any]
INNER = 0.8  # share of a fold's training part that trains while tuning
TOGETHER = 2  # folds that are tuned on
LEARN_EPOCHS = 27  # so that tuning costs less than a run-equivalent
LOOKS = 12  # steps of a first run, on one fold, that finds where lr starts
HYPER_STEPS = 12  # at least, in runs of few steps: hyperparameters move every ten steps, or more often
FIRST_FINAL_SEED = 3000  # variants are chosen below 1000; 1000 to 1004 and 2000 to 2004 were seen with earlier versions
TUNE = ("lr", "weight_decay")


def start(space: str, seed: int) -> Values:
    """Random discrete entries and starting values."""
    entries = SPACES[space]
    return values_at(entries, np.random.default_rng(seed).random(len(entries)))


class Nets(nn.Module):
    """MLPs of one hidden layer side by side, weights drawn as scikit-learn draws them."""

    def __init__(self, models: int, inputs: int, hidden: int, outputs: int):
        super().__init__()
        shapes = [(inputs, hidden), (1, hidden), (hidden, outputs), (1, outputs)]
        bounds = [math.sqrt(6 / (inputs + hidden))] * 2 + [math.sqrt(6 / (hidden + outputs))] * 2
        self.weights = nn.ParameterList(
            torch.empty(models, *shape).uniform_(-bound, bound) for shape, bound in zip(shapes, bounds, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        w1, b1, w2, b2 = self.weights
        return torch.baddbmm(b2, torch.baddbmm(b1, x, w1).relu(), w2)


def build(data: Folds, values: Values, seed: int) -> tuple[Nets, torch.optim.Optimizer]:
    """As many models as the data have folds, and the optimizer of a configuration."""
    torch.manual_seed(seed)
    nets = Nets(len(data.x), data.x.shape[2], values["hidden"], data.y.shape[2])
    decay = values["alpha"] / values["batch"]
    if "momentum" in values:
        rest = {"momentum": values["momentum"], "nesterov": True}
        return nets, torch.optim.SGD(nets.parameters(), lr=values["lr"], weight_decay=decay, **rest)
    rest = {"betas": (values["beta1"], values["beta2"]), "eps": values["eps"]}
    return nets, torch.optim.Adam(nets.parameters(), lr=values["lr"], weight_decay=decay, **rest)


def loss(output: Tensor, y: Tensor, kind: str) -> Tensor:
    """The sum over models of the mean over rows: each model's gradient is its own."""
    models = len(output)
    if kind == "softmax":
        return -models * (output.log_softmax(-1) * y).sum(-1).mean()
    if kind == "logistic":
        return models * nn.functional.binary_cross_entropy_with_logits(output, y)
    return models * (output - y).square().mean() / 2


def inner(data: Folds, models: int, seed: int) -> tuple[Folds, Folds]:
    """The training parts of the first folds, each cut at random into rows that train and rows that validate."""
    rng, n = np.random.default_rng(seed), int(INNER * data.x.shape[1])
    order = [torch.as_tensor(rng.permutation(data.x.shape[1])) for _ in range(models)]
    x, y = (torch.stack([part[k][rows] for k, rows in enumerate(order)]) for part in (data.x, data.y))
    empty = x[:, :0]
    first, second = (Folds(data.kind, x[:, at], y[:, at], empty, empty, empty) for at in (slice(n), slice(n, None)))
    return first, second


def learn(data: Folds, values: Values, seed: int, epochs: int = LEARN_EPOCHS) -> tuple[list[Values], float]:
    """lr and α of every step of a run that is tuned while it trains, and its cost in run-equivalents."""
    rows = data.x.shape[1]
    batch = min(values["batch"], rows)
    train, val = inner(data, TOGETHER, seed)
    steps = epochs * math.ceil(train.x.shape[1] / batch)
    first, gradients = path_of(_first(train), _first(val), values, batch, steps, LOOKS, True, seed)
    path, more = path_of(train, val, values | first[-1], batch, steps, steps, False, seed)
    return path, (gradients + more) / (FOLDS * EPOCHS * math.ceil(rows / batch))


def _first(part: Folds) -> Folds:
    return Folds(part.kind, part.x[:1], part.y[:1], part.held_x, part.held_y, part.held)


def path_of(
    train: Folds, val: Folds, values: Values, batch: int, total: int, stop: int, warm: bool, seed: int
) -> tuple[list[Values], float]:
    """The first `stop` of `total` steps of a tuned run: the values of each, the last as tuned, and the gradients they cost."""
    n, now = train.x.shape[1], min(batch, train.x.shape[1])
    nets, optimizer = build(train, values | {"batch": batch}, seed)
    tuner = hypergrad.Tuner(
        nets,
        optimizer,
        lambda: loss(nets(val.x), val.y, val.kind),
        tune=TUNE,
        total_steps=total,
        every=max(1, min(10, total // HYPER_STEPS)),
        warm_start=warm,
        seed=seed,
    )
    rng, path = np.random.default_rng(seed), []
    while len(path) < stop:
        for at in torch.as_tensor(rng.permutation(n)).split(now)[: stop - len(path)]:
            optimizer.zero_grad()
            tuner.backward(loss(nets(train.x[:, at]), train.y[:, at], train.kind))
            optimizer.step()
            group = optimizer.param_groups[0]
            path.append({"lr": group["lr"], "alpha": group["weight_decay"] * batch})
    stats, found = tuner.stats, tuner.values
    tuner.close()
    path = path if stop == total else [{"lr": float(found["lr"]), "alpha": float(found["weight_decay"]) * batch}]
    own = stop + 2 * stats["hessian_products"] + stats["val_evaluations"] * val.x.shape[1] / now
    return path, len(train.x) * own


def tuned_run(name: str, values: Values, seed: int, epochs: int = EPOCHS) -> Row:
    """One trial: tuned on two folds, replayed on five; its scores by metric, its cost and what it learned."""
    data, began = folds(name), time.perf_counter()
    path, cost = learn(data, values, seed, math.ceil(epochs * LEARN_EPOCHS / EPOCHS))
    ends = fit(data, values, seed, epochs, path)[-1]
    row = {f"start_{k}": v for k, v in values.items()}
    row |= {"learned_lr": max(each["lr"] for each in path), "learned_alpha": path[-1]["alpha"]}
    row |= dict(zip(METRICS[name], ends, strict=True))
    return row | {"cost": cost + epochs / EPOCHS, "seconds": time.perf_counter() - began}


def run(item: Row) -> Row:
    """One trial of the sweep: from random values, or from those of a configuration of the table."""
    if item["config"] is None:
        values = start(item["space"], item["seed"])
    else:
        values = values_at(SPACES[item["space"]], units(SPACES[item["space"]])[item["config"]])
    return item | tuned_run(item["set"], values, item["seed"], item["epochs"])
