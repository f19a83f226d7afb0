"""Tensors as a result prints them: their numbers where these are few, else shape and norm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

FEW = 8  # numbers that are written out


def shown(x: Tensor) -> str:
    """A tensor in a few characters.

    Example:
        >>> shown(torch.tensor([1.0, 2.5])), shown(torch.ones(4, 25))
        ('[1, 2.5]', '<(4, 25), norm 10>')
    """
    x = x.detach().cpu()
    if x.numel() > FEW:
        return f"<{tuple(x.shape)}, norm {float(torch.linalg.vector_norm(x)):.6g}>"
    return _listed(x)


def _listed(x: Tensor) -> str:
    return f"{float(x):.6g}" if x.dim() == 0 else f"[{', '.join(map(_listed, x))}]"


def shown_dict(tensors: Mapping[str, Tensor]) -> str:
    return "{" + ", ".join(f"{name!r}: {shown(x)}" for name, x in tensors.items()) + "}"


def shown_list(tensors: Sequence[Tensor | None]) -> str:
    """The first two and how many follow; None as it is."""
    first = ", ".join("None" if x is None else shown(x) for x in tensors[:2])
    return f"[{first}, and {len(tensors) - 2} more]" if len(tensors) > 2 else f"[{first}]"


def rounded(stats: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers to four digits."""
    return {name: float(f"{x:.4g}") if isinstance(x, float) else x for name, x in stats.items()}
