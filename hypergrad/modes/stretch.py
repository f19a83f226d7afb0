"""What every mode of differentiation takes and gives: a stretch of training, and the result."""

from __future__ import annotations

import copy
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hypergrad.graph import Linearization
from hypergrad.problem import Problem
from hypergrad.updates.binding import State, Values
from hypergrad.updates.rule import Tensors, parts
from hypergrad.updates.transition import CLIPS, Transition


@dataclass
class Result:
    """A hypergradient.

    Attributes:
        value: the validation loss, 0-d.
        gradients: name -> derivative of `value` in that hyperparameter's value. Shape [n_groups] for names of param groups
            ([n_groups, 2] for betas), [] for a clipping threshold, the tensor's own shape for hyperparameters in the
            loss; with per_step one more leading dimension [steps].
        stats: steps, seconds, peak_bytes (growth of memory), gradient_evaluations (gradients of the training loss),
            hessian_products, growth_rate (of the tangent's or adjoint's norm, per step, natural log), warnings (sentences),
            and for mode="implicit" solver_iterations (products that the solver asked for; terms of a look-back),
            solver_residual (‖b − A x‖/‖b‖; of a look-back the part of it in θ) and, without look_back, gradient_norm.
    """

    value: Tensor
    gradients: dict[str, Tensor]
    stats: dict[str, Any] = field(default_factory=dict)


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
        wrt: names in param_groups, of the clipping threshold, and keys of `hypers`.
        hypers: tensors in the loss.
        steps: with per-step hypergradients, the number of steps; else None.
    """

    def __init__(self, transition: Transition, wrt: Sequence[str], hypers: Tensors, steps: int | None = None):
        self.transition, self.hypers, self.wrt, self.steps = transition, hypers, tuple(wrt), steps
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.entries: list[Entry] = []
        n_groups, prefix = len(transition.groups), () if steps is None else (steps,)
        for name in wrt:
            if name in hypers:
                shape: tuple[int, ...] = tuple(hypers[name].shape)
            elif name in CLIPS:
                shape = ()
            else:
                shape = (n_groups,) if len(parts(name)) == 1 else (n_groups, len(parts(name)))
            self.shapes[name] = prefix + shape
            self.entries += list(self._entries(name, prefix + shape, name not in hypers and name not in CLIPS))

    def _entries(self, name: str, shape: tuple[int, ...], grouped: bool) -> Iterator[Entry]:
        lead = 0 if self.steps is None else 1
        for flat in range(torch.Size(shape).numel()):
            index: tuple[int, ...] = tuple(int(i) for i in np.unravel_index(flat, shape))
            group = index[lead] if grouped else None
            if group is not None and parts(name)[0] not in self.transition.rules[group].hyperparameters:
                continue
            part = parts(name)[index[-1]] if len(parts(name)) > 1 else name
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
            if entry.name in self.hypers or entry.step not in (None, t):
                continue
            if entry.group is None:
                clip = like.new_zeros(len(self), 1) if clip is None else clip
                column = clip
            else:
                column = columns[entry.group].setdefault(entry.part, like.new_zeros(len(self), 1))
            column[j] = 1 if scale is None else scale[j]
        return columns, clip

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

    def validate(self, t: int) -> Share:
        """Step t's share of the objective and its gradients."""
        weight = self.val_steps.count(t) / len(self.val_steps)
        found = self.problem.validate(self.val_loss, t)
        direct = {
            name: torch.zeros_like(x) if g is None else g * weight
            for (name, x), g in zip(self.problem.hypers.items(), found.of_hypers, strict=True)
        }
        stats = None if found.of_stats is None else found.of_stats * weight
        return Share(found.value * weight, self.transition.flatten(found.of_params) * weight, stats, direct)

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
        if "weight_decay" not in stretch.directions.wrt or "ill_conditioned" in self.extra:
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
        moved = stretch.problem.unfollowed_since(before)
        if moved:
            meter.extra["warnings"].append(
                f"training changes the buffers {', '.join(moved)}; a path through them to the validation loss is not part of the "
                "hypergradient. hypergrad.check tells whether that matters here."
            )
            warnings.warn(meter.extra["warnings"][-1], stacklevel=4)
