"""accelerate: its usual loop on digits, with accumulation, clipping and a scheduler, and a tuner in it.

python -m experiments.recipes.accelerate_digits
"""

from __future__ import annotations

import math

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import hypergrad
from experiments import datasets
from hypergrad.integrations.accelerate import backward


def main(epochs: int = 60) -> dict[str, float]:
    """Train. The accuracy on test images, and the lr that was found."""
    torch.manual_seed(0)
    data = datasets.digits()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-6)
    loader = DataLoader(TensorDataset(*data.train), batch_size=50, shuffle=True)
    steps = epochs * math.ceil(len(loader) / 2)  # of the optimizer: one ends with the loader
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

    def val_loss() -> Tensor:
        return cross_entropy(model(data.val.x.to(accelerator.device)), data.val.y.to(accelerator.device))

    tuner = hypergrad.Tuner(
        model,
        optimizer,  # as prepared
        val_loss,
        tune=("lr", "weight_decay"),
        total_steps=steps,
        clip_norm=1.0,
        scaler=accelerator.scaler,  # None but for fp16
    )
    accelerator.register_for_checkpointing(tuner)  # accelerator.save_state and load_state take it along

    for _ in range(epochs):
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = cross_entropy(model(x), y)
                backward(accelerator, tuner, loss)  # in place of accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    tuner.close()
    with torch.no_grad():
        accuracy = (model(data.test.x.to(accelerator.device)).argmax(1).cpu() == data.test.y).float().mean()
    return {"test accuracy": float(accuracy), "lr": float(tuner.values["lr"])}


if __name__ == "__main__":
    print(main())
