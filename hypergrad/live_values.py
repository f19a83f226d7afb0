"""Writing tuned values into the param groups of a live optimizer, beside whatever else writes there.

    alone            group[name] = value                          lr with a known length: value · shape(t)
    with a scheduler group[name] = value · (what it wrote)         the tuned value is a multiplier, starting from 1

A scheduler's own number is put back after the step: left in place ours would compound with it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hypergrad.coordinates import Coordinates, replaced
from hypergrad.schedules import decay_to_zero
from hypergrad.updates.transition import Transition

Key = tuple[str, int]  # name, group


class LiveValues:
    """The tuned values as the optimizer sees them at each step."""

    def __init__(self, transition: Transition, coordinates: Coordinates, total: int | None):
        self.transition, self.coordinates, self.total = transition, coordinates, total
        groups = transition.groups
        scheduled = [g for g, group in enumerate(groups) if "initial_lr" in group]
        if total is not None and scheduled:
            self._two_shapes()
        named = {entry.name for entry in coordinates.entries if entry.group is not None}
        self.left: dict[Key, Any] = {(name, g): group.get(name) for name in named for g, group in enumerate(groups)}
        self.base: dict[Key, Any] = {}  # what something else wrote, put back after the step
        self.multiplies = {("lr", g) for g in scheduled}
        for j, entry in enumerate(coordinates.entries):
            if (entry.name, entry.group) in self.multiplies:
                self._multiply(j)

    def _two_shapes(self) -> None:
        raise ValueError(
            "total_steps gives lr a shape of hypergrad's own, and a scheduler (or the loop) writes lr too: leave out one of them."
        )

    def shape(self, t: int) -> float:
        return 1.0 if self.total is None else decay_to_zero(t, self.total)

    def slopes(self, t: int) -> Tensor:
        """dx_t/dφ [k] of the numbers x_t that step t uses."""
        factors = [1.0] * len(self.coordinates)
        for j, entry in enumerate(self.coordinates.entries):
            if entry.group is not None and (entry.name, entry.group) in self.multiplies:
                factors[j] = float(self.base[entry.name, entry.group])
            elif entry.name == "lr":
                factors[j] = self.shape(t)
        return self.coordinates.slope() * torch.tensor(factors, dtype=torch.float64)

    def write(self, optimizer: int, t: int, untouched: bool) -> None:
        """Write the values of step t into one optimizer's groups; not if `untouched`, unless something else writes them."""
        groups = self.transition.groups
        for j, entry in enumerate(self.coordinates.entries):
            if entry.group is None or self.transition.optimizer_of_group[entry.group] != optimizer:
                continue
            key, group = (entry.name, entry.group), groups[entry.group]
            if key not in self.multiplies and self.left[key] is not None and group[entry.name] != self.left[key]:
                self._taken_over(j, key)
            value = float(self.coordinates.value[j])
            if key in self.multiplies:
                self.base[key] = group[entry.name]
                value *= float(group[entry.name])
            elif untouched:
                continue
            elif entry.name == "lr":
                value *= self.shape(t)
            group[entry.name] = self.left[key] = replaced(group[entry.name], entry, value)

    def restore(self, optimizer: int) -> None:
        """After the step: what a scheduler wrote, as it wrote it."""
        groups = self.transition.groups
        for (name, group), base in self.base.items():
            if self.transition.optimizer_of_group[group] == optimizer:
                groups[group][name] = self.left[name, group] = base

    def accept_present(self) -> None:
        """Take whatever is in the param groups now as ours (after load_state_dict)."""
        self.left = dict.fromkeys(self.left)

    def _taken_over(self, j: int, key: Key) -> None:
        """Something else wrote a value: from now on ours is a multiplier of what it writes."""
        if self.total is not None and key[0] == "lr":
            self._two_shapes()
        if key[0] not in ("lr", "weight_decay"):
            raise ValueError(f"something else writes {key[0]!r} in the param groups: take it out of `tune`.")
        self.multiplies.add(key)
        self._multiply(j)

    def _multiply(self, j: int) -> None:
        """Number j is a multiplier from now on, starting from 1."""
        coordinates = self.coordinates
        coordinates.phi, coordinates.value = coordinates.phi.clone(), coordinates.value.clone()
        coordinates.phi[j], coordinates.value[j] = 0.0, 1.0
        coordinates.low[j], coordinates.high[j] = -math.inf, math.inf
        coordinates.m[j] = coordinates.s[j] = coordinates.count[j] = torch.zeros(())
