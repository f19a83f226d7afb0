"""Numbers that decisions on the host need, copied from the device all at once.

Every `float(x)` of a tensor on a GPU makes Python wait until the GPU has finished its queue. So what a step needs is collected
first and fetched once. Where several processes train the model it is the mean of theirs: so all decide the same, bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hypergrad.core.float64 import widest
from hypergrad.core.processes import ALONE, Processes


class Readout:
    """A few numbers to be copied to the host.

    Args:
        processes: whose numbers are averaged, by one collective. All have to ask for the same.

    Example:
        >>> readout = Readout()
        >>> readout.ask("loss", torch.tensor(0.5))
        >>> readout.ask("flags", torch.tensor([True, False]))
        >>> readout.fetch()
        {'loss': [0.5], 'flags': [1.0, 0.0]}
    """

    def __init__(self, processes: Processes = ALONE) -> None:
        self.processes = processes
        self.asked: dict[str, Tensor] = {}
        self.own: dict[str, Tensor] = {}  # not averaged

    def ask(self, name: str, x: Tensor) -> None:
        """Ask for the numbers of a tensor."""
        assert name not in self.asked | self.own, name
        self.asked[name] = x.detach().reshape(-1)

    def ask_own(self, name: str, x: Tensor) -> None:
        """Ask for the numbers of a tensor on this process, where no other one's matter."""
        assert name not in self.asked | self.own, name
        self.own[name] = x.detach().reshape(-1)

    def fetch(self) -> dict[str, list[float]]:
        """All numbers asked for, by name: the one wait."""
        every = [*self.asked.values(), *self.own.values()]
        if not every:
            return {}
        dtype = widest(every[0].device)
        pieces = [[x.to(dtype) for x in part.values()] for part in (self.asked, self.own)]
        joined = [torch.cat(part) for part in pieces if part]
        if self.asked:
            joined[0] = self.processes.mean(joined[0])
        numbers = (torch.cat(joined) if len(joined) > 1 else joined[0]).tolist()
        out, at = {}, 0
        for name, x in (self.asked | self.own).items():
            out[name] = numbers[at : at + x.numel()]
            at += x.numel()
        return out
