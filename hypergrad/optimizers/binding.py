"""Live `torch.optim` optimizers as flat vectors: their state read and written back, their hyperparameters and flags.

All parameters are joined into one vector θ of length n, and so is each of the optimizer's tensors (a *slot*), whose share
of a parameter may have a shape of its own.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from hypergrad.core import multi_tensor
from hypergrad.optimizers.group_values import floats
from hypergrad.optimizers.pieces import LiveSlot
from hypergrad.optimizers.registry import rule_of
from hypergrad.optimizers.rule import Tensors, UpdateRule, parts
from hypergrad.optimizers.traced.fallback import Fallback
from hypergrad.optimizers.traced.memory import same

# values[name][group] is a number, a tuple of numbers (betas) or None (the group has no such name); a clip's
# threshold is values["clip_norm"][0].
Values = dict[str, list[Any]]


@dataclass
class State:
    """θ, slots and the number of steps each parameter has taken. Never changed in place.

    `rest`: what optimizers without a rule remember besides tensors and floats, by optimizer (see memory.py).
    """

    theta: Tensor
    slots: Tensors
    counts: tuple[int, ...]
    rest: dict[int, Any] = field(default_factory=dict)

    def copied(self, dtype: torch.dtype | None = None) -> State:
        """With the slots of a live state in memory of their own; in `dtype` those of optimizers that have a rule."""
        slots = {name: x.joined(dtype) if isinstance(x, LiveSlot) else x for name, x in self.slots.items()}
        return replace(self, slots=slots)

    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.theta, *self.slots.values()))

    def equals(self, other: State) -> bool:
        """Bit for bit."""
        alike = self.counts == other.counts and self.slots.keys() == other.slots.keys() and same(self.rest, other.rest)
        pairs = (
            [(self.theta, other.theta), *((x, other.slots[name]) for name, x in self.slots.items())] if alike else []
        )
        return alike and (not pairs or bool(torch.stack([(a == b).all() for a, b in pairs]).all()))

    def like(self, theta: Tensor, slots: Tensors, active: Sequence[bool], rest: dict[int, Any]) -> State:
        return State(theta, slots, tuple(c + a for c, a in zip(self.counts, active, strict=True)), rest)


class Binding:
    """One or several live optimizers, their update rules and the ranges of their parameters in θ.

    Args:
        optimizers: live `torch.optim` optimizers; their groups are numbered consecutively.
        wrt: names that will be differentiated (a rule may keep more state for them).
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], wrt: frozenset[str]):
        self.optimizers, self.wrt = list(optimizers), wrt
        self.n_groups = [len(opt.param_groups) for opt in optimizers]
        self.optimizer_of_group = [i for i, opt in enumerate(optimizers) for _ in opt.param_groups]
        self.params: list[Tensor] = [p for group in self.groups for p in group["params"]]
        _check_params(self.params)
        self.group_of = [i for i, group in enumerate(self.groups) for _ in group["params"]]
        self.sizes = [p.numel() for p in self.params]
        ends = torch.tensor(self.sizes).cumsum(0).tolist()
        self.ranges = [(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]
        self.fallbacks = {i: self._fallback(i) for i, opt in enumerate(optimizers) if rule_of(opt) is None}
        self.takes_own_step = [self.optimizer_of_group[group] in self.fallbacks for group in self.group_of]
        self.rules: list[UpdateRule] = self._read_rules()
        self._lay_out_slots()
        known = {name for rule in self.rules for name in rule.hyperparameters}
        self.names = [
            name for name in dict.fromkeys(n for g in self.groups for n in g) if known.issuperset(parts(name))
        ]

    def _fallback(self, i: int) -> Fallback:
        group = self.optimizer_of_group.index(i)
        param = next(j for j, g in enumerate(self.group_of) if self.optimizer_of_group[g] == i)
        return Fallback(self.optimizers[i], i, group, self.ranges[param][0], param, self.wrt)

    def _read_rules(self) -> list[UpdateRule]:
        rules: list[Any] = []
        for i, opt in enumerate(self.optimizers):
            rule = rule_of(opt)
            if rule is None:
                rules += self.fallbacks[i].rules()
            else:
                rules += [rule.from_group(ChainMap(group, vars(opt)), self.wrt) for group in opt.param_groups]
        return rules

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The param groups of all optimizers, but those added since. Read each time: load_state_dict replaces them."""
        return [g for opt, n in zip(self.optimizers, self.n_groups, strict=True) for g in opt.param_groups[:n]]

    @property
    def grown(self) -> bool:
        """Whether param groups were added."""
        return any(len(opt.param_groups) > n for opt, n in zip(self.optimizers, self.n_groups, strict=True))

    def _lay_out_slots(self) -> None:
        """Names of all slots, the shape of each parameter's share of a slot, and its range in the flat slot."""
        self.slot_names = tuple(dict.fromkeys(name for rule in self.rules for name in rule.slots))
        self.slot_shapes = {
            name: [self._slot_shape(name, i) for i in range(len(self.params))] for name in self.slot_names
        }
        self.slot_ranges: dict[str, list[tuple[int, int]]] = {}
        for name, shapes in self.slot_shapes.items():
            ends = torch.tensor([0, *map(math.prod, shapes)]).cumsum(0).tolist()
            self.slot_ranges[name] = list(pairwise(ends))

    def _slot_shape(self, name: str, i: int) -> tuple[int, ...]:
        """The shape of a parameter's share; not empty for a slot that an elementwise rule may start to keep."""
        if self.takes_own_step[i]:  # its tensors are slots of their own
            return (0,)
        rule, shape = self.rules[self.group_of[i]], tuple(self.params[i].shape)
        if name in rule.slots:
            return shape if rule.elementwise else rule.slot_shapes(shape).get(name, (0,))  # type: ignore[attr-defined]
        return shape if any(other.elementwise and name in other.slots for other in self.rules) else (0,)

    def of_optimizer(self, i: int) -> Tensor:
        """1 at the parameters of optimizer i, 0 elsewhere [n]."""
        p = self.params[0]
        mine = [self.optimizer_of_group[group] == i for group in self.group_of]
        return torch.cat([p.new_full((size,), float(m)) for size, m in zip(self.sizes, mine, strict=True)]).detach()

    def flatten(self, tensors: Sequence[Tensor | None], out: Tensor | None = None) -> Tensor:
        """One flat detached vector [n], in the memory of `out`, of tensors shaped like the parameters; None counts as zero."""
        if out is None:
            like = self.params[0]
            out = torch.empty(sum(self.sizes), dtype=like.dtype, device=like.device)
        if any(x is None for x in tensors):
            out.zero_()
        pairs = zip(self.split(out), tensors, strict=True)
        given = [(piece, x.detach()) for piece, x in pairs if x is not None]
        multi_tensor.write([piece for piece, _ in given], [x for _, x in given])
        return out

    def split(self, flat: Tensor) -> list[Tensor]:
        """Views of a flat vector [n] (or of one row of a tangent), shaped like the parameters."""
        return [x.view(p.shape) for p, x in zip(self.params, flat.split(self.sizes), strict=True)]

    def load(self, theta: Tensor, silently: bool = False) -> None:
        """Write θ into the live parameters, in place.

        silently: without a new version of the tensors: autograd graphs that hold them remain usable, at this θ.
        """
        multi_tensor.write([p.data if silently else p for p in self.params], self.split(theta))

    def live_state(self, p: Tensor, group: int) -> dict[str, Any]:
        return self.optimizers[self.optimizer_of_group[group]].state.get(p, {})

    def counters(self, on_device: bool) -> dict[int, Tensor]:
        """Tensors that count the steps of parameters: on the device with fused and capturable optimizers, else on the host."""
        found = {}
        for i, (p, group) in enumerate(zip(self.params, self.group_of, strict=True)):
            step = None if self.takes_own_step[i] or self.counts_groups(i) else self.live_state(p, group).get("step")
            if isinstance(step, Tensor) and (step.device.type != "cpu") is on_device:
                found[i] = step
        return found

    def counts(self, read: Sequence[float] | None = None) -> tuple[int, ...]:
        """Steps each parameter has taken. SGD, Muon and Lion keep none; there, whether a buffer exists is what matters.

        read: what the counters on the device hold, where that was read already.
        """
        out, groups = [0] * len(self.params), self.groups
        for i, (p, group) in enumerate(zip(self.params, self.group_of, strict=True)):
            if self.takes_own_step[i]:  # its counters are part of the rest
                continue
            state = self.live_state(p, group)
            if self.counts_groups(i):
                out[i] = int(groups[group].get("step", 0))
            elif not torch.is_tensor(state.get("step")):
                out[i] = int(state.get("step", any(torch.is_tensor(x) for x in state.values())))
        for on_device, known in ((False, None), (True, read)):
            counters = self.counters(on_device)
            if counters and known is None:
                known = torch.stack([*counters.values()]).tolist()
            for i, t in zip(counters, known or [], strict=True):
                out[i] = int(t)
        return tuple(out)

    def counts_groups(self, i: int) -> bool:
        """Whether parameter i counts the steps of its group, taken with a gradient or without."""
        return getattr(self.rules[self.group_of[i]], "counts_groups", False)

    def _live_slots(self) -> dict[str, LiveSlot]:
        """The optimizer's tensors; their first values (mostly zeros) where there are none yet."""
        n = range(len(self.params))
        return {name: LiveSlot([self._slot(name, i) for i in n], self.params[0].detach()) for name in self.slot_names}

    def _slot(self, name: str, i: int) -> Tensor:
        p, group, size = self.params[i], self.group_of[i], math.prod(self.slot_shapes[name][i])
        x = self.live_state(p, group).get(name) if size else None
        if x is None:
            return p.new_full((1,), getattr(self.rules[group], "first", {}).get(name, 0.0)).expand(size)
        return x

    def read(self, counts: Sequence[float] | None = None) -> State:
        """The present state. counts: as of `counts`."""
        return self.live(counts).copied()

    def live(self, counts: Sequence[float] | None = None, theta: Tensor | None = None) -> State:
        """The same without a copy of the optimizers' tensors: right until they step. theta: the weights [n], where at hand."""
        slots: dict[str, Any] = dict(self._live_slots())
        rest = {}
        for i, fallback in self.fallbacks.items():
            own, rest[i] = fallback.read()
            slots |= own
        return State(self.flatten(self.params) if theta is None else theta, slots, self.counts(counts), rest)

    def write(self, state: State) -> None:
        """Write θ, slots and step counts into the live optimizers, in place.

        A parameter that had taken no step in `state` gets an empty optimizer state, as torch.optim has it then; one whose
        slots have first values (Adagrad makes them in its constructor) gets those.
        """
        self.load(state.theta)
        for i, fallback in self.fallbacks.items():
            fallback.write(state.slots, state.rest[i])
        groups = self.groups
        for i, (p, group) in enumerate(zip(self.params, self.group_of, strict=True)):
            if self.takes_own_step[i]:
                continue
            if self.counts_groups(i):
                groups[group]["step"] = state.counts[i]
            if state.counts[i] == 0 and not getattr(self.rules[group], "first", {}):
                self.optimizers[self.optimizer_of_group[group]].state.pop(p, None)
                continue
            live = self.live_state(p, group)
            for name in self.rules[group].slots:
                if torch.is_tensor(live.get(name)):
                    start, stop = self.slot_ranges[name][i]
                    live[name].copy_(state.slots[name][start:stop].view_as(live[name]))
            if torch.is_tensor(live.get("step")):
                live["step"].fill_(state.counts[i])

    def numbers_on_device(self) -> dict[tuple[str, int], Tensor]:
        """(name, group) → hyperparameters that are tensors on the device."""
        pairs = [(name, i, group.get(name)) for i, group in enumerate(self.groups) for name in self.names]
        return {(name, i): x for name, i, x in pairs if isinstance(x, Tensor) and x.device.type != "cpu"}

    def values(self, known: Mapping[tuple[str, int], float] | None = None) -> Values:
        """The hyperparameters' present values, read from the param groups.

        known: those of `numbers_on_device`, where they were read already.
        """
        known = known or {}
        return {
            name: [
                (known[name, i] if (name, i) in known else floats(group.get(name)))
                if set(parts(name)) <= set(rule.hyperparameters)
                else None
                for i, (group, rule) in enumerate(zip(self.groups, self.rules, strict=True))
            ]
            for name in self.names
        }

    @property
    def maximizes(self) -> bool:
        return any(getattr(rule, "maximize", False) for rule in self.rules)

    def refresh(self) -> None:
        """Read the groups' flags again: a momentum that is no longer 0 needs its buffer."""
        rules = self._read_rules()
        if rules != self.rules:
            self.rules = rules
            self._lay_out_slots()


def _check_params(params: Sequence[Tensor]) -> None:
    if not params:
        raise ValueError("the optimizer holds no parameters.")
    if len({id(p) for p in params}) != len(params):
        raise ValueError("a parameter appears in two param groups: give it to one group of one optimizer.")
    kinds = {(p.dtype, p.device) for p in params}
    if len(kinds) > 1:
        raise NotImplementedError(
            f"the optimizer's parameters have several dtypes or devices ({sorted(map(str, kinds))}): "
            "give all of them one dtype and one device."
        )
    if not params[0].is_floating_point():
        raise NotImplementedError(f"parameters of dtype {params[0].dtype}: use a real floating dtype.")
