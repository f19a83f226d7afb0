"""Weights of several losses: three sources of labels, one of them right, one partly, one not at all.

python -m experiments.recipes.several_losses
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hypergrad
from experiments import datasets

WRONG = (0.0, 0.3, 1.0)  # share of labels of each source that are drawn at random


def train(steps: int, tuned: bool) -> tuple[float, list[float]]:
    """Accuracy on test images, and the share of each source's loss."""
    torch.manual_seed(0)
    data = datasets.digits()
    sources = list(zip(data.train.x.split(300), data.train.y.split(300)))[: len(WRONG)]
    sources = [
        (x, torch.where(torch.rand(len(y)) < share, torch.randint(10, y.shape), y))
        for (x, y), share in zip(sources, WRONG, strict=True)
    ]
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    mix = torch.zeros(len(WRONG))  # its softmax keeps the sum at 1, so that it is no learning rate

    def val_loss() -> Tensor:
        return cross_entropy(model(data.val.x), data.val.y)

    tuner = hypergrad.Tuner(model, optimizer, val_loss, tune=(), hypers={"mix": mix})
    if not tuned:
        tuner.freeze()
    for _ in range(steps):
        losses = []
        for x, y in sources:
            rows = torch.randint(len(y), (32,))
            losses.append(cross_entropy(model(x[rows]), y[rows]))
        optimizer.zero_grad()
        tuner.backward(mix.softmax(0) @ torch.stack(losses))
        optimizer.step()
    tuner.close()
    with torch.no_grad():
        accuracy = (model(data.test.x).argmax(1) == data.test.y).float().mean().item()
    return accuracy, mix.detach().softmax(0).tolist()


def main(steps: int = 400) -> dict[str, float]:
    (equal, _), (tuned, shares) = train(steps, tuned=False), train(steps, tuned=True)
    named = {f"share of the source with {wrong:.0%} random labels": s for wrong, s in zip(WRONG, shares, strict=True)}
    return {"test accuracy, equal shares": equal, "tuned": tuned} | named


if __name__ == "__main__":
    print(main())
