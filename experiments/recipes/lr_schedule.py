"""A learning rate for each part of a run: knots of a schedule, tuned from one whole run to the next.

python -m experiments.recipes.lr_schedule
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hypergrad
from experiments import datasets

STEPS, KNOTS, START = 60, 5, 0.003
data = datasets.digits()


def build(seed: int, horizon: float = 1.0) -> hypergrad.Run:
    """A run that is not yet begun, or a shorter one with the whole schedule in it."""
    torch.manual_seed(seed)
    steps = round(horizon * STEPS)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=START, momentum=0.9)
    rows = [torch.randint(len(data.train.y), (64,)) for _ in range(steps)]

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return cross_entropy(model(data.train.x[batch]), data.train.y[batch])

    def lr(step: int, hypers: dict[str, Tensor]) -> Tensor:
        return hypergrad.schedules.knots(step / steps, hypers["knots"])

    def val_loss() -> Tensor:
        return cross_entropy(model(data.val.x), data.val.y)

    return hypergrad.Run(model, optimizer, rows, loss, val_loss, schedules={"lr": lr})


def main(outer_steps: int = 12) -> dict[str, float]:
    flat = hypergrad.Hyperparameter(torch.full((KNOTS,), START), kind="positive")
    found = hypergrad.tune_run(
        build, {"knots": flat}, outer="sign", outer_lr=1.0, outer_steps=outer_steps, horizons=(1.0,)
    )
    knots = {f"lr at {i / (KNOTS - 1):.0%}": lr for i, lr in enumerate(found.values["knots"].tolist())}
    return {"validation loss, flat lr": found.history[0]["value"], "learned": found.value} | knots


if __name__ == "__main__":
    print(main())
