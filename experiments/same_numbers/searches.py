"""`hypergrad.check` on a loop, and `hypergrad.search.optimize` by several strategies."""

from __future__ import annotations

import importlib.util
import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hypergrad
from experiments.same_numbers.names import keywords
from experiments.same_numbers.nets import net, rows
from experiments.same_numbers.record import Recorder, Skip

TRIALS, QUICK_TRIALS = 20, 12


def checked(record: Recorder, quick: bool, *, mode: str, clip_norm: float | None) -> None:
    """Every row of the report: hypergradient, finite difference, relative error."""
    model = net()
    x, y = rows()
    val_x, val_y = rows(5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return cross_entropy(model(x[batch]), y[batch])

    report = hypergrad.check(
        model,
        optimizer,
        loss,
        [torch.randint(len(y), (16,)) for _ in range(5)],
        lambda: cross_entropy(model(val_x), val_y),
        **keywords(hypergrad.check, {"wrt": ("lr", "weight_decay", "momentum"), "mode": mode, "clip_norm": clip_norm}),
    )
    for row in report.rows:
        record.add({"row": row})
    record.add({"ok": report.ok, "notes": report.notes})


def bowl(p: dict[str, Any]) -> float:
    return (math.log10(p["lr"]) + 2) ** 2 + (p["k"] - 3) ** 2 / 9 + {"a": 0.0, "b": 1.0}[p["kind"]]


def trained(p: dict[str, Any], trial: Any) -> hypergrad.Run:
    """A run of SGD on a small net."""
    x, y = rows()
    val_x, val_y = rows(5)
    model = net()
    batches = [torch.randint(len(y), (16,)) for _ in range(p.get("steps", 20))]
    sgd = torch.optim.SGD(model.parameters(), lr=p["lr"], momentum=p["momentum"])

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return cross_entropy(model(x[batch]), y[batch])

    return hypergrad.Run(model, sgd, batches, loss, lambda: cross_entropy(model(val_x), val_y))


def searched(record: Recorder, quick: bool, *, strategy: str, trains: bool) -> None:
    """State, values and validation loss of every trial."""
    if importlib.util.find_spec("optuna") is None:
        raise Skip("optuna is not installed")
    search = hypergrad.search
    if trains:
        space: dict[str, Any] = {
            "lr": search.Float(1e-3, 1.0, "log", start=0.01),
            "momentum": search.Float(0.01, 0.95, "logit", start=0.5),
            "steps": search.Categorical([40, 80]),
        }
    else:
        space = {"lr": search.Float(1e-4, 1.0, "log"), "k": search.Int(0, 6), "kind": search.Categorical(["a", "b"])}
    trials = 3 if trains else QUICK_TRIALS if quick else TRIALS
    study = search.optimize(trained if trains else bowl, space, strategy, trials, progress=False)
    for each in study.trials:
        record.add({name: getattr(each, name) for name in ("state", "params", "value", "cost", "error", "notes")})


CHECKS = {
    "unrolled": partial(checked, mode="unrolled", clip_norm=None),
    "forward_clip": partial(checked, mode="forward", clip_norm=0.5),
}
SEARCHES = {
    "random": partial(searched, strategy="random", trains=False),
    "tpe": partial(searched, strategy="tpe", trains=False),
    "hypergradient": partial(searched, strategy="hypergradient", trains=True),
    "hybrid_online": partial(searched, strategy="hybrid-online", trains=True),
}
