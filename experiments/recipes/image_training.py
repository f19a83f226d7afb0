"""A convolutional net with BatchNorm over several epochs: AdamW, warm-up and cosine, clipping, bfloat16, checkpoints.

python -m experiments.recipes.image_training [CHECKPOINT]      goes on where CHECKPOINT ends, if there is one
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.utils.data import DataLoader, TensorDataset

import hypergrad
from experiments import datasets

EPOCHS, WARMUP, CLIP = 8, 20, 1.0


def images(split: datasets.Split) -> TensorDataset:
    return TensorDataset(split.x.view(-1, 1, 8, 8), split.y)


def network() -> nn.Module:
    def block(width: int, out: int) -> list[nn.Module]:
        return [nn.Conv2d(width, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(), nn.MaxPool2d(2)]

    return nn.Sequential(*block(1, 16), *block(16, 32), nn.Flatten(), nn.Linear(128, 10))


def main(checkpoint: Path | None = None, last_epoch: int = EPOCHS, lr: float = 1e-6) -> dict[str, float]:
    """Train up to an epoch; returns the accuracy on test images, the lr that was found, and a sum of the weights."""
    torch.manual_seed(0)
    data = datasets.digits()
    loader = DataLoader(images(data.train), batch_size=50, shuffle=True)  # in an order drawn by torch's generator
    x_val, y_val = images(data.val).tensors
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-6)
    steps = EPOCHS * len(loader)
    scheduler = SequentialLR(
        optimizer,
        [LinearLR(optimizer, 0.05, total_iters=WARMUP), CosineAnnealingLR(optimizer, steps - WARMUP)],
        [WARMUP],
    )

    def val_loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return cross_entropy(model(x_val), y_val)

    tuner = hypergrad.Tuner(model, optimizer, val_loss, total_steps=steps, clip_norm=CLIP)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "tuner": tuner}

    begin = 0
    if checkpoint is not None and checkpoint.exists():
        saved = torch.load(checkpoint)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        begin = saved["epoch"]
        torch.set_rng_state(saved["random"])

    for epoch in range(begin, last_epoch):
        for x, y in loader:
            with torch.autocast("cpu", torch.bfloat16):
                loss = cross_entropy(model(x), y)
            optimizer.zero_grad()
            tuner.backward(loss)
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            scheduler.step()
        if checkpoint is not None:
            states = {name: part.state_dict() for name, part in parts.items()}
            torch.save(states | {"epoch": epoch + 1, "random": torch.get_rng_state()}, checkpoint)

    print(tuner.recipe())  # optimizer and scheduler for a plain run next time
    tuner.close()
    model.eval()
    x_test, y_test = images(data.test).tensors
    with torch.no_grad():
        accuracy = (model(x_test).argmax(1) == y_test).float().mean()
        weights = sum(p.double().sum() for p in model.parameters())
    return {"test accuracy": float(accuracy), "lr": float(tuner.values["lr"]), "weights": float(weights)}


if __name__ == "__main__":
    print(main(Path(sys.argv[1]) if sys.argv[1:] else None))
