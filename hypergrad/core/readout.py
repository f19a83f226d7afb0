"""Numbers that decisions on the host need, copied from the device all at once.

Every `float(x)` of a tensor on a GPU makes Python wait until the GPU has finished its queue. So what a step needs is collected
first and fetched once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hypergrad.core.float64 import widest


class Readout:
    """A few numbers to be copied to the host.

    Example:
        >>> readout = Readout()
        >>> readout.ask("loss", torch.tensor(0.5))
        >>> readout.ask("flags", torch.tensor([True, False]))
        >>> readout.fetch()
        {'loss': [0.5], 'flags': [1.0, 0.0]}
    """

    def __init__(self) -> None:
        self.asked: dict[str, Tensor] = {}

    def ask(self, name: str, x: Tensor) -> None:
        """Ask for the numbers of a tensor."""
        assert name not in self.asked, name
        self.asked[name] = x.detach().reshape(-1)

    def fetch(self) -> dict[str, list[float]]:
        """All numbers asked for, by name: the one wait."""
        if not self.asked:
            return {}
        dtype = widest(next(iter(self.asked.values())).device)
        every = torch.cat([x.to(dtype) for x in self.asked.values()]).tolist()
        out, at = {}, 0
        for name, x in self.asked.items():
            out[name] = every[at : at + x.numel()]
            at += x.numel()
        return out
