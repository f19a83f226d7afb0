"""One derivative for each parameter tensor or element, where the optimizer has one number for a whole param group.

A rule acts on every parameter by itself (an elementwise one on every element), so that a number shared by all of them and one for
each have the same effect on each. With D = ∂U/∂h, the tangent of a step along the shared number,

    adjoint   λ_h,i = Σ over what belongs to i of λ' ∘ D        tangent   z'_j += D where it belongs to j's parameter or element

and D is one `jvp` of the transition with a seed of 1, all other tangents 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hypergrad.optimizers.binding import State, Values
from hypergrad.optimizers.ema import EMA, Averaged
from hypergrad.optimizers.rule import Tensors, parts
from hypergrad.optimizers.transition import Tangent, Transition

HOW = ("group", "parameter", "element")
MOST_TANGENTS = 4096  # a tangent is a few copies of θ

# (directions j [m], their parameters or elements [m]) of each of a rule's numbers
Rows = Mapping[str, tuple[Tensor, Tensor]]


class Granularity:
    """Which names are differentiated per parameter or per element.

    Args:
        per: name -> "parameter" or "element"; a name that is not here is differentiated per group.

    Raises:
        NotImplementedError: "element" with a rule that is not elementwise, or an optimizer that has no rule.
    """

    def __init__(self, transition: Transition, per: Mapping[str, str]):
        self.transition = transition
        self.per = {name: how for name, how in per.items() if how != "group"}
        self.of_part = {part: how for name, how in self.per.items() for part in parts(name)}
        self._owners: dict[tuple[str, str | None], Tensor] = {}
        for name, how in self.per.items():
            for group, rule in enumerate(transition.rules):
                if set(parts(name)) <= set(rule.hyperparameters):
                    self._check(name, how, group)

    def _check(self, name: str, how: str, group: int) -> None:
        transition, number = self.transition, self.transition.optimizer_of_group[group]
        if number in transition.fallbacks:
            optimizer = type(transition.optimizers[number]).__name__
            raise NotImplementedError(
                f"per={how!r}: {optimizer} has no update rule here, and what its step does to one parameter may depend on the "
                f"others: differentiate in {name!r} per group."
            )
        rule = transition.rules[group]
        if how == "element" and not rule.elementwise:
            raise NotImplementedError(
                f"per='element': {type(rule).__name__} does not act on each element by itself: differentiate in {name!r} per "
                "'parameter' or per 'group'."
            )

    def group_of(self, name: str) -> Sequence[int]:
        """The param group of each group, parameter or element."""
        transition = self.transition
        match self.per.get(name):
            case "parameter":
                return transition.group_of
            case "element":
                pairs = zip(transition.group_of, transition.sizes, strict=True)
                return [group for group, size in pairs for _ in range(size)]
        return range(len(transition.groups))

    def count(self, name: str) -> int:
        """The length of `group_of`."""
        transition = self.transition
        counts = {"parameter": len(transition.params), "element": sum(transition.sizes)}
        return counts.get(self.per.get(name, ""), len(transition.groups))

    def check_forward(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise where forward mode would need too many tangents."""
        k = sum(math.prod(shapes[name]) for name, how in self.per.items() if how == "element")
        if k > MOST_TANGENTS:
            raise NotImplementedError(
                f"mode='forward' with per='element' would need {k} tangents, each a few copies of the weights (at most "
                f"{MOST_TANGENTS} here): use mode='unrolled', whose cost does not depend on their number."
            )

    def derivative(self, part: str, state: State, g: Tensor, active: tuple[bool, ...], values: Values) -> Tangent:
        """D for one number of the rules: vectors."""
        has = [part in rule.hyperparameters for rule in self.transition.rules]
        seeds: list[Tensors] = [{part: g.new_ones(1, 1)} if mine else {} for mine in has]
        zero = Tangent.zeros(state, 1)
        out = self.transition.jvp(state, g, active, values, zero, torch.zeros_like(zero.theta), seeds)
        return Tangent(out.theta[0], {name: x[0] for name, x in out.slots.items()})

    def shares(self, state: State, g: Tensor, active: tuple[bool, ...], values: Values, lam: Tangent) -> Tensors:
        """λ_h of each parameter or element, by the rule's name, from the adjoint after the step."""
        out = {}
        for part in self.of_part:
            d = self.derivative(part, state, g, active, values)
            shares = self.summed(part, d.theta * lam.theta)
            for slot in self._slots():
                shares = shares + self.summed(part, d.slots[slot] * lam.slots[slot], slot)
            out[part] = shares
        return out

    def summed(self, part: str, x: Tensor, slot: str | None = None) -> Tensor:
        """Sums by parameter or element of a vector that is laid out as θ or as a slot."""
        if self.of_part[part] == "parameter":
            return torch.stack([x[a:b].sum() for a, b in self._ranges(slot)])
        return x.new_zeros(sum(self.transition.sizes)).index_add_(0, self._owner(part, slot), x)

    def add_own(
        self, tangent: Tangent, rows: Rows, state: State, g: Tensor, active: tuple[bool, ...], values: Values
    ) -> Tangent:
        """Tangents [k, …] after a step, with D added where a direction is a number of this step (see the module)."""
        theta, slots = tangent.theta, dict(tangent.slots)
        for part, which in rows.items():
            d = self.derivative(part, state, g, active, values)
            theta = self._added(part, theta, d.theta, which)
            for slot in self._slots():
                slots[slot] = self._added(part, slots[slot], d.slots[slot], which, slot)
        return Tangent(theta, slots, tangent.stats)

    def _added(self, part: str, x: Tensor, d: Tensor, which: tuple[Tensor, Tensor], slot: str | None = None) -> Tensor:
        directions, units = (y.to(x.device) for y in which)
        n = len(self.transition.params) if self.of_part[part] == "parameter" else sum(self.transition.sizes)
        row_of = torch.full((n,), -1, device=x.device).index_copy_(0, units, directions)
        rows = row_of[self._owner(part, slot)]
        at = (rows >= 0).nonzero().squeeze(1)
        return x.index_put((rows[at], at), d[at], accumulate=True)

    def _slots(self) -> list[str]:
        """Slots that rules keep, and the average of the weights."""
        own = list(self.transition.slot_ranges)
        return [*own, EMA] if isinstance(self.transition, Averaged) else own

    def _ranges(self, slot: str | None) -> Sequence[tuple[int, int]]:
        """Each parameter's share of θ, or of a slot; the average is laid out as θ."""
        return self.transition.slot_ranges.get(slot or "", self.transition.ranges)

    def _owner(self, part: str, slot: str | None) -> Tensor:
        """The parameter or element that each place of θ, or of a slot, belongs to.

        A slot of another size than its parameter's is that of a rule which is not elementwise: D is 0 there.
        """
        how, device = self.of_part[part], self.transition.params[0].device
        if (how, slot) not in self._owners:
            pieces = []
            for i, (a, b) in enumerate(self._ranges(slot)):
                start, size = self.transition.ranges[i][0], self.transition.sizes[i]
                places = torch.arange(b - a, device=device).clamp(max=max(size - 1, 0))
                pieces.append(torch.full_like(places, i) if how == "parameter" else start + places)
            self._owners[how, slot] = torch.cat(pieces)
        return self._owners[how, slot]
