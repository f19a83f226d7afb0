"""Checkpoints of a training run: the state before a step, and stacks of them."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from hypergrad.core.restore import Saved
from hypergrad.optimizers.binding import State


def default_every(steps: int) -> int:
    """√K steps between checkpoints: about 2√K states in all."""
    return max(1, math.isqrt(steps))


@dataclass
class Checkpoint:
    """The state before a step, and the model's buffers."""

    state: State
    buffers: list[Saved]

    def tensors(self) -> list[Tensor]:
        """What is offloaded. What an optimizer without a rule remembers besides tensors is not."""
        return [self.state.theta, *self.state.slots.values(), *(saved.value for saved in self.buffers)]

    def with_tensors(self, tensors: Sequence[Tensor], counts: tuple[int, ...]) -> Checkpoint:
        theta, *rest = tensors
        slots = dict(zip(self.state.slots, rest, strict=False))
        values = rest[len(slots) :]
        buffers = [Saved(saved.tensor, x) for saved, x in zip(self.buffers, values, strict=True)]
        return Checkpoint(replace(self.state, theta=theta, slots=slots, counts=counts), buffers)

    def template(self, last: Checkpoint | None) -> Checkpoint:
        """The same without values (tensors on the meta device), for `with_tensors`. The last one's, where both are alike."""
        if last is not None and self.alike(last):
            return last
        return self.with_tensors([torch.empty_like(x, device="meta") for x in self.tensors()], self.state.counts)

    def alike(self, other: Checkpoint) -> bool:
        """Whether both have the same tensors and nothing besides."""
        a, b = self.state, other.state
        bare = (
            not a.rest and not b.rest and a.slots.keys() == b.slots.keys() and len(self.buffers) == len(other.buffers)
        )
        pairs = zip(self.buffers, other.buffers, strict=False)
        same = bare and all(x.tensor is y.tensor for x, y in pairs)
        return same and kinds_of(self.tensors()) == kinds_of(other.tensors())

    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.tensors())

    def digest(self) -> int:
        """A hash of θ's bits. Another θ has the same with a chance of one in four billion."""
        theta = self.state.theta
        if theta.device.type != "cpu":
            return int(torch.hash_tensor(theta).view(torch.int64)) % 2**64  # uint64: int() of it overflows from 2⁶³ on
        return zlib.crc32(theta.detach().contiguous().view(torch.uint8).numpy().data)


class Stack(Protocol):
    """Checkpoints, last in, first out: as much of a list as the adjoint needs."""

    def append(self, checkpoint: Checkpoint, /) -> None: ...

    def pop(self) -> Checkpoint: ...

    def __len__(self) -> int: ...


def kinds_of(tensors: Sequence[Tensor]) -> list[tuple[torch.Size, torch.dtype]]:
    return [(x.shape, x.dtype) for x in tensors]
