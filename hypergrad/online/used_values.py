"""The values that the last step was taken with: every optimizer's own, as they step one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hypergrad.online.hyper_vector import HyperVector
from hypergrad.optimizers.binding import Values


class UsedValues:
    """values: name → one of each group; slopes: dx/dφ [k]."""

    def __init__(self, vector: HyperVector):
        self.vector, self.transition = vector, vector.transition
        self.values: Values = {}
        self.slopes = vector.slope()

    def note(self, i: int, values: Values, slopes: Tensor) -> Values:
        """Those of optimizer i are from its present step. Returns the values of all."""
        if len(self.transition.optimizers) == 1:
            self.values, self.slopes = values, slopes
            return values
        old = self.values or values
        mine = [j == i for j in self.transition.optimizer_of_group]
        merged = {
            name: [new if m else x for new, x, m in zip(values[name], old[name], mine, strict=True)] for name in values
        }
        rows = torch.tensor([e.group is None or mine[e.group] for e in self.vector.entries])
        self.values, self.slopes = merged, torch.where(rows, slopes, self.slopes)
        return values

    def state_dict(self) -> dict[str, Any]:
        return {"values": dict(self.values), "slopes": self.slopes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.values, self.slopes = dict(state["values"]), state["slopes"].clone()
