"""The first steps of a run: starts that the user typed are hints, and are replaced by what the first steps show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hypergrad.core.readout import Readout
from hypergrad.logging import Journal
from hypergrad.online.kept_state import KeptState
from hypergrad.online.lr_searches import LrSearches
from hypergrad.online.outer_optimizer import OuterOptimizer
from hypergrad.online.param_groups import ParamGroupWriter
from hypergrad.online.policies.momentum_start import MomentumStart, largest_momentum
from hypergrad.online.policies.policy import Policy, find
from hypergrad.online.policies.weight_decay_sizing import WeightDecaySizing
from hypergrad.online.start_watch import StartWatch
from hypergrad.online.tangents import Tangents
from hypergrad.optimizers.binding import State, Values


class Starts:
    """Runs MomentumStart, LrWarmStart and WeightDecaySizing.

    Args:
        search: lr's warm start.
        watch: whether it is to be undone.
        hints: whether typed starts of lr, momentum and weight decay are hints.
        total: steps of the run; None: not known.
    """

    def __init__(
        self,
        policies: Sequence[Policy],
        search: LrSearches,
        watch: StartWatch,
        outer: OuterOptimizer,
        tangents: Tangents,
        writer: ParamGroupWriter,
        journal: Journal,
        total: int | None,
        hints: bool,
    ):
        self.search, self.watch = search, watch
        self.outer, self.tangents, self.writer, self.journal = outer, tangents, writer, journal
        self.vector, self.transition, self.total = outer.vector, tangents.transition, total
        self.hints = hints
        self.of_momentum, self.sizing = find(policies, MomentumStart), find(policies, WeightDecaySizing)
        self.momentum: float | None = None  # the largest of the groups' before the first step; None: not read yet
        self.began: int | None = None  # the step that was made tiny
        self.sizes_due: list[int] = []  # the optimizers at whose next step weight decay is sized

    def before_step(self, t: int, frozen: bool) -> None:
        """Stop where nothing is to move; before the first step, momentum's start."""
        if not self.search.active and (not self.hints or self.momentum is not None):
            return
        if frozen:
            self.search.stop()
            self.watch.stop()
        elif self.momentum is None:
            self._start_momentum(t)

    def _start_momentum(self, t: int) -> None:
        values, rules, vector = self.transition.values(), self.transition.rules, self.vector
        for j, entry in enumerate(vector.entries):
            if entry.name != "momentum" or entry.group is None or vector.given[j]:
                continue
            if self.of_momentum is not None and not getattr(rules[entry.group], "averages", False):
                typed = float(vector.value[j])
                m = self.of_momentum.first(typed, self.total)
                if m != typed:
                    vector.put(j, m)
                    self.journal.note(t, f"{vector.labels[j]} starts from {m:.3g}.", warn=False)
            values["momentum"][entry.group] = float(vector.value[j])
        self.momentum = largest_momentum(values, rules)

    # lr is its tuned value times a shape; the warm start sets their product, and at its end what it will be where the shape is
    # largest
    def observe(self, i: int, t: int, doubtful: bool, slope: float, curvature: float) -> None:
        """Before step t of optimizer i in the warm start: the lr that it is taken with.

        doubtful: the step will be passed over, lr stays.
        """
        search, alone = self.search.of(i), i if self.search.apart else None
        shape = self.writer.lr_shape(t, i)
        if self.began is None or shape == 0:
            return
        factor = 1.0 if doubtful else search.observe(slope, curvature, self.momentum or 0.0)
        now = shape if search.active else max(shape, self.writer.peak_shape(i))
        self.outer.multiply("lr", factor * self.writer.last_shape.get(i, 1.0) / now, alone)
        if not search.active:
            self.sizes_due = (
                sorted({*self.sizes_due, i}) if self.search.apart else list(range(len(self.transition.optimizers)))
            )
            names = [f"{x:.3g}" for x in self.vector.value[self.vector.called("lr", alone)].tolist()]
            self.journal.note(
                t, f"lr starts from {', '.join(names)}: slope and curvature along the first steps.", warn=False
            )

    def make_small(self, i: int, t: int, state: State, push_again: Callable[[], None]) -> None:
        """Make optimizer i's first step that is taken, with an lr that is not 0, tiny.

        Repeated, as a tangent far too large is not told from one at the cap.

        Args:
            push_again: write the values and take the tangents through the step once more.
        """
        first = self.search.begins(i) if self.search.apart else self.began in (None, t)
        if not (self.search.of(i).active and first) or self.writer.lr_shape(t, i) == 0:
            return
        self.began = t if self.began is None else self.began
        alone = i if self.search.apart else None
        mine = 1.0 if alone is None else self.transition.of_optimizer(i)
        for _ in range(20):
            assert self.tangents.tangent is not None
            moved = self.tangents.tangent.theta[self.vector.rows("lr", alone)].sum(0)
            readout = Readout(self.tangents.processes)
            readout.ask("norms", torch.stack([torch.linalg.vector_norm(x * mine) for x in (moved, state.theta)]))
            factor = self.search.of(i).first(*readout.fetch()["norms"])
            if abs(factor - 1) < 0.01:
                break
            self.outer.multiply("lr", factor, alone)
            push_again()
        self.tangents.take_hits()

    def part(self) -> None:
        """Each optimizer has a loss of its own."""
        self.search.part(range(len(self.transition.optimizers)))
        self.watch.stop()

    def couple(self, coupled: bool) -> None:
        """Whether one of their losses depends on parameters of another's."""
        if coupled and not self.search.coupled:
            self.search.couple()
            self.tangents.curvature.couple()

    def undoes(self, verdict: str, state: Callable[[], State], loss: float | None, zero: bool) -> bool:
        """Whether the warm start is to be undone: as of a step that is about to be taken, or that blows up while it is under way.

        verdict: what the step is. zero: its gradient is exactly 0.
        """
        if verdict == "blow-up":
            return self.search.active and self.watch.active and self.watch.kept is not None
        return verdict == "good" and self.watch.active and self.watch.sees(state, loss, zero, self.search.active)

    def undo(self, t: int) -> tuple[KeptState, float]:
        """At step t: the state to go back to, and by what lr is divided. A warm start under way ends."""
        policy, by = self.watch.policy, self.watch.policy.lr_cut
        if self.search.active:
            self.search.stop()
            self._size_all()
            shape = self.writer.lr_shape(t, 0)  # not 0, as the warm start takes no step there
            by *= policy.growth**policy.losses * max(shape, self.writer.peak_shape(0)) / shape
        return self.watch.undo(), by

    def begin_phase(self) -> None:
        """Other numbers are tuned from now on. Where weight decay is one of them it is sized."""
        moving = {self.vector.entries[j].name for j in self.vector.moving}
        self.sizes_due = []
        if self.hints and "weight_decay" in moving:
            self._size_all()

    def _size_all(self) -> None:
        self.sizes_due = list(range(len(self.transition.optimizers)))

    def size_decay(
        self, i: int, t: int, state: State, g: Tensor, active: tuple[bool, ...], values: Values, frozen: bool
    ) -> None:
        """At step t of optimizer i, where it is due: weight decay to a size that makes sense in what is left of the run."""
        if i not in self.sizes_due or self.writer.lr_shape(t, i) == 0:
            return
        self.sizes_due = [x for x in self.sizes_due if x != i]
        if self.sizing is None or self.total is None or frozen:
            return
        left, readout, slopes = self.writer.steps_left(t, i), Readout(self.tangents.processes), self.writer.slopes(t)
        for sized in self.sizing.sized(self.vector, i, state, g, active, values, slopes, left, readout):
            self.vector.multiply_number(sized.j, sized.factor)
            if sized.bounds is not None:
                self.vector.bound(sized.j, *sized.bounds)

    def state_dict(self) -> dict[str, Any]:
        return {
            "search": self.search.state_dict(),
            "watch": self.watch.state_dict(),
            "hints": self.hints,
            "momentum": self.momentum,
            "began": self.began,
            "sizes due": list(self.sizes_due),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.search.load_state_dict(state["search"])
        self.watch.load_state_dict(state["watch"])
        self.hints, self.momentum, self.sizes_due = state["hints"], state["momentum"], list(state["sizes due"])
        self.began = state["began"]
