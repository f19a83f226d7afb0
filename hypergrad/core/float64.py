"""float64 where a device may have none: Apple's MPS."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

WITHOUT = {"mps"}  # types of devices


def has_float64(device: torch.device) -> bool:
    return device.type not in WITHOUT


def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that has none.

    Example:
        >>> widest(torch.device("cpu")), widest(torch.device("mps"))
        (torch.float64, torch.float32)
    """
    return torch.float64 if has_float64(device) else torch.float32


def on_host(x: Any) -> Tensor:
    """A tensor on the CPU in float64, copied first and then converted; of a number the same."""
    return x.to("cpu").to(torch.float64) if isinstance(x, Tensor) else torch.as_tensor(x, dtype=torch.float64)
