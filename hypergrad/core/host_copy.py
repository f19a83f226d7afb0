"""A copy of a few tensors in host memory; from a GPU without waiting for it, into memory that is overwritten again and again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ASYNCHRONOUS = frozenset({"cuda"})  # devices that copy into pinned host memory asynchronously


class HostCopy:
    """Values of tensors; those from a GPU in memory that is allocated by the first `write`.

    Args:
        device: where most of the tensors are; for a GPU the memory is pinned.

    Example:
        >>> x = torch.ones(2)
        >>> copy = HostCopy(x.device)
        >>> copy.write([x])
        >>> x.zero_(), copy.read()
        (tensor([0., 0.]), [tensor([1., 1.])])
    """

    def __init__(self, device: torch.device) -> None:
        self.pinned, self.kept = device.type in ASYNCHRONOUS, list[Tensor]()
        self.given = False  # to others, who keep them: never overwritten from then on
        self.arrived = list[torch.cuda.Event]()  # after the last write, one for each GPU

    def write(self, tensors: Sequence[Tensor], given: int = 0) -> None:
        """Keep these values in place of the last ones. From a GPU they arrive in the order of its current stream.

        given: so many of them, the first, are never written to: on the host they are kept as they are.
        """
        if not self.pinned and {x.device.type for x in tensors} <= {"cpu"} - ASYNCHRONOUS:
            self.kept = [x.detach() if i < given else x.detach().clone() for i, x in enumerate(tensors)]
            return
        if self.given or [(x.shape, x.dtype) for x in tensors] != [(x.shape, x.dtype) for x in self.kept]:
            if not self.given:
                self.read()  # no copy into the memory that is given up is pending
            self.kept = [torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=self.pinned) for x in tensors]
            self.given = False
        for kept, x in zip(self.kept, tensors, strict=True):
            kept.copy_(x.detach(), non_blocking=self.pinned)
        self.arrived = [_event(device) for device in {x.device for x in tensors if x.device.type in ASYNCHRONOUS}]

    def read(self) -> list[Tensor]:
        """The values, on the host, which the next `write` may overwrite. Waits until they are there."""
        for event in self.arrived:
            event.synchronize()
        self.arrived = []
        return self.kept

    def back(self, i: int, device: torch.device) -> Tensor:
        """The i-th of them where it came from. Waits, on the host, until it is there."""
        return self.read()[i].to(device, non_blocking=self.pinned)

    def first_alone(self) -> HostCopy:
        """Itself, without the other tensors, whose memory is free."""
        self.kept = self.kept[:1]
        return self

    def give(self) -> list[Tensor]:
        """The values, on the host, for a state that others keep: later writes take other memory."""
        self.given = True
        return list(self.read())


def _event(device: torch.device) -> torch.cuda.Event:
    """An event after all present work of the device's current stream."""
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event
