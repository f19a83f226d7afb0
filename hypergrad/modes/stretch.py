"""What every mode of differentiation takes and gives: a stretch of training, and the result."""

from __future__ import annotations

import copy
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hypergrad.graph import Linearization
from hypergrad.modes.granularity import Granularity, Rows
from hypergrad.modes.scheduled import Schedules
from hypergrad.problem import Problem
from hypergrad.updates.binding import State, Values
from hypergrad.updates.ema import EMA, Averaged
from hypergrad.updates.rule import Tensors, parts
from hypergrad.updates.transition import CLIPS, Tangent, Transition


@dataclass
class Result:
    """A hypergradient.

    Attributes:
        value: the validation loss, 0-d.
        gradients: name -> derivative of `value` in that hyperparameter's value. Shape [n_groups] for names of param groups
            ([n_groups, 2] for betas), [] for a clipping threshold, the tensor's own shape for hyperparameters in the
            loss; with per="parameter" [n_params], with per="element" [n], in the order of the optimizer's groups, in place of
            [n_groups]; with per_step one more leading dimension [steps].
        stats: steps, seconds, peak_bytes (growth of memory), gradient_evaluations (gradients of the training loss),
            hessian_products, growth_rate (of the tangent's or adjoint's norm, per step, natural log), warnings (sentences),
            and for mode="implicit" solver_residual and gradient_norm.
        initial: derivative of `value` in the weights before the first step, for each parameter in the order of the optimizer's
            groups (its tensors held fixed); None for modes other than "unrolled".
    """

    value: Tensor
    gradients: dict[str, Tensor]
    stats: dict[str, Any] = field(default_factory=dict)
    initial: list[Tensor] | None = None


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

    @cached_property  # the adjoint has no use for them, and they may be many
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
                group = 0  # see updates/ema.py
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
        for group, part, slopes in self.schedules.push(t):
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

    def unreached(self, read: set[str]) -> list[str]:
        """Tensors that nothing depends on. `read`: those that a loss depends on."""
        return [name for name in self.wrt if name in self.hypers and name not in read | self.schedules.reached]

    def into_loss(self, j: int, t: int) -> list[Tensor | None] | None:
        """Direction j among the tensors in the loss at step t: one-hot; None where it is not one of them."""
        entry = self.entries[j]
        if entry.name not in self.hypers or entry.step not in (None, t):
            return None
        one = torch.zeros_like(self.hypers[entry.name])
        one[entry.index[1:] if entry.step is not None else entry.index] = 1
        return [one if name == entry.name else None for name in self.hypers]


class Share(NamedTuple):
    """One validation step's share of the objective: value, gradients in θ [n], in running statistics, in the loss's tensors."""

    value: Tensor
    theta: Tensor
    stats: Tensor | None
    direct: Tensors
    averaged: bool  # θ stands for the average of the weights

    def along(self, tangent: Tangent) -> Tensor:
        """Derivatives along tangents [k]."""
        out = (tangent.slots[EMA] if self.averaged else tangent.theta) @ self.theta
        return out if self.stats is None or tangent.stats is None else out + tangent.stats @ self.stats

    def added_to(self, lam: Tangent) -> Tangent:
        """The adjoint with this share of the objective."""
        theta, slots, stats = lam.theta, lam.slots, lam.stats
        if self.averaged:
            slots = slots | {EMA: slots[EMA] + self.theta}
        else:
            theta = theta + self.theta
        if self.stats is not None:
            stats = self.stats if stats is None else stats + self.stats
        return Tangent(theta, slots, stats)


@dataclass
class Stretch:
    """A stretch of training to be differentiated: the argument of every mode.

    Args:
        values: the hyperparameters of every step.
        val_steps: numbers of completed steps at which the validation loss is taken; their mean is differentiated.
    """

    problem: Problem
    transition: Transition
    batches: Sequence[Any]
    values: Sequence[Values]
    directions: Directions
    val_loss: Callable[..., Tensor]
    val_steps: tuple[int, ...]

    def gradient(self, lin: Linearization) -> Tensor:
        return self.transition.flatten(lin.grads)

    @property
    def averaged(self) -> bool:
        return isinstance(self.transition, Averaged)

    def validate(self, t: int, state: State) -> Share:
        """Step t's share of the objective and its gradients, at a state whose parameters and buffers are in the model."""
        weight = self.val_steps.count(t) / len(self.val_steps)
        with self._evaluated_weights(state):
            found = self.problem.validate(self.val_loss, t)
        direct = {
            name: torch.zeros_like(x) if g is None else g * weight
            for (name, x), g in zip(self.problem.hypers.items(), found.of_hypers, strict=True)
        }
        stats = None if found.of_stats is None else found.of_stats * weight
        theta = self.transition.flatten(found.of_params) * weight
        return Share(found.value * weight, theta, stats, direct, self.averaged)

    @contextmanager
    def _evaluated_weights(self, state: State) -> Iterator[None]:
        """The averaged weights in the model, where there is an average."""
        if not self.averaged:
            yield
            return
        self.transition.load(state.slots[EMA])
        try:
            yield
        finally:
            self.transition.load(state.theta)

    def initial(self, lam: Tangent) -> list[Tensor]:
        """dL/dθ₀ of each parameter from the adjoint before the first step. The average starts at θ₀."""
        return self.transition.split(lam.theta + lam.slots[EMA] if self.averaged else lam.theta)

    def add_direct(self, gradients: Tensors, direct: Tensors) -> None:
        """Add the direct dependence of the validation loss on tensors in the training loss, once."""
        for name, g in direct.items():
            if name in gradients:
                target = gradients[name][-1] if self.directions.steps is not None else gradients[name]
                target += g


class Meter:
    """Counts what a mode did, for `Result.stats`."""

    def __init__(self, device: torch.device):
        self.device, self.start = device, time.perf_counter()
        self.gradients = self.products = 0
        self.first_norm = self.last_norm = float("nan")
        self.norm_steps = 0
        self.extra: dict[str, Any] = {"warnings": []}
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.base = self._peak()

    def _peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def norm(self, x: Tensor) -> None:
        """Note the norm of the tangent or adjoint after one more step."""
        norm = float(torch.linalg.vector_norm(x))
        if norm > 0:
            if self.norm_steps == 0:
                self.first_norm = norm
            self.last_norm, self.norm_steps = norm, self.norm_steps + 1

    def look_for_ill_conditioning(self, stretch: Stretch, state: State, g: Tensor, t: int) -> None:
        """Note where the derivative in weight_decay is about lr·θ/eps: coupled decay at 0, gradients exactly 0."""
        if not stretch.directions.differentiates("weight_decay") or "ill_conditioned" in self.extra:
            return
        groups = stretch.transition.ill_conditioned_decay(state, g, stretch.values[t])
        if groups:
            self.extra["ill_conditioned"] = ["weight_decay"]
            self.extra["warnings"].append(
                f"the derivative in weight_decay is ill-conditioned in param groups {groups}: with coupled decay at 0 and "
                "gradients that are exactly 0 it is about lr * p / eps. Use a weight decay above 0, a larger eps, or AdamW."
            )
            warnings.warn(self.extra["warnings"][-1], stacklevel=2)

    def stats(self, steps: int) -> dict[str, Any]:
        growth = float("nan")
        if self.norm_steps > 1:
            growth = float(torch.tensor(self.last_norm / self.first_norm).log() / (self.norm_steps - 1))
        return {
            "steps": steps,
            "seconds": time.perf_counter() - self.start,
            "peak_bytes": self._peak() - self.base,
            "gradient_evaluations": self.gradients,
            "hessian_products": self.products,
            "growth_rate": growth,
        } | self.extra


@contextmanager
def evaluation(stretch: Stretch) -> Iterator[Meter]:
    """Run a mode on the user's model in place and leave everything as it was found."""
    with stretch.problem.untouched():
        stretch.problem.follow_running_stats(stretch.val_loss, stretch.val_steps[-1])
        meter, before = Meter(stretch.problem.device), stretch.problem.read_buffers()
        yield meter
        for name in stretch.directions.unreached(stretch.problem.read):
            meter.extra["warnings"].append(
                f"nothing depends on hypers[{name!r}], neither the training loss, nor a schedule, nor val_loss: gradient 0."
            )
        moved = stretch.problem.unfollowed_since(before)
        if moved:
            meter.extra["warnings"].append(
                f"training changes the buffers {', '.join(moved)}; a path through them to the validation loss is not part of the "
                "hypergradient. hypergrad.check tells whether that matters here."
            )
            warnings.warn(meter.extra["warnings"][-1], stacklevel=4)
