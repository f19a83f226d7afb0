"""Flat vectors range by range: those that a step makes, and those of live optimizers, joined only where they are read."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from hypergrad.optimizers.span import Span


@dataclass
class Pieces:
    """Joins ranges to a vector; what no range covers keeps its old value, or is 0.

    in_place: they are written into `old` at once, so that the memory of each is free for the next.
    """

    old: Tensor
    zero: bool = False
    in_place: bool = False
    new: list[tuple[Span, Tensor]] = field(default_factory=list)

    def add(self, span: Span, x: Tensor) -> None:
        if self.in_place:
            span.of(self.old).copy_(x)
        else:
            self.new.append((span, x))

    def join(self) -> Tensor:
        if self.in_place:
            return self.old
        pieces = sorted(self.new, key=lambda piece: piece[0].start)
        covered = sum(span.stop - span.start for span, _ in pieces)
        if pieces and covered == self.old.shape[-1]:
            flat = [span.flat(x) for span, x in pieces]
            return flat[0] if len(flat) == 1 else torch.cat(flat, dim=-1)
        out = torch.zeros_like(self.old) if self.zero else self.old.clone()
        for span, x in pieces:
            span.of(out).copy_(x)
        return out


class LiveSlot:
    """A slot of live optimizers as a vector [n] that is not in memory: a range of it is joined where it is read.

    Args:
        tensors: the parameters' shares, one after another.
        like: whose dtype and device it has.
    """

    def __init__(self, tensors: Sequence[Tensor], like: Tensor):
        self.tensors, self.like = tensors, like
        self.ends = list(accumulate(x.numel() for x in tensors))
        self.shape = torch.Size([self.ends[-1] if self.ends else 0])

    def numel(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: tuple[object, slice]) -> Tensor:
        """x[..., a:b]."""
        a, b = key[1].start, key[1].stop
        if a == 0 and b == self.shape[0]:
            return self.joined()
        found = []
        for i in range(bisect_right(self.ends, a), len(self.ends)):  # those before end at a or earlier
            x = self.tensors[i]
            start = self.ends[i] - x.numel()
            if start >= b:
                break
            found.append(x.detach().reshape(-1)[max(a - start, 0) : b - start].to(self.like))
        return found[0] if len(found) == 1 else torch.cat(found) if found else self.like.new_zeros(0)

    def joined(self, dtype: torch.dtype | None = None) -> Tensor:
        """All of it, in memory of its own."""
        if dtype is None:
            return torch.cat([x.detach().reshape(-1).to(self.like) for x in self.tensors])
        out = torch.empty(self.shape, dtype=dtype, device=self.like.device)
        for piece, x in zip(out.split([x.numel() for x in self.tensors]), self.tensors, strict=True):
            piece.copy_(x.detach().reshape(-1))
        return out
