"""Lightning: an MLP on digits, its lr and weight decay typed a thousand times too small and tuned by a callback.

python -m experiments.recipes.lightning_digits
"""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from experiments import datasets
from hypergrad.integrations.lightning import TunerCallback


class Digits(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-6)


def main(epochs: int = 30) -> dict[str, float]:
    """Train. The accuracy on test images, and the lr that was found."""
    torch.manual_seed(0)
    data = datasets.digits()
    module = Digits()

    def val_loss(module: Digits) -> Tensor:
        return cross_entropy(module(data.val.x.to(module.device)), data.val.y.to(module.device))

    tuning = TunerCallback(val_loss, tune=("lr", "weight_decay"))
    trainer = Trainer(
        max_epochs=epochs,
        gradient_clip_val=1.0,
        callbacks=[tuning],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(*data.train), batch_size=64, shuffle=True))
    assert tuning.tuner is not None
    with torch.no_grad():
        accuracy = (module(data.test.x).argmax(1) == data.test.y).float().mean()
    return {"test accuracy": float(accuracy), "lr": float(tuning.tuner.values["lr"])}


if __name__ == "__main__":
    print(main())
