"""Small nets of skorch on digits, and callbacks around them; at module level, so that they can be pickled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.integrations import runs

pytest.importorskip("skorch")

from skorch import NeuralNetClassifier
from skorch.callbacks import Callback

from hypergrad.integrations.skorch import TunerCallback


def arrays() -> tuple[np.ndarray, np.ndarray]:
    x, y = runs.train_set().tensors
    return x.numpy(), y.numpy()


def val_loss(net: Any) -> Tensor:
    x, y = runs.digits()
    return net.get_loss(net.infer(x[1000:1200]), y[1000:1200])


class Probabilities(nn.Module):
    def __init__(self, width: int = 24):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 10), nn.Softmax(dim=-1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Noisy(nn.Module):
    """With BatchNorm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 24), nn.BatchNorm1d(24), nn.Tanh(), nn.Dropout(0.3), nn.Linear(24, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def tuning(*args: Any, **options: Any) -> TunerCallback:
    return TunerCallback(*(args or (val_loss,)), **{"tune": "lr", "every": 4, **options})


def classifier(callbacks: Sequence[Any] = (), tuner: Any = None, cls: Any = NeuralNetClassifier, **options: Any) -> Any:
    """skorch's own: its loss takes the logarithm of probabilities, in get_loss. callbacks: in front of the tuner's."""
    torch.manual_seed(0)
    silent: dict[str, Any] = {"verbose": 0}
    if "accelerator" not in options:  # which sets the sink of print_log
        silent["callbacks__print_log"] = None  # it holds `print`, which Ray replaces
    given = {"module": Probabilities, "lr": 1e-4, "batch_size": 32, "max_epochs": 3, **silent, **options}
    return cls(callbacks=[*callbacks, ("tuner", tuning() if tuner is None else tuner)], **given)


class Ends(Callback):
    """Ends a fit behind its second epoch, as an error or Ctrl-C does."""

    def __init__(self, how: type[BaseException]):
        self.how = how

    def on_epoch_end(self, net: Any, **_: Any) -> None:
        if len(net.history) == 2:
            raise self.how


class EndsBefore(Ends):
    """Before its second epoch has begun."""

    def on_epoch_begin(self, net: Any, **_: Any) -> None:
        self.on_epoch_end(net)


class Accumulating(NeuralNetClassifier):
    """The recipe of skorch's FAQ: two batches a step."""

    def get_loss(self, *args: Any, **kw: Any) -> Tensor:
        return super().get_loss(*args, **kw) / 2

    def train_step(self, batch: Any, **fit_params: Any) -> Any:
        step = self.train_step_single(batch, **fit_params)
        if len(self.history[-1, "batches"]) % 2 == 0:
            self.optimizer_.step()
            self.optimizer_.zero_grad()
        return step


class OwnStep(NeuralNetClassifier):
    """What it differentiates is not what get_loss returned."""

    def train_step_single(self, batch: Any, **fit_params: Any) -> Any:
        self._set_training(True)
        x, y = batch
        y_pred = self.infer(x, **fit_params)
        loss = self.get_loss(y_pred, y, X=x, training=True) + 0.0
        self.tuner_.backward(loss)
        return {"loss": loss, "y_pred": y_pred}


class TwoModules(NeuralNetClassifier):
    """A second module, with BatchNorm, in front of the first."""

    def initialize_module(self) -> Any:
        super().initialize_module()
        self.front_ = nn.BatchNorm1d(64)
        return self

    def infer(self, x: Any, **_: Any) -> Any:
        return self.module_(self.front_(torch.as_tensor(x)))
