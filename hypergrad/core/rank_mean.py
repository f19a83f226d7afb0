"""A linearized loss whose value, gradient and products are the means over the processes that train the model."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hypergrad.core.graph import Linearization
from hypergrad.core.processes import Processes


class RankMean(Linearization):
    """The mean of each process's `Linearization`: of rows of parameters and hyperparameters, each by one collective.

    Args:
        own: this process's.
        shared: how many of the extra leaves the processes share; those behind them (running statistics) are each one's own.
    """

    def __init__(self, own: Linearization, processes: Processes, shared: int):
        self.own, self.processes, self.shared = own, processes, shared
        self.params, self.extra = own.params, own.extra
        self.decay, self.exact = own.decay, own.exact
        self.loss = processes.mean(own.loss)
        rows = self._mean([*own.grads, *own.extra_grads])
        self.grads, self.extra_grads = rows[: len(own.params)], rows[len(own.params) :]
        self.active = tuple(g is not None for g in self.grads)

    def _mean(self, rows: list[Tensor | None]) -> list[Tensor | None]:
        leaves = [*self.params, *self.extra]
        n = min(len(rows), len(self.params) + self.shared)
        return [*self.processes.means(rows[:n], leaves[:n]), *(None if x is None else x.detach() for x in rows[n:])]

    def product(self, *args: Any, **options: Any) -> list[Tensor | None]:
        return self._mean(self.own.product(*args, **options))

    def jvp(self, *args: Any, **options: Any) -> list[Tensor | None]:
        return self._mean(self.own.jvp(*args, **options))

    def nbytes(self) -> int:
        """The most that a process has: all keep the same graphs."""
        return self.processes.largest(self.own.nbytes())

    def free(self) -> None:
        self.own.free()
