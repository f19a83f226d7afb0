"""Writing tuned values into the param groups of a live optimizer, beside whatever else writes there.

    alone            group[name] = value                          lr with a known length: value · shape(t)
    with a scheduler group[name] = value · (what it wrote)         the tuned value is a multiplier, starting from 1

A scheduler's own number is put back after the step: left in place ours would compound with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hypergrad.online.hyper_vector import HyperVector
from hypergrad.online.lr_shape import decay_to_zero
from hypergrad.optimizers.group_values import plain, replaced
from hypergrad.optimizers.transition import Transition

Key = tuple[str, int]  # name, group


class ParamGroupWriter:
    """The tuned values as the optimizer sees them at each step."""

    def __init__(self, transition: Transition, vector: HyperVector, total: int | None):
        self.transition, self.vector, self.total = transition, vector, total
        groups = transition.groups
        scheduled = [g for g, group in enumerate(groups) if "initial_lr" in group]
        if total is not None and scheduled:
            self._two_shapes()
        for entry in vector.entries:
            if entry.name in ("momentum", "betas") and any("base_momentum" in group for group in groups):
                self._not_beside_a_scheduler(entry.name)
        named = {entry.name for entry in vector.entries if entry.group is not None}
        self.left: dict[Key, Any] = {(n, g): plain(x.get(n)) for n in named for g, x in enumerate(groups)}
        self.found = dict(self.left)
        self.fresh: dict[Key, Any] = {}  # what was there before a state was loaded, until the first step after it
        self.base: dict[Key, Any] = {}  # what something else wrote, put back after the step
        self.multiplies = {("lr", g) for g in scheduled}
        for j, entry in enumerate(vector.entries):
            if (entry.name, entry.group) in self.multiplies:
                self._multiply(j)

    def _not_beside_a_scheduler(self, name: str) -> None:
        raise ValueError(f"something else writes {name!r} in the param groups: take it out of `tune`.")

    def _two_shapes(self) -> None:
        raise ValueError(
            "total_steps gives lr a shape of hypergrad's own, and a scheduler (or the loop) writes lr too: leave out one of them."
        )

    def writes_lr_alone(self) -> bool:
        """Whether lr is tuned from the groups' own values, and nothing else writes it."""
        mine = [j for j, entry in enumerate(self.vector.entries) if entry.name == "lr"]
        alone = not any(self.vector.given[j] for j in mine) and not any(n == "lr" for n, _ in self.multiplies)
        return bool(mine) and alone

    def shape(self, t: int) -> float:
        return 1.0 if self.total is None else decay_to_zero(t, self.total)

    def slopes(self, t: int) -> Tensor:
        """dx_t/dφ [k] of the numbers x_t that step t uses."""
        factors = [1.0] * len(self.vector)
        for j, entry in enumerate(self.vector.entries):
            if entry.group is not None and (entry.name, entry.group) in self.multiplies:
                factors[j] = float(self.base.get((entry.name, entry.group), 1.0))
            elif entry.name == "lr":
                factors[j] = self.shape(t)
        return self.vector.slope() * torch.tensor(factors, dtype=torch.float64)

    def write(self, optimizer: int, t: int, untouched: bool, known: dict[Key, float]) -> list[int]:
        """Write the values of step t into one optimizer's groups; not if `untouched`, unless something else writes them.

        known: values that are tensors on the device, as they were read; as they are written, on return.

        Returns:
            the numbers that have become multipliers at this step: something else has begun to write them.
        """
        groups, multipliers = self.transition.groups, list[int]()
        for j, entry in enumerate(self.vector.entries):
            if entry.group is None or self.transition.optimizer_of_group[entry.group] != optimizer:
                continue
            key, group = (entry.name, entry.group), groups[entry.group]
            now = known[key] if key in known else plain(group[entry.name])
            if key not in self.multiplies and now != self.left[key] and not self._not_loaded(key, now, group):
                self._taken_over(j, key)
                multipliers.append(j)
            value = float(self.vector.value[j])
            if key in self.multiplies:
                self.base[key] = now
                value *= float(now)
            elif untouched and not self.vector.given[j]:
                continue
            elif entry.name == "lr":
                value *= self.shape(t)
            self._put(group, entry.name, replaced(now, entry.name, entry.part, value))
            if key in known:
                known[key] = torch.tensor(value, dtype=group[entry.name].dtype).item()
            self.left[key] = known[key] if key in known else plain(group[entry.name])
            self.fresh.pop(key, None)
        return multipliers

    def restore(self, optimizer: int) -> None:
        """After the step: what a scheduler wrote, as it wrote it."""
        groups = self.transition.groups
        for (name, group), base in self.base.items():
            if self.transition.optimizer_of_group[group] == optimizer:
                self._put(groups[group], name, base)
                self.left[name, group] = base

    @staticmethod
    def _put(group: dict[str, Any], name: str, value: Any) -> None:
        """Write a value; into the user's own tensor where the group holds one."""
        if isinstance(group[name], Tensor):
            group[name].fill_(value)
        else:
            group[name] = value

    def state_dict(self) -> dict[str, Any]:
        return {
            "multiplies": sorted([list(key) for key in self.multiplies], key=str),
            "left": [[*key, value] for key, value in self.left.items()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.multiplies = {(str(name), int(group)) for name, group in state["multiplies"]}
        self.left = {(str(name), int(group)): value for name, group, value in state["left"]}
        self.fresh = dict(self.found)

    def _not_loaded(self, key: Key, now: Any, group: dict[str, Any]) -> bool:
        """Whether a group's value is that of a fresh optimizer beside a tuner that goes on: its state was not loaded."""
        return key in self.fresh and now == self.fresh[key] and "initial_lr" not in group

    def _taken_over(self, j: int, key: Key) -> None:
        """Something else wrote a value: from now on ours is a multiplier of what it writes."""
        if self.total is not None and key[0] == "lr":
            self._two_shapes()
        if key[0] not in ("lr", "weight_decay"):
            self._not_beside_a_scheduler(key[0])
        self.multiplies.add(key)
        self._multiply(j)

    def _multiply(self, j: int) -> None:
        """Number j is a multiplier from now on, starting from 1."""
        vector, entry = self.vector, self.vector.entries[j]
        if vector.given[j] or vector.kinds[j].bounds is not None:
            raise ValueError(
                f"a scheduler (or the loop) writes {entry.name}: the tuned value is a multiplier of what it writes, and starts "
                f"from 1. Leave start and bounds of {entry.name} out."
            )
        vector.become_multiplier(j)
