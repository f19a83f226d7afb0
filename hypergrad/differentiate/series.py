"""Single numbers of every step, on the device."""

from __future__ import annotations

import torch
from torch import Tensor


class Series:
    """Many 0-d tensors, packed as they come: by themselves they take half a kilobyte each."""

    PACK = 256

    def __init__(self) -> None:
        self.packed: list[Tensor] = []
        self.recent: list[Tensor] = []

    def append(self, x: Tensor) -> None:
        self.recent.append(x)
        if len(self.recent) == self.PACK:
            self.packed.append(torch.stack(self.recent))
            self.recent = []

    def __getitem__(self, i: int) -> Tensor:
        pack, place = divmod(i, self.PACK)
        return self.packed[pack][place] if pack < len(self.packed) else self.recent[place]

    def __len__(self) -> int:
        return self.PACK * len(self.packed) + len(self.recent)

    def tolist(self) -> list[float]:
        """All of them on the host."""
        parts = [*self.packed, *([torch.stack(self.recent)] if self.recent else [])]
        return torch.cat(parts).tolist() if parts else []
