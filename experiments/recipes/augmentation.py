"""The strength of an augmentation that is best for a whole run: noise on the images, by a factor that the loss is smooth in.

python -m experiments.recipes.augmentation
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hypergrad
from experiments import datasets

EXAMPLES, STEPS, START = 60, 150, 0.2
data = datasets.digits()
x, y = (part[:EXAMPLES] for part in data.train)


def build(seed: int) -> hypergrad.Run:
    """A run that is not yet begun."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    noise = [torch.randn(EXAMPLES, 64) for _ in range(STEPS)]

    def loss(model: nn.Module, noise: Tensor, hypers: dict[str, Tensor]) -> Tensor:
        return cross_entropy(model(x + hypers["strength"] * noise), y)

    def val_loss() -> Tensor:
        return cross_entropy(model(data.val.x), data.val.y)  # without augmentation

    return hypergrad.Run(model, optimizer, noise, loss, val_loss)


def test_loss(strength: float) -> float:
    """Of a plain run."""
    model, optimizer, batches, loss, *_ = build(0)
    assert isinstance(optimizer, torch.optim.Optimizer)
    for noise in batches:
        optimizer.zero_grad()
        loss(model, noise, {"strength": torch.tensor(strength)}).backward()
        optimizer.step()
    with torch.no_grad():
        return cross_entropy(model(data.test.x), data.test.y).item()


def main(outer_steps: int = 12) -> dict[str, float]:
    start = hypergrad.Hyperparameter(START, kind="positive")
    found = hypergrad.tune_run(
        build, {"strength": start}, outer="sign", outer_lr=0.7, outer_steps=outer_steps, horizons=(1.0,)
    )
    strength = float(found.values["strength"])
    return {"strength": strength, "test loss with it": test_loss(strength), f"at {START}": test_loss(START)}


if __name__ == "__main__":
    print(main())
