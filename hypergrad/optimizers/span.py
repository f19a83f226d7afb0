"""A range of θ or of a slot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Span:
    """A range of a flat vector [n], or of k of them [k, n], and the shape in which a rule sees it."""

    start: int
    stop: int
    shape: tuple[int, ...]

    def of(self, x: Any) -> Tensor:
        """Its part of a tensor, or of a LiveSlot."""
        return x[..., self.start : self.stop].view((*x.shape[:-1], *self.shape))

    def flat(self, x: Tensor) -> Tensor:
        return x.reshape((*x.shape[: x.dim() - len(self.shape)], self.stop - self.start))

    def part(self, a: int, b: int) -> Span:
        """Numbers a … b of a range that is seen as one vector."""
        return Span(self.start + a, self.start + b, (b - a,))
