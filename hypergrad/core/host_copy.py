"""One copy of a few tensors in host memory, written again and again; from a GPU without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ASYNCHRONOUS = frozenset({"cuda"})  # devices that copy into pinned host memory while Python goes on


class HostCopy:
    """Values of tensors, in memory of its own that is allocated by the first `write`.

    Args:
        device: where the tensors mostly lie; for a GPU the memory is pinned.

    Example:
        >>> x = torch.ones(2)
        >>> copy = HostCopy(x.device)
        >>> copy.write([x])
        >>> x.zero_(), copy.read()
        (tensor([0., 0.]), [tensor([1., 1.])])
    """

    def __init__(self, device: torch.device) -> None:
        self.pinned, self.kept = device.type in ASYNCHRONOUS, list[Tensor]()
        self.arrived: torch.cuda.Event | None = None  # after the last write from a GPU

    def write(self, tensors: Sequence[Tensor]) -> None:
        """Keep these values in place of the last ones. From a GPU they arrive in the order of its current stream."""
        if [(x.shape, x.dtype) for x in tensors] != [(x.shape, x.dtype) for x in self.kept]:
            self.read()  # nothing is on its way into memory that is given up
            self.kept = [torch.empty(x.shape, dtype=x.dtype, pin_memory=self.pinned) for x in tensors]
        for kept, x in zip(self.kept, tensors, strict=True):
            kept.copy_(x.detach(), non_blocking=self.pinned)
        devices = {x.device for x in tensors if x.device.type in ASYNCHRONOUS}
        self.arrived = _mark(devices.pop()) if devices else None

    def read(self) -> list[Tensor]:
        """The values, on the host: the copy's own memory, which the next `write` overwrites. Waits until they are there."""
        if self.arrived is not None:
            self.arrived.synchronize()
            self.arrived = None
        return self.kept


def _mark(device: torch.device) -> torch.cuda.Event:
    """An event behind all that was asked of the device's current stream so far."""
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event
