"""Objectives of the search's tests, at the top of a module so that other processes can import them."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import torch

from hypergrad.search import Categorical, Float, Int, Pruned, Run, Trial

SPACE = {"lr": Float(1e-4, 1.0, "log", points=5), "k": Int(0, 6), "kind": Categorical(["a", "b"])}
BEST = {"lr": 1e-2, "k": 3, "kind": "a"}


def bowl(p: dict[str, Any]) -> float:
    """0 at BEST, on the grid."""
    return (math.log10(p["lr"]) + 2) ** 2 + (p["k"] - 3) ** 2 / 9 + {"a": 0.0, "b": 1.0}[p["kind"]]


def reporting_bowl(p: dict[str, Any], trial: Trial) -> float:
    """Comes down to the bowl in 9 epochs."""
    for epoch in range(1, 10):
        trial.report(bowl(p) + 1 / epoch, epoch)
        if trial.should_prune():
            raise Pruned
    return bowl(p)


def fails_on_b(p: dict[str, Any]) -> float:
    if p["kind"] == "b":
        raise RuntimeError("b is not there")
    return bowl(p)


def noisy_bowl(p: dict[str, Any]) -> float:
    return bowl(p) + 0.01 * float(torch.rand(()))


def interrupted_bowl(p: dict[str, Any], trial: Trial) -> float:
    """Ctrl-C in trial 5, as long as the file named by the environment is there."""
    flag = Path(os.environ["INTERRUPT"])
    if trial.number == 5 and flag.exists():
        os.kill(os.getpid(), signal.SIGINT)
    return noisy_bowl(p)


def quadratic(p: dict[str, Any], trial: Trial) -> Run:
    """θ²/2 from θ = 2 by 5 steps of gradient descent: a loss of 2 (1 − lr)¹⁰ without momentum, least at lr = 1."""
    model = torch.nn.Linear(1, 1, bias=False).double()
    torch.nn.init.constant_(model.weight, 2.0)

    def loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        return (model.weight**2).sum() / 2  # type: ignore[operator]

    sgd = torch.optim.SGD(model.parameters(), lr=p["lr"], momentum=p.get("momentum", 0.0))
    return Run(model, sgd, [None] * p.get("steps", 5), loss, lambda: loss(model, None))


def deadly_bowl(folder: Path, deadly: int, deaths: int, p: dict[str, Any], trial: Trial) -> float:
    """Writes down that it was begun; as trial `deadly` it kills its process in the second epoch, the first `deaths` times."""
    with (folder / "begun").open("a") as file:
        file.write(f"{trial.number}\n")
    for epoch in range(1, 4):
        trial.report(bowl(p) + 1 / epoch, epoch)
        begun = (folder / "begun").read_text().split().count(str(deadly))
        if trial.number == deadly and epoch == 2 and begun <= deaths:
            os.kill(os.getpid(), signal.SIGKILL)
    return bowl(p)
