"""A step of live optimizers as a pure function of flat tensors, and its derivatives.

A step applies each group's rule to the ranges of θ that share hyperparameters and step number, or to one parameter at a time
where the rule is not elementwise; parameters without a gradient are skipped, as `torch.optim` does. Tangents are [k, n],
adjoints [n].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hypergrad.optimizers.binding import Binding, State, Values
from hypergrad.optimizers.clip import Clip, ClipNorm, ClipValue
from hypergrad.optimizers.pieces import Pieces
from hypergrad.optimizers.rule import Tensors, parts
from hypergrad.optimizers.span import Span
from hypergrad.optimizers.traced.fallback import Fallback, Inputs

CLIPS: dict[str, type[Clip]] = {"clip_norm": ClipNorm, "clip_value": ClipValue}

# A long range is cut, as a rule allocates memory for ten or so passes. On CPU that memory is then reused, not mapped each time;
# on a device pieces are larger, as a kernel costs microseconds to launch.
CHUNK, DEVICE_CHUNK = 2**17, 2**23

WELL_CONDITIONED_EPS = 1e-3  # from this eps on d/d(weight decay) through g/(√v + eps) at g = v = 0 is of ordinary size


@dataclass
class Tangent:
    """Tangents (or, with vectors in place of matrices, adjoints) of θ, of the slots and of running statistics."""

    theta: Tensor
    slots: Tensors
    stats: Tensor | None = None

    @staticmethod
    def zeros(state: State, k: int | None = None) -> Tangent:
        def zero(x: Tensor) -> Tensor:
            return torch.zeros_like(x) if k is None else state.theta.new_zeros(k, x.numel())

        return Tangent(zero(state.theta), {name: zero(x) for name, x in state.slots.items()})


@dataclass(frozen=True)
class ParamRange:
    """A range of θ in which one rule acts with one set of numbers, and the ranges of its slots.

    An elementwise rule sees all parameters of the range as one vector; any other rule one parameter, in its own shape.
    """

    group: int
    t: int
    theta: Span
    slots: dict[str, Span]

    def of(self, x: Tensor) -> Tensor:
        return self.theta.of(x)

    def chunks(self, size: int) -> Iterator[ParamRange]:
        """The same in ranges of at most `size` numbers, where the rule sees one vector."""
        length = self.theta.stop - self.theta.start
        if length <= size or self.theta.shape != (length,):
            yield self
            return
        for a in range(0, length, size):
            b = min(a + size, length)
            slots = {name: span.part(a, b) for name, span in self.slots.items()}
            yield ParamRange(self.group, self.t, self.theta.part(a, b), slots)

    def slots_of(self, x: Tensors) -> Tensors:
        return {name: span.of(x[name]) for name, span in self.slots.items()}

    def seeds_of(self, x: Tensors) -> Tensors:
        """Tangents of scalars [k, 1], to be broadcast against those of θ."""
        return {name: d.view((len(d), *[1] * len(self.theta.shape))) for name, d in x.items()}


class Transition(Binding):
    """The transition stage of one or several live optimizers, with an optional clipping stage before it.

    Args:
        optimizers, wrt: as of a `Binding`.
        clip: name of the clipping stage, None for none.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], wrt: frozenset[str], clip: str | None = None):
        super().__init__(optimizers, wrt)
        self.clip: Clip | None = None if clip is None else CLIPS[clip]()
        self.wanted = frozenset(part for name in wrt for part in parts(name))
        self._plans: dict[Any, list[ParamRange]] = {}

    def refresh(self) -> None:
        rules = self.rules
        super().refresh()
        if self.rules is not rules:  # other slots, other ranges
            self._plans = {}

    def plan(self, counts: tuple[int, ...], active: tuple[bool, ...]) -> list[ParamRange]:
        """The ranges of one step: adjacent parameters of a group with the same step number are one range."""
        key = (counts, active)
        if key not in self._plans:
            self._plans = {key: list(self._ranges_of_step(counts, active))}
        return self._plans[key]

    def _ranges_of_step(self, counts: Sequence[int], active: Sequence[bool]) -> Iterator[ParamRange]:
        block: list[int] = []  # parameters that are one range
        for i, (start, stop) in enumerate(self.ranges):
            if not active[i] or start == stop or self.takes_own_step[i]:
                continue
            if block and not self._joins(block[-1], i, counts):
                yield from self._range(block, counts).chunks(self.chunk)
                block = []
            block.append(i)
        if block:
            yield from self._range(block, counts).chunks(self.chunk)

    @property
    def chunk(self) -> int:
        """Numbers of a range that are worked on at a time."""
        return CHUNK * torch.get_num_threads() if self.params[0].device.type == "cpu" else DEVICE_CHUNK

    def _joins(self, last: int, i: int, counts: Sequence[int]) -> bool:
        same = self.group_of[last] == self.group_of[i] and counts[last] == counts[i]
        adjacent = self.ranges[last][1] == self.ranges[i][0]
        return same and adjacent and self.rules[self.group_of[i]].elementwise

    def _range(self, block: list[int], counts: Sequence[int]) -> ParamRange:
        first, last, group = block[0], block[-1], self.group_of[block[0]]
        rule = self.rules[group]

        def span(ranges: list[tuple[int, int]], shape: tuple[int, ...]) -> Span:
            start, stop = ranges[first][0], ranges[last][1]
            return Span(start, stop, (stop - start,) if rule.elementwise else shape)

        slots = {name: span(self.slot_ranges[name], self.slot_shapes[name][first]) for name in rule.slots}
        return ParamRange(group, counts[first] + 1, span(self.ranges, tuple(self.params[first].shape)), slots)

    def scalars(self, part: ParamRange, values: Values) -> dict[str, float]:
        """The scalars h of one range."""
        out: dict[str, float] = {"t": part.t}
        for name, column in values.items():
            if name not in CLIPS and column[part.group] is not None:
                value = column[part.group]
                out |= dict(zip(parts(name), value if isinstance(value, tuple) else (value,), strict=True))
        return out

    def clipped(self, g: Tensor, values: Values) -> Tensor:
        return g if self.clip is None else self.clip.step(g, self.sizes, values[self.clip.name][0])

    def _own_steps(
        self, state: State, g: Tensor, active: Sequence[bool], values: Values
    ) -> Iterator[tuple[Fallback, Inputs]]:
        """The optimizers without a rule, and what their step is a function of."""
        for i, fallback in self.fallbacks.items():
            yield fallback, fallback.inputs(state.theta, g, active, state.slots, state.rest[i], values)

    def step(self, state: State, g: Tensor, active: tuple[bool, ...], values: Values) -> State:
        """One step from `state` with the flat gradient g [n]."""
        g = self.clipped(g, values)
        theta, slots = Pieces(state.theta), {name: Pieces(state.slots[name]) for name in self.slot_names}
        own, rest = {}, {}
        for fallback, inputs in self._own_steps(state, g, active, values):
            p, s, rest[fallback.number] = fallback.step(inputs)
            theta.add(fallback.span, p)
            own |= s
        for part in self.plan(state.counts, active):
            s, h = part.slots_of(state.slots), self.scalars(part, values)
            p, s = self.rules[part.group].step(part.of(state.theta), part.of(g), s, h)
            theta.add(part.theta, p)
            for name, x in s.items():
                slots[name].add(part.slots[name], x)
        slots = {name: x.join() for name, x in slots.items()}
        counted = [(a or self.counts_groups(i)) and not self.takes_own_step[i] for i, a in enumerate(active)]
        return state.like(theta.join(), slots | own, counted, rest)

    def jvp(
        self,
        state: State,
        g: Tensor,
        active: tuple[bool, ...],
        values: Values,
        tangent: Tangent,
        dg: Tensor,
        seeds: Sequence[Tensors],
        clip_seed: Tensor | None = None,
        in_place: bool = False,
    ) -> Tangent:
        """The jvp of one step.

        Args:
            tangent: of θ and slots, [k, n].
            dg: tangent of g, [k, n].
            seeds: for each group, tangents of its scalars h by the rule's names, each [k, 1].
            clip_seed: tangent of the clipping threshold, [k, 1].
            in_place: the result takes the memory of `tangent`.
        """
        theta = Pieces(tangent.theta, in_place=in_place)
        slots = {name: Pieces(tangent.slots[name], in_place=in_place) for name in self.slot_names}
        own: Tensors = {}
        for span, dp, ds in self.jvp_by_range(state, g, active, values, tangent, dg, seeds, clip_seed):
            theta.add(span, dp)
            for name, (slot_span, x) in ds.items():
                if slot_span is None:
                    own[name] = x
                else:
                    slots[name].add(slot_span, x)
        return Tangent(theta.join(), {name: x.join() for name, x in slots.items()} | own)

    def jvp_by_range(
        self,
        state: State,
        g: Tensor,
        active: tuple[bool, ...],
        values: Values,
        tangent: Tangent,
        dg: Tensor,
        seeds: Sequence[Tensors],
        clip_seed: Tensor | None = None,
    ) -> Iterator[tuple[Span, Tensor, dict[str, tuple[Span | None, Tensor]]]]:
        """The same a range at a time: its tangent, and those of its slots; without a span a slot is one of an optimizer alone."""
        if self.clip is not None:
            m = values[self.clip.name][0]
            dg, g = self.clip.jvp(g, self.sizes, m, dg, clip_seed), self.clipped(g, values)
        for fallback, inputs in self._own_steps(state, g, active, values):
            dp, ds = fallback.jvp(inputs, tangent.theta, dg, tangent.slots, seeds)
            yield fallback.span, dp, {name: (None, x) for name, x in ds.items()}
        for part in self.plan(state.counts, active):
            s, ds = part.slots_of(state.slots), part.slots_of(tangent.slots)
            h, dp, dh = self.scalars(part, values), part.of(tangent.theta), part.seeds_of(seeds[part.group])
            dp, ds = self.rules[part.group].jvp(part.of(state.theta), part.of(g), s, h, dp, part.of(dg), ds, dh)
            yield part.theta, dp, {name: (part.slots[name], x) for name, x in ds.items()}

    def vjp(
        self, state: State, g: Tensor, active: tuple[bool, ...], values: Values, adjoint: Tangent
    ) -> tuple[Tangent, Tensor, list[Tensors], Tensor | None]:
        """The vjp of one step.

        Returns:
            the adjoint of (θ, slots) not counting the path through g; the adjoint of g [n]; for each group, the
            derivative in each of its scalars that is in `wrt` (0-d); the derivative in the clipping threshold.
        """
        raw, g = g, self.clipped(g, values)
        theta, slots = Pieces(adjoint.theta), {name: Pieces(adjoint.slots[name]) for name in self.slot_names}
        lam_g, own = Pieces(g, zero=True), {}
        lam_h: list[Tensors] = [{} for _ in self.groups]
        for fallback, inputs in self._own_steps(state, g, active, values):
            lp, lg, ls = fallback.vjp(inputs, adjoint.theta, adjoint.slots, lam_h)
            theta.add(fallback.span, lp)
            lam_g.add(fallback.span, lg)
            own |= ls
        for part in self.plan(state.counts, active):
            s, ls = part.slots_of(state.slots), part.slots_of(adjoint.slots)
            h, lp = self.scalars(part, values), part.of(adjoint.theta)
            lp, lg, ls, lh = self.rules[part.group].vjp(part.of(state.theta), part.of(g), s, h, lp, ls)
            theta.add(part.theta, lp)
            lam_g.add(part.theta, lg)
            for name, x in ls.items():
                slots[name].add(part.slots[name], x)
            for name in lh.keys() & self.wanted:
                x = lh[name]
                lam_h[part.group][name] = lam_h[part.group].get(name, 0) + (x() if callable(x) else x).sum()
        out = Tangent(theta.join(), {name: x.join() for name, x in slots.items()} | own)
        lg, lam_clip = lam_g.join(), None
        if self.clip is not None:
            lg, lam_clip = self.clip.vjp(raw, self.sizes, values[self.clip.name][0], lg)
        return out, lg, lam_h, lam_clip

    def ill_conditioned_decay(self, state: State, g: Tensor, values: Values) -> Tensor | None:
        """The groups in which d/d(weight decay) passes through g/√v at g = v = 0 with a small eps: flags, None where none can."""
        out: dict[int, Tensor] = {}
        for i, rule in enumerate(self.rules):
            slot = rule.second_moment_of_decay
            if slot is None or values["weight_decay"][i] != 0 or values["eps"][i] >= WELL_CONDITIONED_EPS:
                continue
            pairs = zip(self.ranges, self.slot_ranges[slot], self.group_of, strict=True)
            mine = [((a, b), (c, d)) for (a, b), (c, d), group in pairs if group == i]
            x = torch.cat([g[a:b] for (a, b), _ in mine])
            v = torch.cat([state.slots[slot][c:d] for _, (c, d) in mine])
            out[i] = ((x == 0) & (v == 0)).any()
        if not out:
            return None
        no = torch.zeros_like(next(iter(out.values())))
        return torch.stack([out.get(i, no) for i in range(len(self.rules))])
