"""Meta-Weight-Net (Shu et al. 2019): a small net maps an example's loss to its weight, and is tuned while the model trains.

python -m experiments.recipes.meta_weight_net
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hypergrad
from experiments import datasets

EXAMPLES, WRONG, BATCH = 600, 0.4, 100


def main(steps: int = 400) -> dict[str, float]:
    torch.manual_seed(0)
    data = datasets.digits()
    x, y = (part[:EXAMPLES] for part in data.train)
    wrong = torch.rand(EXAMPLES) < WRONG
    labels = torch.where(wrong, (y + torch.randint(1, 10, (EXAMPLES,))) % 10, y)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    weight_net = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1), nn.Sigmoid())

    def losses(rows: Tensor) -> Tensor:
        return cross_entropy(model(x[rows]), labels[rows], reduction="none")

    def loss(_: nn.Module, rows: Tensor) -> Tensor:
        each = losses(rows)
        weights = weight_net(each[:, None])[:, 0]  # of the loss itself, not of loss.detach(): its path counts too
        return (weights * each).sum() / weights.sum()

    tuner = hypergrad.Tuner(
        model,
        optimizer,
        lambda: cross_entropy(model(data.val.x), data.val.y),  # right labels
        tune=(),
        hypers={"weights": weight_net},
        loss=loss,
        mode="unrolled",  # adjoints: the same price for any number of numbers
        horizon=10,
    )
    for _ in range(steps):
        tuner.step(torch.randperm(EXAMPLES)[:BATCH])
    tuner.close()
    with torch.no_grad():
        weights = weight_net(losses(torch.arange(EXAMPLES))[:, None])[:, 0]
        accuracy = (model(data.test.x).argmax(1) == data.test.y).float().mean().item()
    return {
        "test accuracy": accuracy,
        "mean weight of a right label": weights[~wrong].mean().item(),
        "of a wrong one": weights[wrong].mean().item(),
    }


if __name__ == "__main__":
    print(main())
