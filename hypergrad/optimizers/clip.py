"""Gradient clipping, a stage of the transition between the gradient and the update rule.

`ClipNorm` is `torch.nn.utils.clip_grad_norm_` (norm 2, all parameters together), with threshold M and N = ‖g‖:

    c = min(1, M/(N + 1e-6))     g' = c g     with c < 1:  J = c (I − g gᵀ/(N (N + 1e-6)))

`ClipValue` is `torch.nn.utils.clip_grad_value_`:  g' = min(max(g, −M), M).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from hypergrad.core.multi_tensor import norms

TORCH_EPS = 1e-6  # inside clip_grad_norm_


class Clip(Protocol):
    name: ClassVar[str]

    def step(self, g: Tensor, sizes: Sequence[int], m: float) -> Tensor: ...
    def jvp(self, g: Tensor, sizes: Sequence[int], m: float, dg: Tensor, dm: Tensor | None) -> Tensor: ...
    def vjp(self, g: Tensor, sizes: Sequence[int], m: float, lg: Tensor) -> tuple[Tensor, Tensor]: ...


def total_norm(g: Tensor, sizes: Sequence[int]) -> Tensor:
    """The norm of a flat gradient, summed tensor by tensor as torch does, so that it agrees to the last bit."""
    return torch.linalg.vector_norm(norms(g.split(list(sizes))))


@dataclass(frozen=True)
class ClipNorm:
    name: ClassVar[str] = "clip_norm"

    def step(self, g: Tensor, sizes: Sequence[int], m: float) -> Tensor:
        return g * torch.clamp(m / (total_norm(g, sizes) + TORCH_EPS), max=1.0)

    # dg' = c dg + g dc     dc = dM/(N + ε) − c (g·dg)/(N (N + ε))
    def jvp(self, g: Tensor, sizes: Sequence[int], m: float, dg: Tensor, dm: Tensor | None) -> Tensor:
        n = total_norm(g, sizes)
        c, clips = torch.clamp(m / (n + TORCH_EPS), max=1.0), m < n + TORCH_EPS
        dc = (dg @ g).unsqueeze(-1) * (-c / (n * (n + TORCH_EPS)))
        if dm is not None:
            dc = dc + dm / (n + TORCH_EPS)
        return torch.addcmul(c * dg, torch.where(clips, dc, 0), g)

    def vjp(self, g: Tensor, sizes: Sequence[int], m: float, lg: Tensor) -> tuple[Tensor, Tensor]:
        n = total_norm(g, sizes)
        c, clips, dot = torch.clamp(m / (n + TORCH_EPS), max=1.0), m < n + TORCH_EPS, g @ lg
        along = torch.where(clips, c * dot / (n * (n + TORCH_EPS)), 0)
        return c * lg - g * along, torch.where(clips, dot / (n + TORCH_EPS), 0)


@dataclass(frozen=True)
class ClipValue:
    name: ClassVar[str] = "clip_value"

    def step(self, g: Tensor, sizes: Sequence[int], m: float) -> Tensor:
        return g.clamp(-m, m)

    def jvp(self, g: Tensor, sizes: Sequence[int], m: float, dg: Tensor, dm: Tensor | None) -> Tensor:
        clipped = g.abs() > m
        out = torch.where(clipped, 0, dg)
        return out if dm is None else torch.where(clipped, dm * g.sign(), out)

    def vjp(self, g: Tensor, sizes: Sequence[int], m: float, lg: Tensor) -> tuple[Tensor, Tensor]:
        clipped = g.abs() > m
        return torch.where(clipped, 0, lg), (lg * torch.where(clipped, g.sign(), 0)).sum()
