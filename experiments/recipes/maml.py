"""MAML (Finn et al. 2017): weights from which a few steps of SGD learn a new task, and the lr of those steps.

python -m experiments.recipes.maml
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import hypergrad

SHOTS, INNER_STEPS = 10, 3


class Task(NamedTuple):
    """A sine of its own: ten points to learn from, and ten to be judged by."""

    x: Tensor
    y: Tensor
    x_query: Tensor
    y_query: Tensor


def task(random: torch.Generator) -> Task:
    amplitude, phase = (
        torch.rand(2, generator=random) * torch.tensor([4.9, math.pi]) + torch.tensor([0.1, 0.0])
    ).tolist()
    x = torch.rand(2, SHOTS, 1, generator=random) * 10 - 5
    y = amplitude * torch.sin(x - phase)
    return Task(x[0], y[0], x[1], y[1])


def loss(model: nn.Module, batch: Task) -> Tensor:
    return mse_loss(model(batch.x), batch.y)


def adapted(model: nn.Module, inner: torch.optim.SGD, tasks: list[Task]) -> tuple[float, list[Tensor], Tensor]:
    """The mean query loss after a few steps, and its derivatives in the weights before them and in lr."""
    results = [
        hypergrad.hypergradient(
            model, inner, loss, [one] * INNER_STEPS, lambda one=one: mse_loss(model(one.x_query), one.y_query), wrt="lr"
        )
        for one in tasks
    ]
    initial = [torch.stack(of_tasks).mean(0) for of_tasks in zip(*(r.initial for r in results), strict=True)]
    lr = torch.stack([r.gradients["lr"] for r in results]).mean(0)
    return sum(float(r.value) for r in results) / len(tasks), initial, lr


def main(outer_steps: int = 150, tasks: int = 8) -> dict[str, float]:
    torch.manual_seed(0)
    random = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    inner = torch.optim.SGD(model.parameters(), lr=0.01)
    outer = torch.optim.Adam(model.parameters(), lr=3e-3)
    unseen = [task(torch.Generator().manual_seed(10_000 + i)) for i in range(50)]
    before, _, _ = adapted(model, inner, unseen)
    for _ in range(outer_steps):
        _, initial, slope = adapted(model, inner, [task(random) for _ in range(tasks)])
        for p, gradient in zip(model.parameters(), initial, strict=True):
            p.grad = gradient
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        outer.step()
        lr = inner.param_groups[0]["lr"]
        inner.param_groups[0]["lr"] = lr * math.exp(-0.02 * math.copysign(1, float(slope)))  # a step of log lr
    after, _, _ = adapted(model, inner, unseen)
    return {"query loss, random start": before, "learned start": after, "inner lr": inner.param_groups[0]["lr"]}


if __name__ == "__main__":
    print(main())
