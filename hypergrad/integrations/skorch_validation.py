"""The loss of a skorch net's own validation data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import Subset

ROWS = 256  # that are read


def of_validation_data(net: Any, dataset: Any) -> Callable[[], Tensor]:
    """The loss of rows of a net's own validation data: batches of one size, drawn when it is first called."""
    if dataset is None:
        raise ValueError(
            "this net holds out no validation data: give it a train_split, or TunerCallback a val_loss, a function of the net "
            "that computes the loss of validation data."
        )
    from skorch.dataset import get_len, unpack_data

    batches: list[Any] = []

    def val_loss() -> Tensor:
        if not batches:
            rows = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:ROWS].tolist()
            batches.extend(net.get_iterator(Subset(dataset, rows), training=False))
            sizes = [get_len(unpack_data(batch)[0]) for batch in batches]
            batches[:] = [batch for batch, size in zip(batches, sizes, strict=True) if size == sizes[0]]
        with modes_kept(net) as modes:
            for m in modes:  # the path through running statistics is in no hypergradient of tuner.backward
                m.training = m.training and isinstance(m, _BatchNorm)
            pairs = map(unpack_data, batches)
            return torch.stack([net.get_loss(net.infer(x), y, X=x, training=False) for x, y in pairs]).mean()

    return val_loss


@contextmanager
def modes_kept(net: Any) -> Iterator[dict[nn.Module, bool]]:
    """The mode of every module of a net, and the same again on the way out."""
    parts = [getattr(net, f"{name}_") for name in [*net._modules, *net._criteria]]
    modes = {m: m.training for part in parts if isinstance(part, nn.Module) for m in part.modules()}
    try:
        yield modes
    finally:
        for m, mode in modes.items():
            m.training = mode
