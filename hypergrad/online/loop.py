"""What happens around every step of the user's optimizer: values written, gradients judged, tangents step_jvp.

before the step    one readout → ParamGroupWriter.write → DivergenceGuard.judge → Comparison.tangent → Tangents.push
the step           torch's own
after the step     ParamGroupWriter.restore → every so many steps HyperSteps.take
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hypergrad.core.readout import Readout
from hypergrad.online.backtracking import CUT as LR_CUT
from hypergrad.online.divergence_guard import DivergenceGuard
from hypergrad.online.gradient_changes import Comparison, Pending
from hypergrad.online.hyper_step import HyperSteps
from hypergrad.online.lr_warm_start import LEAST, MOST, LrWarmStart, first_momentum, largest_momentum, sensible
from hypergrad.online.param_groups import ParamGroupWriter
from hypergrad.online.phases import tuned_at
from hypergrad.optimizers.binding import State, Values
from hypergrad.optimizers.transition import Tangent

if TYPE_CHECKING:
    from hypergrad.online.replay_window import ReplayWindow


class OnlineLoop:
    """A tuner on a live loop.

    Args:
        hyper: the hyperparameter step, with problem, hyper_vector, tangents and journal.
        mode, every, total: as in `Tuner`.
    """

    window: ReplayWindow  # set by the tuner: whole steps loop on this loop

    def __init__(
        self,
        hyper: HyperSteps,
        live: ParamGroupWriter,
        guard: DivergenceGuard,
        warm: LrWarmStart,
        mode: str,
        every: int,
        total: int | None,
    ):
        self.hyper, self.live, self.guard, self.warm = hyper, live, guard, warm
        self.problem, self.hyper_vector, self.tangents = hyper.problem, hyper.hyper_vector, hyper.tangents
        self.transition, self.journal, self.stats = hyper.transition, hyper.journal, hyper.stats
        self.optimizers, self.mode, self.every, self.total = hyper.transition.optimizers, mode, every, total
        self.t = 0  # training steps done
        self.stepped: set[int] = set()  # the optimizers that have taken the present step
        self.skipped = False  # the present step is one that a fused optimizer leaves out
        self.void = False  # the present step was judged to do nothing
        self.known: dict[tuple[str, int], float] = {}  # what tensors on the device among the groups' numbers hold
        self.used: tuple[Values, Tensor] = {}, self.hyper_vector.slope()  # by the last step: values, dx/dφ
        self.choose_what_is_tuned()

    def before_step(self, i: int) -> None:
        """Write the values of this step, judge its gradients, push the tangents."""
        if len(self.transition.groups) != len(self.transition.rules):
            raise ValueError("param groups were added: close this tuner and make a new one.")
        if i in self.stepped:  # it steps more often than others: their turn is left out
            self._end_step()
        if self.warm.active and (self.hyper.frozen or any("initial_lr" in g for g in self.transition.groups)):
            self.warm.active = False  # nothing is to move, or a scheduler came after the tuner: ours is a multiplier
        if self.warm.active and self.warm.momentum is None:
            self._start_momentum()
        active = tuple(
            p.grad is not None and self.transition.optimizer_of_group[group] == i
            for p, group in zip(self.transition.params, self.transition.group_of, strict=True)
        )
        g = None
        if any(active):
            grads = [p.grad if a else None for p, a in zip(self.transition.params, active, strict=True)]
            g = self.transition.flatten(grads)
        pending = self.tangents.pending
        fresh = pending if pending is not None and i not in pending.stepped else None
        comparison, read = self._read(i, g, active, fresh)
        # a fused optimizer is told by a GradScaler that it will leave this step out
        self.skipped = bool(read.get("found_inf", [0.0])[0])
        self.tangents.note_hits(read)
        self.known = dict(zip(self.transition.numbers_on_device(), read.get("numbers", [])))
        if "slope and curvature" in read and not self.skipped:
            self._look(read["loss"][0], *read["slope and curvature"])
        never = self.hyper.frozen and self.total is None and not self.stats["hyper_steps"]
        self.live.write(i, self.t, never, self.known)
        self.transition.refresh()
        if self.void and pending is None:  # judged when another optimizer's turn came
            self._drop_gradients(i)
            return
        if self.skipped or g is None:
            return
        state = self.transition.read(read.get("counts"))
        scale = getattr(self.optimizers[i], "grad_scale", None)  # fused optimizers unscale by themselves
        if scale is not None:
            g = g / scale
        loss = read["loss"][0] if "loss" in read else None
        if not self.hyper.frozen:
            finite = math.isfinite(read["sum"][0]) or bool(torch.isfinite(g).all())  # the sum may overflow
            if not self._judge(i, state, finite, loss):
                return
        if not self.stepped:
            self.tangents.follow(state.theta, self.t)
        values = self._use(i)
        if self.mode != "forward":
            return
        dg = None if comparison is None else comparison.tangent(read, len(self.hyper_vector.moving))
        if dg is not None and scale is not None:
            dg = dg / scale
        if dg is None:
            self._count_unknown(fresh is None)
        if fresh is not None and not fresh.stepped and dg is not None:
            self.tangents.look()
        self.tangents.push(state, g, active, values, self.used[1], dg)
        if self.warm.active and self.t == self.stats["nonfinite_steps"] + self.stats["spikes"]:  # the first step taken
            self._start_small(i, state, g, active, dg)
        if i in self.warm.sizes_decay:
            self.warm.sizes_decay = [x for x in self.warm.sizes_decay if x != i]
            if self.total is not None and not self.hyper.frozen:
                self._size_decay(i, state, g, active, values)
        if fresh is not None:
            if loss is not None and not self.stepped:
                self.hyper.losses.append(loss)
            fresh.stepped.add(i)

    def _read(
        self, i: int, g: Tensor | None, active: Sequence[bool], fresh: Pending | None
    ) -> tuple[Comparison | None, dict[str, list[float]]]:
        """All that the host has to know before this step, in one wait for the device.

        Args:
            g: the gradients that optimizer i will see [n]; None where it has none.
            fresh: what `backward` left, where optimizer i has not used it yet.
        """
        readout, tangents, comparison = Readout(), self.tangents, None
        found_inf = getattr(self.optimizers[i], "found_inf", None)
        if found_inf is not None:
            readout.ask("found_inf", found_inf)
        for name, tensors in (
            ("numbers", self.transition.numbers_on_device()),
            ("counts", self.transition.counters(on_device=True)),
        ):
            if tensors:
                readout.ask(name, torch.stack([x.reshape(()) for x in tensors.values()]))
        tangents.ask_hits(readout)
        loss = self.window.loss if fresh is None else fresh.loss / fresh.scale
        if loss is not None:
            readout.ask("loss", loss)
        if fresh is not None and self.warm.active and not self.stepped and not self.void:
            tangents.ask_slope_and_curvature(readout)
        if g is not None:
            readout.ask("sum", g.sum())
            comparison = tangents.compare(g, active, readout)
        return comparison, readout.fetch()

    def _start_momentum(self) -> None:
        """Before the first step: momentum, where it is tuned and its start is a hint, begins at `first_momentum`."""
        values, rules = self.transition.values(), self.transition.rules
        for j, entry in enumerate(self.hyper_vector.entries):
            if entry.name != "momentum" or entry.group is None or self.hyper_vector.given[j]:
                continue
            if not getattr(rules[entry.group], "averages", False):
                typed = float(self.hyper_vector.value[j])
                m = first_momentum(typed, self.total)
                if m != typed:
                    self.hyper_vector.put(j, m)
                    self.journal.note(self.t, f"{self.hyper_vector.labels[j]} starts from {m:.3g}.", warn=False)
            values["momentum"][entry.group] = float(self.hyper_vector.value[j])
        self.warm.momentum = largest_momentum(values, rules)

    # lr is its tuned value times a shape; the warm start sets their product, and at its end the value
    def _look(self, loss: float, slope: float, curvature: float) -> None:
        """Before a step of the warm start: the lr that it is taken with."""
        doubtful = self.guard.doubts(loss)  # the step will be passed over, lr stays
        factor = 1.0 if doubtful else self.warm.look(slope, curvature)
        now = self.live.shape(self.t) if self.warm.active else 1.0
        self.hyper_vector.scale("lr", factor * self.live.shape(self.t - 1) / now)
        if not self.warm.active:
            self.warm.sizes_decay = list(range(len(self.optimizers)))
            names = [f"{x:.3g}" for e, x in zip(self.hyper_vector.entries, self.hyper_vector.value) if e.name == "lr"]
            self.journal.note(
                self.t, f"lr starts from {', '.join(names)}: slope and curvature along the first steps.", warn=False
            )

    def _start_small(self, i: int, state: State, g: Tensor, active: tuple[bool, ...], dg: Tensor | None) -> None:
        """The first step of optimizer i, made tiny. Repeated, as a tangent far too large is not told from one at the cap."""
        norm = float(torch.linalg.vector_norm(state.theta))
        for _ in range(20):
            assert self.tangents.tangent is not None
            moved = torch.linalg.vector_norm(self.tangents.tangent.theta[self.hyper_vector.rows("lr")].sum(0))
            factor = self.warm.first(float(moved), norm)
            if abs(factor - 1) < 0.01:
                break
            self.hyper_vector.scale("lr", factor)
            self.live.write(i, self.t, False, self.known)
            self.tangents.forget()
            self.tangents.push(state, g, active, self._use(i), self.used[1], dg)
        self.tangents.take_hits()

    # A step with no tangents but weight decay's own: z = dθ/dlog wd is what decay does in it, −rate·θ; momentum adds to it later
    def _size_decay(self, i: int, state: State, g: Tensor, active: tuple[bool, ...], values: Values) -> None:
        """Bring optimizer i's weight decay, where its start is a hint, to a size that makes sense in what is left of the run."""
        assert self.total is not None
        all_of = self.hyper_vector.directions
        seeds, _ = all_of.seeds(0, self.live.slopes(self.t).to(state.theta))
        zero = Tangent.zeros(state, len(all_of))
        z = self.transition.jvp(state, g, active, values, zero, torch.zeros_like(zero.theta), seeds).theta
        left = sum(self.live.shape(t) for t in range(self.t, self.total)) / self.live.shape(self.t)
        mine = [x == i for x in self.transition.optimizer_of_group]
        momenta = [x if m else None for x, m in zip(values.get("momentum", []), mine)]
        momentum = largest_momentum({"momentum": momenta}, self.transition.rules)
        hints = [
            j
            for j, entry in enumerate(self.hyper_vector.entries)
            if entry.name == "weight_decay"
            and not self.hyper_vector.given[j]
            and entry.group is not None
            and mine[entry.group]
        ]
        readout = Readout()
        for j in hints:
            theta = torch.where(z[j] == 0, 0, state.theta)
            readout.ask(f"{j}", torch.stack([theta @ z[j], theta @ theta]))
        for j, (product, square) in zip(hints, readout.fetch().values(), strict=True):
            rate = -product / max(square, 1e-300)
            decayed = rate / (1 - momentum) * left
            factor = sensible(decayed)
            self.hyper_vector.scale_number(j, factor)
            if j in self.hyper_vector.moving and 0 < decayed < math.inf and self.hyper_vector.kinds[j].bounds is None:
                self.hyper_vector.bound(j, LEAST / (factor * decayed), MOST / (factor * decayed))

    def _use(self, i: int) -> Values:
        """Note the values of this step as optimizer i uses them, and dx/dφ."""
        values, slopes = self.transition.values(self.known), self.live.slopes(self.t)
        if len(self.optimizers) == 1:
            self.used = values, slopes
            return values
        old = self.used[0] or values
        mine = [j == i for j in self.transition.optimizer_of_group]
        merged = {
            name: [new if m else x for new, x, m in zip(values[name], old[name], mine, strict=True)] for name in values
        }
        rows = torch.tensor([e.group is None or mine[e.group] for e in self.hyper_vector.entries])
        self.used = merged, torch.where(rows, slopes, self.used[1])
        return values

    def _drop_gradients(self, i: int) -> None:
        """Make optimizer i do nothing. The others' gradients stay until their turn: a GradScaler wants to see them."""
        for p, group in zip(self.transition.params, self.transition.group_of, strict=True):
            if self.transition.optimizer_of_group[group] == i:
                p.grad = None

    def _judge(self, i: int, state: State, finite: bool, loss: float | None) -> bool:
        """Whether optimizer i may step. If not, its gradients are None on return, so that it does nothing."""
        verdict = self.guard.judge(loss, finite, state.theta)
        if verdict in ("false alarm", "bad data"):
            self.stats["false_alarms"] += 1
            self.hyper_vector.scale("lr", self.guard.cut)
            self.hyper_vector.cap("lr", math.inf)
        if verdict == "false alarm":
            return True
        if verdict == "good":
            if not self.stepped and (self.t % self.every == 0 or not self.guard.good):
                self.guard.keep(state)
            return True
        self.void, self.tangents.pending = True, None
        self._drop_gradients(i)
        self.window.reset()
        self.guard.mend_buffers()
        if verdict == "spike":
            self.stats["spikes"] += 1
            self.journal.note_once(
                self.t, "a loss was far above the first: the step was passed over (tuner.stats['spikes'])."
            )
        elif verdict != "blow-up" or not self.guard.roll_back():
            self.stats["nonfinite_steps"] += 1
            self.journal.note_once(
                self.t, "a loss or gradient was not finite: the step was passed over (tuner.stats['nonfinite_steps'])."
            )
        else:
            self.stats["rollbacks"] += 1
            by = self.guard.cut
            cut = self.hyper_vector.scale("lr", 1 / by)
            self.hyper_vector.cap("lr", by**0.5)
            then = f"lr divided by {by:g}" if cut else "lr is not tuned and stays: if this goes on, lower it"
            self.tangents.forget()
            self.tangents.average = None
            self.journal.note(
                self.t,
                f"blow-up (loss {math.nan if loss is None else loss:.3g}): weights taken back to the last good ones, {then}.",
            )
        return False

    def after_step(self, i: int) -> None:
        self.live.restore(i)
        if self.skipped:
            return
        self.stepped.add(i)
        if len(self.stepped) == len(self.optimizers):
            self._end_step()

    def _end_step(self) -> None:
        """One training step is done: count it, move the hyperparameters if it is time."""
        self.stepped.clear()
        self.void = False
        self.t += 1
        self.stats |= {"steps": self.t, **self.tangents.counts}
        if self.mode == "forward" and self.t % self.every == 0 and self.hyper.take(self.t, self.warm.active):
            self._go_back()
        if self.t == self.total:
            self.hyper.say_best(self.t)
        if self.choose_what_is_tuned():
            moving = (self.hyper_vector.entries[j].name for j in self.hyper_vector.moving)
            turn = self.warm.began and "weight_decay" in moving  # weight decay's turn begins
            self.warm.sizes_decay = list(range(len(self.optimizers))) if turn else []
            self.tangents.forget()
            if self.tangents.pending is not None:
                self.tangents.pending.dg = None

    def _go_back(self) -> None:
        """The validation loss has risen: weights back to where it was lowest, with a smaller lr."""
        assert self.hyper.backtracking is not None
        step = self.hyper.backtracking.go()
        self.guard.start_again(self.transition.read())
        self.hyper_vector.scale("lr", 1 / LR_CUT)
        self.hyper_vector.cap("lr", LR_CUT**0.5)
        self.tangents.forget()
        self.tangents.average = None
        if self.tangents.pending is not None:
            self.tangents.pending.dg = None
        self.stats["backtracks"] += 1
        self.journal.note(
            self.t,
            f"the validation loss rose to {self.hyper.val_loss:.3g}: weights taken back to those of step {step:,}, lr divided by "
            f"{LR_CUT:g}.",
            warn=False,
        )

    def choose_what_is_tuned(self) -> bool:
        """Tune what is tuned after so many steps. True where that is a change."""
        names, settled = self.hyper_vector.directions.wrt, self.hyper_vector.settled()
        return self.hyper_vector.tune_only(tuned_at(self.t, self.total, names, settled))

    def _count_unknown(self, plain: bool) -> None:
        if plain:
            self.stats["plain_steps"] += 1
            self.journal.note_once(
                self.t,
                "a step's gradients did not come from tuner.backward(loss): it trains as always, but tangents start again "
                "from zero there (tuner.stats['plain_steps']). Replace loss.backward() by tuner.backward(loss).",
            )
        else:
            self.stats["changed_gradients"] += 1
            self.journal.note_once(
                self.t,
                "the gradients were changed between tuner.backward and optimizer.step in a way hypergrad does not know: "
                "tangents start again from zero there (tuner.stats['changed_gradients']). Pass clip_norm=... if the loop "
                "clips by norm, scaler=... if it has a GradScaler.",
            )
