"""Fine-tuning with a learning rate for each part of the net: a param group a part, and a number of each group is tuned.

python -m experiments.recipes.fine_tuning
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hypergrad
from experiments import datasets
from experiments.datasets import Split

STEPS = 400
PARTS = ("body, lower", "body, upper", "head")


def classes(split: Split, low: int, n: int) -> Split:
    """Up to n images of five digits, from low on; their labels are 0 … 4."""
    mine = ((split.y >= low) & (split.y < low + 5)).nonzero().flatten()[:n]
    return Split(split.x[mine], split.y[mine] - low)


def pretrained(train: Split) -> nn.Sequential:
    """A net that tells 0 … 4."""
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(100):
        optimizer.zero_grad()
        cross_entropy(model(train.x), train.y).backward()
        optimizer.step()
    return model


def fine_tune(model: nn.Sequential, train: Split, val: Split, tuned: bool) -> tuple[float, list[float]]:
    """Train on other digits; the validation loss, and lr of each part."""
    model[4] = nn.Linear(64, 5)
    groups = [{"params": model[i].parameters()} for i in (0, 2, 4)]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=STEPS)

    def val_loss() -> Tensor:
        return cross_entropy(model(val.x), val.y)

    tuner = hypergrad.Tuner(model, optimizer, val_loss, tune=("lr",), total_steps=STEPS) if tuned else None
    for _ in range(STEPS):
        batch = torch.randint(len(train.y), (32,))
        loss = cross_entropy(model(train.x[batch]), train.y[batch])
        optimizer.zero_grad()
        if tuner is None:
            loss.backward()
        else:
            tuner.backward(loss)
        optimizer.step()
        scheduler.step()
    return val_loss().item(), [] if tuner is None else tuner.values["lr"].tolist()


def main() -> dict[str, float]:
    torch.manual_seed(0)
    data = datasets.digits()
    train, val = classes(data.train, 5, 200), classes(data.val, 5, 200)
    model = pretrained(classes(data.train, 0, 500))
    plain, _ = fine_tune(copy.deepcopy(model), train, val, tuned=False)
    loss, lrs = fine_tune(model, train, val, tuned=True)
    return {"validation loss": loss, "of lr 1e-4": plain} | {
        f"lr, {part}": lr for part, lr in zip(PARTS, lrs, strict=True)
    }


if __name__ == "__main__":
    print(main())
