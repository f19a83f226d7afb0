"""Transformers: a small vision transformer of random weights on digits, in Trainer with a tuner.

python -m experiments.recipes.transformers_digits
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from experiments import datasets
from hypergrad.integrations.transformers import TunerMixin


class TunedTrainer(TunerMixin, Trainer):
    """Trainer, with hyperparameters that are tuned while it trains."""


def main(epochs: int = 10, folder: str | Path | None = None) -> dict[str, float]:
    """Train. The accuracy on test images, and the lr that was found. folder: for checkpoints."""
    torch.manual_seed(0)
    data = datasets.digits()
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=10,  # type: ignore[call-arg]
    )
    model = ViTForImageClassification(config)

    def images(x: Tensor) -> Tensor:
        return x.view(-1, 1, 8, 8)

    def val_loss(model: ViTForImageClassification) -> Tensor:
        return model(pixel_values=images(data.val.x).to(model.device), labels=data.val.y.to(model.device)).loss

    rows = [{"pixel_values": x, "labels": y} for x, y in zip(images(data.train.x), data.train.y, strict=True)]
    with TemporaryDirectory() as temporary:
        arguments = TrainingArguments(
            output_dir=str(folder or temporary),
            num_train_epochs=epochs,
            per_device_train_batch_size=50,
            learning_rate=1e-6,
            weight_decay=1e-5,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            save_strategy="epoch" if folder else "no",
        )
        trainer = TunedTrainer(
            model=model, args=arguments, train_dataset=rows, val_loss=val_loss, tune=("lr", "weight_decay")
        )
        trainer.train()
    assert trainer.tuner is not None
    model.eval()
    with torch.no_grad():
        accuracy = (model(pixel_values=images(data.test.x)).logits.argmax(1) == data.test.y).float().mean()
    return {"test accuracy": float(accuracy), "lr": float(trainer.tuner.values["lr"][0])}


if __name__ == "__main__":
    print(main())
