"""Writing tuned values into the param groups of a live optimizer, beside whatever else writes there.

    alone               group[name] = value                         lr with a known length: value · decay_to_zero(t)
    with a scheduler    group[name] = value · (written / base)      its shape is the shape, with a known length too

`base` is the lr that a scheduler starts from (`initial_lr`), so that `value` is an lr, and a warm start and phases go on as
without a scheduler. A scheduler's own number is put back after the step: left in place ours would compound with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hypergrad.online.hyper_vector import HyperVector
from hypergrad.online.schedulers import absolute_numbers, holds_plateau
from hypergrad.optimizers.group_values import plain, replaced
from hypergrad.optimizers.transition import Transition
from hypergrad.schedules import decay_to_zero

Key = tuple[str, int]  # name, group
SCALED = ("lr", "weight_decay")  # names that something else may write too
FARTHEST = 100.0  # an lr of SWALR so many times the initial one, or below 1/so many, is no shape


class ParamGroupWriter:
    """The tuned values as the optimizer sees them at each step.

    Attributes:
        bases: of the numbers that something else writes, what counts there as 1.
        applied: the numbers that the last step used.
        notes: sentences for the user, not said yet.
    """

    def __init__(self, transition: Transition, vector: HyperVector, total: int | None):
        self.transition, self.vector, self.total = transition, vector, total
        named = {entry.name for entry in vector.entries if entry.group is not None}
        self.typed: dict[Key, Any] = {(n, g): plain(x.get(n)) for n in named for g, x in enumerate(transition.groups)}
        self.fresh: dict[Key, Any] = {}  # what was there before a state was loaded, until the first step after it
        self.left: dict[Key, Any] = dict(self.typed)  # what was in the groups after the last step; None: not known
        self.bases: dict[Key, float] = {}
        self.written: dict[Key, Any] = {}  # by something else, put back after the step
        self.applied: dict[Key, Any] = {}
        self.last_shape: dict[int, float] = {}  # of lr, at each optimizer's last step
        self.notes: list[str] = []
        for i in range(len(transition.optimizers)):
            self._find_schedulers(i, -1, self._numbers(i))

    def _numbers(self, optimizer: int) -> list[tuple[int, Key]]:
        """The numbers that are written into one optimizer's groups."""
        return [
            (j, (entry.name, entry.group))
            for j, entry in enumerate(self.vector.entries)
            if entry.group is not None and self.transition.optimizer_of_group[entry.group] == optimizer
        ]

    def writes_lr_from_groups(self) -> bool:
        """Whether lr is tuned, from the groups' own values."""
        mine = [j for j, entry in enumerate(self.vector.entries) if entry.name == "lr" and entry.group is not None]
        return bool(mine) and not any(self.vector.given[j] for j in mine)

    # ---- lr's shape

    def decay(self, t: int) -> float:
        """The shape that hypergrad gives lr where nothing else does."""
        return 1.0 if self.total is None else decay_to_zero(t, self.total)

    def lr_shape(self, t: int, optimizer: int) -> float:
        """lr at step t over its value, after `observe`: of the optimizer's first group whose lr is tuned, or else of any."""
        groups = [e.group for e in self.vector.entries if e.name == "lr" and e.group is not None]
        mine = [g for g in groups if self.transition.optimizer_of_group[g] == optimizer]
        for g in mine or groups:
            return self._ratio(("lr", g)) if ("lr", g) in self.bases else self.decay(t)
        return 1.0

    def peak_shape(self, optimizer: int) -> float:
        """The largest shape that lr is known to come to: 1, but for schedulers that start from a fraction of it (OneCycleLR)."""
        found = [
            float(plain(group["max_lr"])) / self.bases["lr", g]
            for g, group in enumerate(self.transition.groups)
            if "max_lr" in group and ("lr", g) in self.bases and self.transition.optimizer_of_group[g] == optimizer
        ]
        return max([1.0, *found])

    def steps_left(self, t: int, optimizer: int) -> float:
        """Σ lr over the steps from t to the end, over lr at t; a scheduler is taken to decay to zero as hypergrad would."""
        assert self.total is not None
        peak = self.peak_shape(optimizer)
        return sum(self.decay(s) for s in range(t, self.total)) * peak / self.lr_shape(t, optimizer)

    def slopes(self, t: int) -> Tensor:
        """dx_t/dφ [k] of the numbers x_t that step t uses."""
        factors = [1.0] * len(self.vector)
        for j, entry in enumerate(self.vector.entries):
            if entry.group is not None and (entry.name, entry.group) in self.bases:
                factors[j] = self._ratio((entry.name, entry.group))
            elif entry.name == "lr" and entry.group is not None:
                factors[j] = self.decay(t)
        return self.vector.slope() * torch.tensor(factors, dtype=torch.float64)

    def _ratio(self, key: Key) -> float:
        return float(self.written.get(key, self.bases[key])) / self.bases[key]

    def present(self) -> dict[Key, Any]:
        """What is in the param groups now, of the names that are tuned."""
        found = self.transition.values()
        return {(name, g): found[name][g] for name, g in self.typed}

    # ---- around a step

    def observe(self, optimizer: int, t: int, known: dict[Key, float]) -> list[int]:
        """Read what one optimizer's groups hold before step t. known: those that are tensors on a device, as they were read.

        Returns:
            the numbers that something else has begun to write.
        """
        keys = self._numbers(optimizer)
        begun = self._find_schedulers(optimizer, t, keys)
        for j, key in keys:
            now = known[key] if key in known else plain(self.transition.groups[key[1]][key[0]])
            other = key not in self.bases and self.left[key] is not None and now != self.left[key]
            if other and not self._not_loaded(key, now):
                self._taken_over(j, key, t, float(now))
                begun.append(j)
            if key in self.bases:
                self.written[key] = now
        return begun

    def write(self, optimizer: int, t: int, untouched: bool, known: dict[Key, float]) -> None:
        """Write the values of step t into one optimizer's groups; not if `untouched`, unless something else writes them.

        known: as in `observe`; on return, as they are written.
        """
        groups = self.transition.groups
        for j, key in self._numbers(optimizer):
            entry, group = self.vector.entries[j], groups[key[1]]
            value = float(self.vector.value[j])
            now = known[key] if key in known else plain(group[entry.name])
            self.applied[key] = now
            if key in self.bases:
                value = float(self.written[key]) * (
                    value / self.bases[key]
                )  # as written, bit for bit, where value is the base
            elif untouched and not self.vector.given[j]:
                continue
            elif entry.name == "lr":
                value *= self.decay(t)
            self._put(group, entry.name, replaced(now, entry.name, entry.part, value))
            if key in known:
                known[key] = torch.tensor(value, dtype=group[entry.name].dtype).item()
            self.left[key] = self.applied[key] = known[key] if key in known else plain(group[entry.name])
            self.fresh.pop(key, None)

    def loaded(self, optimizer: int, t: int) -> None:
        """The optimizer has loaded a state, after t steps: no schedule has written its numbers.

        Before the first step lr and weight decay start from them; later the tuned ones go on.
        """
        for j, key in self._numbers(optimizer):
            group = self.transition.groups[key[1]]
            now = self.left[key] = plain(group[key[0]])
            first = plain(group["initial_lr"]) if key in self.bases and "initial_lr" in group else now
            if t > 0 or key[0] not in SCALED or first == 0:
                continue
            self.typed[key] = now
            if key in self.bases:
                self.bases[key] = float(first)
            if not self.vector.given[j]:
                self.vector.start_at(j, float(first))

    def restore(self, optimizer: int, t: int) -> None:
        """After step t: what a scheduler wrote, as it wrote it."""
        self.last_shape[optimizer] = self.lr_shape(t, optimizer)
        for (name, group), written in self.written.items():
            if self.transition.optimizer_of_group[group] == optimizer:
                self._put(self.transition.groups[group], name, written)
                self.left[name, group] = written

    @staticmethod
    def _put(group: dict[str, Any], name: str, value: Any) -> None:
        """Write a value; into the user's own tensor where the group holds one."""
        if isinstance(group[name], Tensor):
            group[name].fill_(value)
        else:
            group[name] = value

    def take_notes(self) -> list[str]:
        notes, self.notes = self.notes, []
        return notes

    def state_dict(self) -> dict[str, Any]:
        return {
            "bases": [[*key, base] for key, base in self.bases.items()],
            "last shape": [list(pair) for pair in self.last_shape.items()],
            "left": [[*key, value] for key, value in self.left.items()],
            "typed": [[*key, value] for key, value in self.typed.items()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.fresh = dict(self.typed)
        self.bases = {(str(name), int(group)): float(base) for name, group, base in state["bases"]}
        self.last_shape = {int(i): float(x) for i, x in state["last shape"]}
        self.left, self.typed = (
            {(str(name), int(group)): x for name, group, x in state[kind]} for kind in ("left", "typed")
        )

    def _not_loaded(self, key: Key, now: Any) -> bool:
        """Whether a group's value is that of a fresh optimizer beside a tuner that goes on: its state was not loaded."""
        return key in self.fresh and now == self.fresh[key] and "initial_lr" not in self.transition.groups[key[1]]

    # ---- what else writes

    def _find_schedulers(self, optimizer: int, t: int, keys: list[tuple[int, Key]]) -> list[int]:
        """Scale what a scheduler writes, from step t on. keys: the optimizer's numbers. Returns those that are new."""
        groups, begun = self.transition.groups, list[int]()
        for j, key in keys:
            group = groups[key[1]]
            if key[0] in ("momentum", "betas") and "base_momentum" in group:
                self._not_beside_a_scheduler(key[0])
            if key[0] == "lr" and key not in self.bases:
                if "initial_lr" in group:
                    self._scale(j, key, self._start_of(key, group, t), t)
                    begun.append(j)
                elif self.total is not None and t == 0 and holds_plateau(self.transition.optimizers[optimizer]):
                    self._scale(j, key, float(self.typed[key]), t)
            if key[0] == "lr" and key in self.bases and "swa_lr" in group:
                self._check_swa(float(group["swa_lr"]) / self.bases[key], group["swa_lr"])
        return begun

    def _start_of(self, key: Key, group: dict[str, Any], t: int) -> float:
        """The lr that a scheduler starts from, seen first at step t. SWALR made in mid-run goes on from the present one."""
        present = t > 0 and "swa_lr" in group and self.left[key] is not None  # Lightning writes another as initial_lr
        return float(plain(self.left[key] if present else group["initial_lr"]))

    def _taken_over(self, j: int, key: Key, t: int, now: float) -> None:
        """Something else has written a value: a round part of what we left there, or a number of its own schedule."""
        if key[0] not in SCALED:
            self._not_beside_a_scheduler(key[0])
        left, optimizer = float(self.left[key]), self.transition.optimizers[self.transition.optimizer_of_group[key[1]]]
        relative = t > 0 and left != 0 and (_is_round(now / left) or holds_plateau(optimizer))
        self._scale(j, key, left if relative else float(self.typed[key]), t)

    def _scale(self, j: int, key: Key, base: float, t: int) -> None:
        """Number j scales what something else writes, from step t on, where `base` counts as 1."""
        name, group = key
        if base == 0:
            raise ValueError(
                f"{name} of param group {group} starts from 0 and is written by a scheduler: start it from a positive value."
            )
        made_now = t == 0 or self.left[key] == base  # in mid-run it starts from the lr of the last step
        if made_now and t >= 0 and not (t == 0 and self.vector.given[j]):
            self.vector.start_at(j, base)
        if name not in {other for other, _ in self.bases}:
            self.notes += absolute_numbers(self.transition.optimizers[self.transition.optimizer_of_group[group]], base)
        self.bases[key] = base

    @staticmethod
    def _check_swa(ratio: float, swa_lr: Any) -> None:
        if not 1 / FARTHEST <= ratio <= FARTHEST:
            raise ValueError(
                f"SWALR has swa_lr={swa_lr:g}, {ratio:.3g} times the optimizer's initial lr; hypergrad multiplies what a "
                "scheduler writes, so that lr would move by as much. Give it relative to the initial lr, as swa_lr=0.5 * lr."
            )

    @staticmethod
    def _not_beside_a_scheduler(name: str) -> None:
        raise ValueError(
            f"something else writes {name!r} in the param groups: take it out of `tune`, or keep a scheduler from writing it "
            "(OneCycleLR and CyclicLR: cycle_momentum=False)."
        )


def _is_round(x: float) -> bool:
    """Whether a factor has three digits at most, as 0.1 or 0.95 has."""
    return abs(float(f"{x:.3g}") - x) <= 1e-6 * abs(x)
