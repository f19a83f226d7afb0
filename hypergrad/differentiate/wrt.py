"""The numbers that are differentiated in, as directions 0 … k−1: names, shapes, seeds."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from hypergrad.differentiate.per_element import Granularity, Rows
from hypergrad.differentiate.schedule_gradients import Schedules
from hypergrad.optimizers.ema import EMA, Averaged
from hypergrad.optimizers.rule import Tensors, parts
from hypergrad.optimizers.transition import CLIPS, Transition


@dataclass(frozen=True)
class Entry:
    """One number that is differentiated in: one element of one gradient array."""

    name: str
    index: tuple[int, ...]  # in the array gradients[name]
    group: int | None  # None: a hyperparameter in the loss, or a clipping threshold
    part: str  # the rule's name of it (beta1)
    step: int | None  # None: the same number at every step


class Directions:
    """The numbers to differentiate in, numbered 0 … k−1.

    Args:
        transition: the optimizer.
        wrt: names in param_groups, of the clipping threshold or of the average's decay, and keys of `hypers`.
        hypers: tensors in the loss and in schedules.
        steps: with per-step hypergradients, the number of steps; else None.
        per: name -> "parameter" or "element", for names that are not differentiated per group.
        schedules: of names in param_groups.
    """

    def __init__(
        self,
        transition: Transition,
        wrt: Sequence[str],
        hypers: Tensors,
        steps: int | None = None,
        per: Mapping[str, str] | None = None,
        schedules: Schedules | None = None,
    ):
        self.transition, self.hypers, self.wrt, self.steps = transition, hypers, tuple(wrt), steps
        self.fine = Granularity(transition, per or {})
        self.schedules = schedules or Schedules({}, {}, {})
        self.ungrouped = {*hypers, *CLIPS, *((EMA,) if isinstance(transition, Averaged) else ())}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name in wrt:
            shape = tuple(hypers[name].shape) if name in hypers else ()
            if name not in self.ungrouped:
                shape = (self.fine.count(name), *((len(parts(name)),) if len(parts(name)) > 1 else ()))
            self.shapes[name] = shape if steps is None else (steps, *shape)

    @cached_property  # the adjoint does not need them, and they may be many
    def entries(self) -> list[Entry]:
        return [entry for name in self.wrt for entry in self._entries(name)]

    def _entries(self, name: str) -> Iterator[Entry]:
        lead, shape, groups = 0 if self.steps is None else 1, self.shapes[name], self.fine.group_of(name)
        for flat in range(torch.Size(shape).numel()):
            index: tuple[int, ...] = tuple(int(i) for i in np.unravel_index(flat, shape))
            group = None if name in self.ungrouped else groups[index[lead]]
            if group is not None and parts(name)[0] not in self.transition.rules[group].hyperparameters:
                continue
            part = parts(name)[index[-1]] if len(parts(name)) > 1 else name
            if name == EMA and name not in self.hypers:
                group = 0  # see optimizers/ema.py
            yield Entry(name, index, group, part, index[0] if lead else None)

    def __len__(self) -> int:
        return len(self.entries)

    def subset(self, indices: Sequence[int]) -> Directions:
        """The same with some of the numbers only."""
        other = copy.copy(self)
        other.entries = [self.entries[j] for j in indices]
        return other

    def zeros(self) -> Tensors:
        like = self.transition.params[0]
        return {name: like.new_zeros(shape) for name, shape in self.shapes.items()}

    def pack(self, vector: Tensor) -> Tensors:
        """A vector [k] as gradient arrays."""
        out = self.zeros()
        for entry, x in zip(self.entries, vector, strict=True):
            out[entry.name][entry.index] = x
        return out

    def seeds(self, t: int, scale: Tensor | None = None) -> tuple[list[Tensors], Tensor | None]:
        """Tangents of each group's scalars at step t, [k, 1] each, and of the clipping threshold.

        Args:
            scale: [k], the derivative of each number at step t in the quantity that is differentiated in; default 1.
        """
        like = self.transition.params[0]
        columns: list[Tensors] = [{} for _ in self.transition.groups]
        clip = None
        for j, entry in enumerate(self.entries):
            if entry.name in self.hypers or entry.name in self.fine.per or entry.step not in (None, t):
                continue
            if entry.group is None:
                clip = like.new_zeros(len(self), 1) if clip is None else clip
                column = clip
            else:
                column = columns[entry.group].setdefault(entry.part, like.new_zeros(len(self), 1))
            column[j] = 1 if scale is None else scale[j]
        for group, part, slopes in self.schedules.slopes(t):
            if group is None:
                column = clip = like.new_zeros(len(self), 1) if clip is None else clip
            else:
                column = columns[group].setdefault(part, like.new_zeros(len(self), 1))
            for name in slopes.keys() & self.shapes.keys():
                first, size = self._first(name), self.hypers[name].numel()
                first += 0 if self.steps is None else t * size
                column[first : first + size, 0] += slopes[name].reshape(-1).to(column)
        return columns, clip

    def _first(self, name: str) -> int:
        """The number of a tensor's first direction; the others follow."""
        return next(j for j, entry in enumerate(self.entries) if entry.name == name)

    def fine_rows(self, t: int) -> Rows:
        """The directions that are numbers of one parameter or element, at step t."""
        found: dict[str, list[tuple[int, int]]] = {}
        lead = 0 if self.steps is None else 1
        for j, entry in enumerate(self.entries if self.fine.per else ()):
            if entry.name in self.fine.per and entry.step in (None, t):
                found.setdefault(entry.part, []).append((j, entry.index[lead]))
        pairs = {part: torch.tensor(x) for part, x in found.items()}
        return {part: (x[:, 0], x[:, 1]) for part, x in pairs.items()}

    def differentiates(self, name: str) -> bool:
        """Whether a derivative in a name of param_groups is formed: its own, or on the way to a schedule's tensors."""
        return name in self.wrt or (name in self.schedules.functions and bool(self.hypers.keys() & set(self.wrt)))

    def into_loss(self, j: int, t: int) -> list[Tensor | None] | None:
        """Direction j among the tensors in the loss at step t: one-hot; None where it is not one of them."""
        entry = self.entries[j]
        if entry.name not in self.hypers or entry.step not in (None, t):
            return None
        one = torch.zeros_like(self.hypers[entry.name])
        one[entry.index[1:] if entry.step is not None else entry.index] = 1
        return [one if name == entry.name else None for name in self.hypers]
