"""A user's loop with torch's own optimizer, one number of it moved: what `check` takes differences of.

The number of one parameter or element is moved by means of a second optimizer, which has the moved number in the whole param
group. An update acts on each parameter (an elementwise one on each element) by itself, so that this parameter's or element's new
value is taken from the second optimizer, all others from the first.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from hypergrad.core.loss_tensors import LossTensors
from hypergrad.core.restore import Buffers, Modes, as_found, untouched
from hypergrad.core.signatures import call_val_loss, takes_hypers
from hypergrad.differentiate.schedule_gradients import Function, stacked
from hypergrad.optimizers.ema import EMA
from hypergrad.optimizers.rule import Tensors, parts


@dataclass(frozen=True)
class Moved:
    """The number that is moved: of hypers, of no group (`group` None), of a param group, or of one `owner`.

    Attributes:
        index: its place in the gradient.
        group: its param group, counted over all optimizers.
        owner: (parameter, element of it or None for all), where it has a derivative for each.
    """

    name: str
    index: tuple[int, ...]
    group: int | None = None
    owner: tuple[int, int | None] | None = None

    def shift(self, value: Any, delta: float) -> Any:
        """A group's number or tuple of numbers, moved."""
        if isinstance(value, tuple):
            return tuple(x + delta * (j == self.index[1]) for j, x in enumerate(value))
        return value + delta


class StockRun:
    """The loop from the present state. Called with a number and by how much it is moved: the validation loss.

    Args:
        model, optimizers, loss, items, val_loss, val_steps, schedules: as in `hypergradient`.
        hypers: what losses read besides; moved in place.
        single: clip_norm, clip_value and ema; None for what is off.
        how: name -> "parameter" or "element", where a number has one derivative for each.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        loss: Callable[..., Tensor],
        items: Sequence[Any],
        val_loss: Callable[..., Tensor],
        hypers: LossTensors,
        val_steps: Sequence[int] | None,
        single: Mapping[str, float | None],
        schedules: Mapping[str, Function],
        how: Mapping[str, str],
    ):
        self.model, self.optimizers, self.loss, self.items, self.val_loss = model, optimizers, loss, items, val_loss
        self.hypers, self.tensors = hypers, hypers.leaves
        self.single, self.schedules, self.how = dict(single), schedules, how
        self.val_steps = (len(items),) if val_steps is None else tuple(val_steps)
        self.groups = [(i, g) for i, opt in enumerate(optimizers) for g in range(len(opt.param_groups))]
        held = [(k, p) for k, (i, g) in enumerate(self.groups) for p in optimizers[i].param_groups[g]["params"]]
        self.group_of, self.params = [k for k, _ in held], [p for _, p in held]
        self.extra = (hypers.given,) if hypers.given and takes_hypers(loss) else ()

    def moved(self, name: str, index: tuple[int, ...]) -> Moved:
        """The number at `index` of the gradient in `name`."""
        if name in self.tensors or name in self.single:
            return Moved(name, index)
        if name not in self.how:
            return Moved(name, index, index[0])
        parameter, element = index[0], None
        if self.how[name] == "element":
            ends = list(accumulate(p.numel() for p in self.params))
            parameter = bisect_right(ends, index[0])
            element = index[0] - ends[parameter] + self.params[parameter].numel()
        return Moved(name, index, self.group_of[parameter], (parameter, element))

    def read(self, at: Moved) -> float:
        """The number now; of a schedule, at the first step."""
        name = at.name
        if name in self.tensors:
            return float(self.tensors[name].detach()[at.index])
        scheduled = self._column(name, 0) if name in self.schedules else None
        if at.group is None:
            return float(self.single[name] if scheduled is None else scheduled)  # type: ignore[arg-type]
        i, g = self.groups[at.group]
        value = self.optimizers[i].param_groups[g].get(name, 0.0) if scheduled is None else scheduled[at.group]
        return float(value[at.index[1]] if len(parts(name)) > 1 else value)

    def needs_nonnegative(self, name: str) -> bool:
        """torch.optim.RMSprop takes no step of momentum below 0, Adagrad no root of it."""
        rms = any(isinstance(opt, torch.optim.RMSprop) for opt in self.optimizers)
        return (name == "momentum" and rms) or name == "initial_accumulator_value"

    def __call__(self, at: Moved, delta: float) -> float:
        with as_found(self.model, self.optimizers), self._moved_in_place(at, delta):
            return self._train(at, delta)

    @contextmanager
    def _moved_in_place(self, at: Moved, delta: float) -> Iterator[None]:
        """One number of the tensor that the user holds is moved, and what all of `hypers` held is put back."""
        before = [x.detach().clone() for x in self.tensors.values()]
        buffers = Buffers(nn.Module(), *self.hypers.nets)
        saved = buffers.read()
        try:
            if at.name in self.tensors:
                self.tensors[at.name].data[at.index] += delta
            yield
        finally:
            for x, old in zip(self.tensors.values(), before, strict=True):
                x.data.copy_(old)
            buffers.write(saved)

    def _train(self, at: Moved, delta: float) -> float:
        twins = [twin(opt) for opt in self.optimizers]
        seconds = [twin(opt) for opt in self.optimizers] if at.owner else []
        others = twins if seconds else []  # whose numbers are not moved
        moved = seconds or twins
        if at.name == "initial_accumulator_value" and at.group is not None:  # Adagrad reads it in its constructor
            i, g = self.groups[at.group]
            for state in (moved[i].state[p] for p in moved[i].param_groups[g]["params"]):
                state["sum"] += delta * (state["step"] == 0)
        average = [p.detach().clone() for p in self.params] if self.single[EMA] is not None else None
        total = self._counted(0, average)
        for t, item in enumerate(self.items):
            now = {name: self._column(name, t) for name in self.schedules}
            single = {name: float(now[name]) if name in now else x for name, x in self.single.items()}
            if at.name in single:
                single[at.name] += delta  # type: ignore[operator]
            self._write(others, now)
            self._write(moved, now, at, delta)
            self._gradients(item, single)
            self._step(twins, seconds, at)
            if average is not None:
                for a, p in zip(average, self.params, strict=True):
                    a.lerp_(p.detach(), 1 - single[EMA])  # type: ignore[operator]
            total += self._counted(t + 1, average)
        return total / len(self.val_steps)

    def _column(self, name: str, t: int) -> Tensor:
        """A schedule's values at step t: [n_groups], [n_groups, 2] of betas, [] of what belongs to no group."""
        x, one = stacked(self.schedules[name](t, self.hypers.given)).detach(), len(parts(name))
        return x if name in self.single else x.expand(len(self.groups), *((one,) if one > 1 else ()))

    def _write(self, twins: list[Any], now: Tensors, at: Moved | None = None, delta: float = 0.0) -> None:
        """A step's numbers into the param groups of these optimizers."""
        for k, (i, g) in enumerate(self.groups if twins else ()):
            group, given = twins[i].param_groups[g], self.optimizers[i].param_groups[g]
            for name in group.keys() & now.keys():
                value = now[name][k].tolist()
                group[name] = tuple(value) if isinstance(value, list) else value
            if at and at.group == k and at.name in group:
                group[at.name] = at.shift(group[at.name] if at.name in now else given[at.name], delta)

    def _gradients(self, item: Any, single: Mapping[str, float | None]) -> None:
        for p in self.params:
            p.grad = None
        self.loss(self.model, item, *self.extra).backward()
        if single["clip_norm"] is not None:
            torch.nn.utils.clip_grad_norm_(self.params, single["clip_norm"])
        if single["clip_value"] is not None:
            torch.nn.utils.clip_grad_value_(self.params, single["clip_value"])

    def _step(self, twins: list[Any], seconds: list[Any], at: Moved) -> None:
        before = [p.detach().clone() for p in self.params] if seconds else []
        for opt in twins:
            opt.step()
        if not seconds or at.owner is None:
            return
        after, (parameter, element) = [p.detach().clone() for p in self.params], at.owner
        self._load(before)
        for opt in seconds:
            opt.step()
        own = self.params[parameter].detach().clone()
        if element is None:
            after[parameter] = own
        else:
            after[parameter].view(-1)[element] = own.view(-1)[element]
        self._load(after)

    @torch.no_grad()
    def _load(self, values: Sequence[Tensor]) -> None:
        for p, x in zip(self.params, values, strict=True):
            p.copy_(x)

    def _counted(self, t: int, average: list[Tensor] | None) -> float:
        times = self.val_steps.count(t)
        return times * self.validate(t, average) if times else 0.0

    @torch.no_grad()
    def validate(self, t: int, average: list[Tensor] | None = None) -> float:
        """The validation loss now, at the averaged weights where there are any."""
        modes = Modes(self.model, *self.hypers.nets)
        with untouched(self.params if average else (), Buffers(self.model), self.params[0].device):
            if average:
                self._load(average)
            try:
                return float(call_val_loss(self.val_loss, t))
            finally:
                modes.restore()


def twin(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The same stock optimizer on the same parameters, with groups and state of its own and without hooks."""
    other = object.__new__(type(optimizer))  # copy.copy would write to its defaults
    other.__dict__ = {
        k: v for k, v in optimizer.__dict__.items() if k != "step"
    }  # schedulers wrap step on the instance
    for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        other.__dict__[hooks] = OrderedDict()
    other.param_groups = [dict(group) for group in optimizer.param_groups]
    other.state = defaultdict(dict, {p: tree_map(_copied, state) for p, state in optimizer.state.items()})
    return other


def _copied(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) else x
