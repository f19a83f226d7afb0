"""skorch: a NeuralNetClassifier on digits, its lr tuned by a callback.

python -m experiments.recipes.skorch_digits
"""

from __future__ import annotations

import numpy as np
import torch
from skorch import NeuralNetClassifier
from torch import Tensor, nn

from experiments import datasets
from hypergrad.integrations.skorch import TunerCallback


def main(epochs: int = 30) -> dict[str, float]:
    """Train. The accuracy on test images, and the lr that was found."""
    torch.manual_seed(0)
    data = datasets.digits()

    def val_loss(net: NeuralNetClassifier) -> Tensor:
        return net.get_loss(net.infer(data.val.x), data.val.y)

    net = NeuralNetClassifier(
        nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)),
        criterion=nn.CrossEntropyLoss,  # type: ignore[arg-type]
        optimizer=torch.optim.SGD,
        optimizer__momentum=0.9,
        optimizer__weight_decay=1e-6,
        lr=1e-4,
        max_epochs=epochs,
        batch_size=50,
        iterator_train__shuffle=True,
        train_split=None,  # type: ignore[arg-type]
        callbacks=[("tuner", TunerCallback(val_loss, tune=("lr", "weight_decay")))],
        verbose=0,
    )
    net.fit(data.train.x.numpy(), data.train.y.numpy())
    tuner = dict(net.callbacks_)["tuner"].tuner_
    accuracy = np.mean(net.predict(data.test.x.numpy()) == data.test.y.numpy())
    return {"test accuracy": float(accuracy), "lr": float(tuner.values["lr"])}


if __name__ == "__main__":
    print(main())
