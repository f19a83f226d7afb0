"""The vector φ of all numbers that a tuner moves: where each is written, and its transform."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hypergrad.core.float64 import on_host
from hypergrad.core.hyperparameters import KIND_OF, START_FROM_ZERO, Hyperparameter
from hypergrad.differentiate.wrt import Directions, Entry
from hypergrad.optimizers.group_values import part_of, plain
from hypergrad.optimizers.rule import Tensors
from hypergrad.optimizers.transition import Transition


class HyperVector:
    """Values and transformed values of the tuned numbers, in the order of `directions.entries`.

    Args:
        transition: the optimizer.
        spec: name → Hyperparameter, for names of param groups.
        hyper_spec: name → Hyperparameter, for tensors in the loss.
        hypers: name → leaf tensor of those, written in place.

    Numbers that are 0 in some groups only are left alone there; `notes` says where 0 was replaced by a start.
    """

    def __init__(
        self,
        transition: Transition,
        spec: Mapping[str, Hyperparameter],
        hyper_spec: Mapping[str, Hyperparameter],
        hypers: Tensors,
    ):
        self.transition, self.hypers = transition, hypers
        self.notes: list[str] = []
        self.directions = Directions(transition, [*spec, *hyper_spec], hypers)
        found = transition.values()
        kept, values = [], []
        for entry in self.directions.entries:
            x = self._first_value(entry, spec, found)
            if x is not None:
                kept.append(entry)
                values.append(x)
        if not kept:
            raise ValueError("there is nothing to tune: every named hyperparameter is 0 where a group has it.")
        self.directions.entries = kept
        self.kinds = [{**spec, **hyper_spec}[entry.name] for entry in kept]
        # numbers whose start the user gave, rather than the param groups
        self.given = [e.group is not None and spec[e.name].start is not None for e in kept]
        self.value = torch.tensor(values, dtype=torch.float64)
        limits = torch.tensor([kind.limits for kind in self.kinds], dtype=torch.float64)
        self.low, self.high = limits[:, 0], limits[:, 1]
        self.scaled = torch.tensor([kind.kind != "free" for kind in self.kinds])  # φ is a logarithm or a logit
        self.phi = self._each("to_free", self.value)
        self._found = self.phi, self.value
        self._slope = self.value, self._each("slope", self.value)
        positive = torch.tensor([kind.kind == "positive" for kind in self.kinds])
        self.is_lr = self.called("lr") & positive
        self.moving: list[int] = list(range(len(kept)))  # the numbers that are tuned at present
        self.tuned = self.directions  # their directions

    def __len__(self) -> int:
        return len(self.kinds)

    @property
    def entries(self) -> list[Entry]:
        return self.directions.entries

    @property
    def labels(self) -> list[str]:
        """Name and place of each number: lr/0, betas/1/0."""
        return ["/".join([e.name, *map(str, e.index)]) for e in self.entries]

    def by_name(self, groups: Mapping[tuple[str, int], Any], values: bool = True) -> dict[str, Tensor]:
        """What is tuned, as tensors by name.

        Args:
            groups: numbers of the param groups, by name and group; None where a group has none.
            values: put those of this vector in their place.
        """
        out: dict[str, Tensor] = {}
        for name, shape in self.directions.shapes.items():
            if name in self.hypers:
                out[name] = self.hypers[name].detach().clone()
                continue
            column = [groups[name, g] for g in range(len(self.transition.groups))]
            out[name] = torch.tensor([math.nan if x is None else x for x in column], dtype=torch.float64).view(shape)
        for entry, x in zip(self.entries, self.value, strict=True):
            if entry.group is not None and values:
                out[entry.name][entry.index] = x
        return out

    def tune_only(self, names: Collection[str]) -> bool:
        """Tune only the numbers of these names from now on. True where that is a change."""
        moving = [j for j, entry in enumerate(self.entries) if entry.name in names]
        if moving == self.moving:
            return False
        self.moving, self.tuned = moving, self.directions.subset(moving)
        return True

    def _first_value(self, entry: Entry, spec: Mapping[str, Hyperparameter], found: Any) -> float | None:
        if entry.group is None:
            return float(self.hypers[entry.name].detach()[entry.index])
        start, column = spec[entry.name].start, found[entry.name]
        present = [part_of(x, entry.name, entry.part) for x in column]
        if entry.name == "lr":  # a scheduler's first value is its shape's
            present = [
                plain(group.get("initial_lr", x)) for group, x in zip(self.transition.groups, present, strict=True)
            ]
        if present[entry.group] == 0 and any(present):
            return None  # 0 here, not elsewhere: it stays 0 here
        if start is not None:
            x = on_host(start)
            shape = self.directions.shapes[entry.name]
            if x.dim() and tuple(x.shape) != shape:
                raise ValueError(f"start of {entry.name} must be a number or have shape {shape}, got {tuple(x.shape)}.")
            return float(x if x.dim() == 0 else x[entry.index])
        if present[entry.group] == 0:
            x = START_FROM_ZERO.get(entry.name)
            if x is None:
                raise ValueError(
                    f"{entry.name} is 0: pass tune={{'{entry.name}': hypergrad.Hyperparameter(start=...)}}."
                )
            note = f"{entry.name} is 0 in every param group; it is tuned from {x:g} (Hyperparameter(start=...) changes that)."
            if note not in self.notes:
                self.notes.append(note)
            return self._in_range(entry, spec, x)
        return self._in_range(entry, spec, float(present[entry.group]))

    @staticmethod
    def _in_range(entry: Entry, spec: Mapping[str, Hyperparameter], value: float) -> float:
        try:
            Hyperparameter(value, spec[entry.name].bounds, spec[entry.name].kind)
        except ValueError as error:
            raise ValueError(f"{entry.name} of param group {entry.group}: {error}") from error
        return value

    def _each(self, method: str, x: Tensor) -> Tensor:
        out = torch.ones_like(x) if method == "slope" else x.clone()  # of free ones, which may be many
        for j in self.scaled.nonzero().flatten().tolist():
            out[j] = getattr(self.kinds[j], method)(x[j])
        return out

    def slope(self) -> Tensor:
        """dx/dφ [k], float64."""
        if self._slope[0] is not self.value:  # values are replaced, not written to
            self._slope = self.value, self._each("slope", self.value)
        return self._slope[1].clone()

    def rows(self, name: str, optimizer: int | None = None) -> list[int]:
        """Places among the numbers tuned at present of those of this name (and optimizer)."""
        mine = self.called(name, optimizer).tolist()
        return [k for k, j in enumerate(self.moving) if mine[j]]

    def pairs(self, name: str, other: str, tuned: Tensor) -> list[tuple[int, int]]:
        """Places of these two names' numbers in each group that has both, the first of which is `tuned` [k]."""
        mine = [(j, e) for j, e in enumerate(self.entries) if e.group is not None]
        at = {(e.name, e.group): j for j, e in mine if self.kinds[j].kind == KIND_OF.get(e.name)}
        averages = [getattr(rule, "averages", False) for rule in self.transition.rules]
        groups = [g for n, g in at if n == name and not (other == "momentum" and g is not None and averages[g])]
        pairs = ((at[name, group], at.get((other, group))) for group in groups)
        return [(i, j) for i, j in pairs if j is not None and tuned[i]]

    def tuned_mask(self) -> Tensor:
        """The numbers that are tuned at present [k] bool."""
        mask = torch.zeros(len(self), dtype=torch.bool)
        mask[self.moving] = True
        return mask

    def called(self, name: str, optimizer: int | None = None) -> Tensor:
        """The numbers that param groups (of one optimizer) have by this name [k] bool; a tensor in the loss may have it too."""
        of = self.transition.optimizer_of_group
        return torch.tensor(
            [
                e.name == name and e.group is not None and (optimizer is None or of[e.group] == optimizer)
                for e in self.entries
            ]
        )

    # ---- φ, its values and bounds: every move goes through `apply`

    def apply(self, phi: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> None:
        """Set φ, kept within its bounds, and the bounds where they are given. A value whose φ does not change stays as it is."""
        self.low, self.high = self.low if low is None else low, self.high if high is None else high
        moved = phi.clamp(self.low, self.high)
        changed = moved != self.phi
        self.phi = moved
        self.value = torch.where(changed, self._each("from_free", moved), self.value)

    def reset(self) -> None:
        """φ and its values as they were found."""
        self.phi, self.value = self._found

    def multiplied(self, mine: Tensor, factor: float) -> Tensor:
        """φ with the values of positive numbers `mine` [k] multiplied."""
        return torch.where(mine, self.phi + torch.tensor(factor).log(), self.phi)

    def multiply_number(self, j: int, factor: float) -> None:
        """Multiply the value of one positive number."""
        phi = self.phi.clone()
        phi[j] += math.log(factor)
        self.apply(phi)

    def put(self, j: int, value: float) -> None:
        """Set the value of one number."""
        phi = self.phi.clone()
        phi[j] = self.kinds[j].to_free(torch.tensor(value))
        self.apply(phi)

    def start_at(self, j: int, value: float) -> None:
        """Set the value of one number, to the last bit unless that is out of its bounds."""
        self.put(j, value)
        if self.low[j] < self.phi[j] < self.high[j]:
            self.value = self.value.clone()
            self.value[j] = value

    def bound(self, j: int, smaller: float, larger: float) -> None:
        """Keep one positive number within these factors of its present value."""
        low, high = self.low.clone(), self.high.clone()
        low[j], high[j] = self.phi[j] + math.log(smaller), self.phi[j] + math.log(larger)
        self.apply(self.phi, low, high)

    def write_hypers(self) -> None:
        """Write the tensors in the loss, in place."""
        with torch.no_grad():
            for name, x in self.hypers.items():
                mine = [j for j, entry in enumerate(self.entries) if entry.name == name]
                x.copy_(self.value[mine].view(x.shape))

    def state_dict(self) -> dict[str, Any]:
        return {
            "names": self.labels,
            "phi": self.phi.clone(),
            "value": self.value.clone(),
            "low": self.low.clone(),
            "high": self.high.clone(),
            "moving": list(self.moving),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.phi, self.value = state["phi"].clone(), state["value"].clone()
        self.low, self.high = state["low"].clone(), state["high"].clone()
        self.tune_only({self.entries[j].name for j in state["moving"]})
        self.write_hypers()


def specification(names: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    """What `tune=` was given, as name → what the user wrote for it (None: the value in the param groups)."""
    if isinstance(names, Mapping):
        return dict(names)
    if not isinstance(names, Sequence):
        raise TypeError(f"tune must be names, or a dict name -> Hyperparameter, got {type(names).__name__}.")
    listed = (names,) if isinstance(names, str) else tuple(names)
    if len(set(listed)) < len(listed):
        raise ValueError(f"a hyperparameter is named twice in {listed}.")
    return dict.fromkeys(listed)
