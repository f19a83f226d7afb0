"""Many tensors at once: torch's foreach operations, whose number of kernels does not grow with the number of tensors.

On a GPU a kernel costs some microseconds to launch, however small it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# not among torch's public names, though its own optimizers are made of them
_FOREACH: dict[str, Any] = {name: getattr(torch, f"_foreach_{name}") for name in ("mul", "copy_", "norm")}


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Fresh copies, bit for bit, without graphs: 1·x of what is floating, clones of the rest."""
    out: list[Tensor] = [x.detach() for x in tensors]
    floating = [i for i, x in enumerate(out) if x.is_floating_point()]
    with torch.no_grad():
        if floating:
            for i, x in zip(floating, _FOREACH["mul"]([out[i] for i in floating], 1.0), strict=True):
                out[i] = x
        for i in sorted(set(range(len(out))) - set(floating)):
            out[i] = out[i].clone()
    return out


def equal(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether all are the same, number by number. A device is not waited for: False there."""
    pairs = list(zip(tensors, others, strict=True))
    return all(x.device.type == "cpu" for x, _ in pairs) and all(torch.equal(x, y) for x, y in pairs)


def write(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source into its target, in place."""
    if targets:
        with torch.no_grad():
            _FOREACH["copy_"](list(targets), list(sources))


def norms(tensors: Sequence[Tensor], order: float = 2) -> Tensor:
    """The norm of each, [len(tensors)]: as `torch.nn.utils.clip_grad_norm_` takes them."""
    return torch.stack(_FOREACH["norm"](list(tensors), order))
