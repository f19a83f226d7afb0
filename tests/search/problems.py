"""Spaces and objectives of the search's tests, at the top of a module so that other processes can import them."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import torch

from hypergrad import Tuner
from hypergrad.search import Categorical, Float, Int, Pruned, Run, Space, Trial

SPACE = {"lr": Float(1e-4, 1.0, "log", points=5), "k": Int(0, 6), "kind": Categorical(["a", "b"])}
BEST = {"lr": 1e-2, "k": 3, "kind": "a"}
SMALL = {
    "lr": Float(1e-3, 1.5, "log", start=0.05),
    "momentum": Float(0.01, 0.9, "logit", start=0.5),
    "steps": Categorical([3, 5]),
}
ENTRIES = {
    "linear": Float(-1.0, 2.0),
    "log": Float(1e-4, 1.0, "log"),
    "logit": Float(0.01, 0.99, "logit"),
    "step": Float(0.5, 2.0, step=0.5),
    "whole": Int(2, 9),
    "whole_log": Int(1, 1000, "log"),
    "whole_step": Int(3, 11, step=4),
    "choices": Categorical(["x", "y", None, True, 2.5]),
}
CONDITIONAL = Space(
    {
        "optimizer": ["SGD", "Adam"],
        "lr": Float(1e-4, 1.0, "log"),
        "momentum": Float(0.5, 0.99, "logit", when={"optimizer": "SGD"}),
        "beta2": Float(0.9, 0.9999, when={"optimizer": "Adam"}),
    }
)


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


def valley(epochs: int, folder: Path | None, p: dict[str, Any], trial: Trial) -> float:
    """θ²/2 from θ = 4, an epoch being a step of lr. What happened is written down; "killer" dies once, in its third epoch."""
    state = trial.restore() or {"theta": 4.0, "epoch": 0}
    theta = state["theta"]
    for epoch in range(state["epoch"] + 1, epochs + 1):
        theta -= p["lr"] * theta
        if folder is not None:
            with (folder / "steps").open("a") as file:
                file.write(f"{trial.number} {epoch}\n")
            if trial.number == 0 and epoch == 3 and not (folder / "killed").exists():
                (folder / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
        trial.count(1)
        trial.checkpoint({"theta": theta, "epoch": epoch})
        trial.report(theta**2 / 2, epoch)
    return theta**2 / 2


def keeps_nothing(p: dict[str, Any], trial: Trial) -> float:
    trial.report(1.0, 1)
    return 1.0


def tuned_online(p: dict[str, Any], trial: Trial) -> float:
    """A tuner moves lr inside the trial; model, optimizer and tuner are what a checkpoint has."""
    torch.manual_seed(0)
    x = torch.randn(96, 4)
    y = x[:, :1] + 0.1 * torch.randn(96, 1)
    model = torch.nn.Linear(4, 1)
    sgd = torch.optim.SGD(model.parameters(), lr=p["lr"])
    tuner = Tuner(model, sgd, lambda: ((model(x[64:]) - y[64:]) ** 2).mean(), tune=("lr",), warm_start=False)
    parts = {"model": model, "optimizer": sgd, "tuner": tuner}
    state, value = trial.restore(), math.inf
    if state is not None:
        for name, part in parts.items():
            part.load_state_dict(state[name])
    for epoch in range(1 if state is None else state["epoch"] + 1, 5):
        for _ in range(10):
            sgd.zero_grad()
            tuner.backward(((model(x[:64]) - y[:64]) ** 2).mean())
            sgd.step()
        with torch.no_grad():
            value = float(((model(x[64:]) - y[64:]) ** 2).mean())
        trial.note("lr", float(tuner.values["lr"]))
        trial.checkpoint({name: part.state_dict() for name, part in parts.items()} | {"epoch": epoch})
        trial.report(value, epoch)
    return value


def never(p: dict[str, Any]) -> float:
    raise AssertionError("a trial was run")
