"""A weight for each training example, where some labels are wrong: hundreds of numbers, tuned from one whole run to the next.

python -m experiments.recipes.example_weights
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hypergrad
from experiments import datasets

EXAMPLES, WRONG, STEPS = 300, 0.4, 40
x, y = (part[:EXAMPLES] for part in datasets.digits().train)
x_val, y_val = (part[:200] for part in datasets.digits().val)  # right labels
x_test, y_test = datasets.digits().test


def with_wrong_labels() -> tuple[Tensor, Tensor]:
    """Labels, 40 % of them replaced by another class; and which."""
    random = torch.Generator().manual_seed(0)
    wrong = torch.rand(EXAMPLES, generator=random) < WRONG
    other = (y + torch.randint(1, 10, (EXAMPLES,), generator=random)) % 10
    return torch.where(wrong, other, y), wrong


labels, wrong = with_wrong_labels()


def weighted(model: nn.Module, weights: Tensor) -> Tensor:
    losses = cross_entropy(model(x), labels, reduction="none")
    return (weights * losses).sum() / weights.sum()


def build(seed: int) -> hypergrad.Run:
    """A run that is not yet begun."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)

    def loss(model: nn.Module, batch: None, hypers: dict[str, Any]) -> Tensor:
        return weighted(model, hypers["w"].sigmoid())

    return hypergrad.Run(model, optimizer, [None] * STEPS, loss, lambda: cross_entropy(model(x_val), y_val))


def test_accuracy(weights: Tensor) -> float:
    """Of a plain run with these weights."""
    model, optimizer, *_ = build(0)
    assert isinstance(optimizer, torch.optim.Optimizer)
    for _ in range(STEPS):
        optimizer.zero_grad()
        weighted(model, weights).backward()
        optimizer.step()
    with torch.no_grad():
        return (model(x_test).argmax(1) == y_test).float().mean().item()


def main(outer_steps: int = 8) -> dict[str, float]:
    start = hypergrad.Hyperparameter(torch.zeros(EXAMPLES), kind="free")
    found = hypergrad.tune_run(
        build, {"w": start}, outer="adam", outer_lr=1.0, outer_steps=outer_steps, horizons=(1.0,), every=1
    )
    weights = found.values["w"].sigmoid()
    return {
        "test accuracy, equal weights": test_accuracy(torch.ones(EXAMPLES)),
        "learned weights": test_accuracy(weights),
        "right labels alone": test_accuracy((~wrong).float()),
        "mean weight of a right label": weights[~wrong].mean().item(),
        "of a wrong one": weights[wrong].mean().item(),
    }


if __name__ == "__main__":
    print(main())
