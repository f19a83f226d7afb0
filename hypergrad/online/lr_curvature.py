"""Slope and curvature of the training loss along dθ/dlog lr, which forward mode has in hand.

With z_i = dθ/dlog lr_i, and the pending batch's own gradient g and products Hz_i:

    a_i = gᵀz_i        B_ij = z_iᵀ H z_j        summed over the steps from one hyperparameter step to the next

`newton` is log c*, c* = 1 − a/b with b_i = B_ii + Σ_{j≠i} |B_ij| (see NewtonClimb). Nothing here waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hypergrad.core.readout import Readout
from hypergrad.online.gradient_changes import Pending
from hypergrad.online.hyper_vector import HyperVector
from hypergrad.optimizers.transition import Tangent


class LrCurvature:
    """a and B, summed since the last `take_newton`."""

    def __init__(self, vector: HyperVector):
        self.vector, self.transition = vector, vector.transition
        self.sums: Tensor | None = None  # a and B [m, 1 + m]
        self.told = (
            True  # False: losses of several optimizers depend on the same parameters, and none says where a run goes
        )

    def _along(
        self, tangent: Tangent | None, pending: Pending | None, optimizer: int | None
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """z of every lr [m, n], and, times the pending batch's scale, its g [n] and Hz [m, n]; None where they are not known."""
        rows = self.vector.rows("lr", optimizer)
        if tangent is None or pending is None or pending.dg is None or pending.left is None or not rows:
            return None
        z, hz = _rows(tangent.theta, rows), _rows(pending.dg, rows)
        if optimizer is not None:
            z = z * self.transition.of_optimizer(optimizer)
        return z, pending.left, hz

    def ask_common(
        self, tangent: Tangent | None, pending: Pending | None, readout: Readout, optimizer: int | None
    ) -> None:
        """Ask for a = gᵀz and b = zᵀHz of the pending batch, z = dθ/dlog c of a common factor c of every lr.

        optimizer: of its lr, and its parameters, alone.
        """
        seen = self._along(tangent, pending, optimizer)
        if seen is not None and pending is not None:
            z, g, hz = _total(seen[0]), seen[1], _total(seen[2])
            readout.ask("slope and curvature", torch.stack([g @ z, hz @ z]) / pending.scale)

    def add(self, tangent: Tangent | None, pending: Pending | None, optimizer: int | None = None) -> None:
        """Add this step's batch: slope and curvature of its own loss, whatever is done to its gradient afterwards.

        optimizer: whose loss it is alone; None: it is that of all.
        """
        rules = zip(self.transition.rules, self.transition.optimizer_of_group, strict=True)
        signs = {bool(getattr(rule, "maximize", False)) for rule, i in rules if optimizer in (None, i)}
        seen = self._along(tangent, pending, optimizer)
        if seen is None or pending is None or len(signs) > 1:
            return
        z, g, hz = seen
        along = torch.cat([(z @ g).unsqueeze(-1), z @ hz.T], dim=1) / pending.scale
        along = -along if signs == {True} else along
        if optimizer is not None:
            along = self._among_all(along, optimizer)
        self.sums = along if self.sums is None else self.sums + along

    def _among_all(self, along: Tensor, optimizer: int) -> Tensor:
        """a and B of one optimizer's lr among those of all [m, 1 + m], 0 elsewhere."""
        every = self.vector.rows("lr")
        mine = torch.tensor([every.index(row) for row in self.vector.rows("lr", optimizer)], device=along.device)
        out = along.new_zeros(len(every), 1 + len(every))
        out[mine[:, None], torch.cat([mine.new_zeros(1), 1 + mine])] = along
        return out

    def couple(self) -> None:
        self.told = False

    def forget(self) -> None:
        self.sums = None

    def ask_newton(self, readout: Readout) -> None:
        """Ask for the a and B summed since the last `take_newton`."""
        if self.sums is not None:
            readout.ask("along", self.sums)

    def take_newton(self, read: Mapping[str, list[float]] | None = None) -> Tensor:
        """log c* of every lr by the steps since the last call [k of all]; NaN where it is not known.

        read: with the answer to `ask_newton`; None: it is fetched here.
        """
        newton = torch.full((len(self.vector),), math.nan, dtype=torch.float64)
        along, self.sums = self.sums, None
        if along is None or not self.told:
            return newton
        read = {"along": along.flatten().tolist()} if read is None else read
        a, b = torch.tensor(read["along"], dtype=torch.float64).view(along.shape).tensor_split([1], dim=1)
        a, b = a.squeeze(1), b.diagonal() + (b - b.diagonal().diag()).abs().sum(1)
        best = torch.where(a >= 0, 0, torch.where(b > 0, torch.log1p(-a / b), math.inf))
        places = [self.vector.moving[k] for k in self.vector.rows("lr")]
        newton[places] = torch.where((a + b).isfinite(), best, math.nan)
        return newton

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums, "told": self.told}

    def load_state_dict(self, state: Mapping[str, Any], like: Tensor) -> None:
        self.told = bool(state["told"])
        self.sums = None if state["sums"] is None else state["sums"].to(like)


def _total(rows: Tensor) -> Tensor:
    """The sum of rows [m, n]; of one row without a copy."""
    return rows[0] if len(rows) == 1 else rows.sum(0)


def _rows(x: Tensor, rows: Sequence[int]) -> Tensor:
    """Rows of x; neighbours without an index, which would have to travel to the device."""
    a, b = rows[0], rows[-1] + 1
    return x[a:b] if list(rows) == list(range(a, b)) else torch.stack([x[j] for j in rows])
