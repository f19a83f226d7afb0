"""What happens around every step of the user's optimizer.

before the step    one readout → values written → the step judged → tangents taken through it
the step           torch's own
after the step     values put back → every so many steps a hyperparameter step → a change of phase
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import Tensor

from hypergrad.online.accumulation import check_mean
from hypergrad.online.cost_bound import CostBound
from hypergrad.online.first_step_checks import FirstStepChecks
from hypergrad.online.gradient_changes import Comparison, Pending, reached
from hypergrad.online.hyper_step import HyperSteps
from hypergrad.online.notes import notes, past_the_end
from hypergrad.online.other_state import OtherState
from hypergrad.online.param_groups import ParamGroupWriter
from hypergrad.online.policies.phases import Phases
from hypergrad.online.recovery import Recovery
from hypergrad.online.starts import Starts
from hypergrad.online.step_gradients import StepGradients, drop_gradients
from hypergrad.online.step_reading import StepReading
from hypergrad.online.stepped_gradients import SteppedGradients
from hypergrad.online.tuner_arguments import check_groups
from hypergrad.online.unknown_changes import UnknownChanges
from hypergrad.online.used_values import UsedValues
from hypergrad.optimizers.binding import State, Values


class OnlineLoop:
    """The training steps of a tuner.

    Args:
        hyper: the hyperparameter step, with problem, outer optimizer, tangents and journal.
        recovery: judges every step, and goes back where it must.
        phases: what is tuned when; None: everything, to the end.
        first_checks: of the first step's losses.
        mode, every, total: as in `Tuner`.
    """

    def __init__(
        self,
        hyper: HyperSteps,
        writer: ParamGroupWriter,
        starts: Starts,
        recovery: Recovery,
        phases: Phases | None,
        first_checks: FirstStepChecks,
        mode: str,
        every: int,
        total: int | None,
        bound: CostBound,
    ):
        self.hyper, self.writer, self.starts, self.recovery, self.phases = hyper, writer, starts, recovery, phases
        self.first_checks = first_checks
        self.problem, self.outer, self.tangents = hyper.problem, hyper.outer, hyper.tangents
        self.vector, self.transition = hyper.vector, hyper.transition
        self.journal, self.counts = hyper.journal, hyper.counts
        self.optimizers, self.mode, self.every, self.total = hyper.transition.optimizers, mode, every, total
        self.bound = bound
        self.other = OtherState(self.problem.model, self.transition.params, every)
        self.t = 0  # training steps done
        self.stepped: set[int] = set()  # the optimizers that have taken the present step
        self.skipped = False  # the present step is one that a fused optimizer leaves out
        self.void = False  # the present step was judged to do nothing
        self.given_loss: Tensor | None = None  # of a whole step that `tuner.step` takes
        self.reading = StepReading(self.tangents, starts.search, self.other, mode == "forward")
        self.unknown = UnknownChanges(hyper.journal, hyper.counts)
        self.stepped_with = SteppedGradients(self.transition)
        self.known: dict[tuple[str, int], float] = {}  # what tensors on the device among the groups' numbers hold
        self.used = UsedValues(self.vector)
        self.choose_what_is_tuned()

    # ---- before the step

    def before_step(self, i: int) -> None:
        """Write the values of this step, judge its gradients, take the tangents through it."""
        check_groups(self.transition)
        if i in self.stepped:  # it steps more often than others: theirs are left out
            self._end_step()
        if self.total is not None and self.t == self.total and not self.stepped:
            self.journal.note_once(self.t, past_the_end(self.total))
        self.starts.before_step(self.t, self.hyper.frozen)
        pending = self.tangents.pending
        fresh = pending if pending is not None and i not in pending.stepped else None
        left = None if fresh is None else fresh.left
        gradients = StepGradients(self.transition, i, bool(self.vector.moving), left)
        g, active = gradients.flat, gradients.active
        if fresh is not None:
            self.tangents.average_pending()
        if (fresh or self.given_loss is not None) and len(self.stepped) == len(self.optimizers) - 1:
            self.first_checks.run(self.t)
        if fresh is not None and gradients.tensors:
            if not self.apart and fresh.is_own(i, self.stepped):
                self.starts.part()
                self.recovery.part(self.stepped)
            self.starts.couple(self.apart and fresh.coupled)
        loss = self.given_loss if fresh is None else fresh.loss_of(i) / fresh.scale
        begins = not (self.void or self.stepped)
        comparison, read = self.reading.take(i, self.t, gradients, fresh, loss, begins, self.void)
        check_mean(read, self.transition.params[0].dtype)
        # a fused optimizer is told by a GradScaler that it will leave this step out
        self.skipped = bool(read.get("found_inf", [0.0])[0])
        self.tangents.cap.note(read)
        for note in notes(read, self.counts, self.tangents.counts, self.other):
            self.journal.note_once(self.t, note)
        self.known = dict(zip(self.transition.numbers_on_device(), read.get("numbers", [])))
        self._observe_groups(i)
        if "slope and curvature" in read and not self.skipped:
            self.starts.observe(i, self.t, self.recovery.doubts(i, read["loss"][0]), *read["slope and curvature"])
        self.writer.write(i, self.t, self.hyper.frozen and self.total is None and not self.hyper.moved, self.known)
        self.transition.refresh()
        if self.void and pending is None:  # judged at another optimizer's step
            drop_gradients(self.transition, i)
            return
        if self.skipped or not gradients.tensors:
            if fresh is not None and not self.skipped:
                fresh.used_by(i)
                if i in reached(self.transition, fresh.has):
                    self.unknown.note_emptied(i, self.t)
            return
        theta = self.tangents.written.weights
        state = cache(lambda: self.transition.live(read.get("counts"), theta(self.transition)))
        if self.t == 0 and not self.stepped and self.hyper.record is not None:
            self.hyper.record.starts_from(state().theta)
        loss = read["loss"][0] if "loss" in read else None
        if not self.hyper.frozen:
            keep = not self.stepped and self.t % self.every == 0
            verdict = self.recovery.verdict(i, state, gradients.finite(read), loss, keep, not self.stepped)
            undone = not self.stepped and self.starts.undoes(verdict, state, loss, gradients.zero(read))
            if undone or verdict != "good":
                self.void = True
                drop_gradients(self.transition, i)
                if undone:
                    self.recovery.undo_start(self.t, *self.starts.undo(self.t))
                else:
                    self.recovery.act(self.t, verdict, loss)
                return
        steps = self.bound.averages_every(bool(self.vector.moving))
        if self.mode == "forward" and g is not None:
            self.tangents.forget_written(state().theta)
        if not self.stepped and self.t % steps == 0:
            self.tangents.average.follow(state().theta, self.tangents.tangent, self.t, steps)
        values = self._use(i)
        if self.mode != "forward":
            return
        again = fresh is None and self.stepped_with.again(i)
        if g is not None:
            again = self._push(i, state(), g, active, values, read, fresh, comparison, again)
        elif fresh is None and not again:
            self.unknown.note_plain(i, self.t, False)
        self.stepped_with.about_to(i, fresh is not None or again, gradients.tensors)
        if again:
            self.unknown.note_repeated(self.t)
        if fresh is not None:
            if loss is not None and not self.stepped:
                self.hyper.progress.note_training_loss(loss)
            fresh.used_by(i)

    def _observe_groups(self, i: int) -> None:
        """What something else has written into optimizer i's groups."""
        for j in self.writer.observe(i, self.t, self.known):
            self.outer.restart(j)
        for note in self.writer.take_notes():
            self.journal.note_once(self.t, note)

    def _push(
        self,
        i: int,
        state: State,
        g: Tensor,
        active: tuple[bool, ...],
        values: Values,
        read: Mapping[str, list[float]],
        fresh: Pending | None,
        comparison: Comparison | None,
        again: bool,
    ) -> bool:
        """Tangents through the step; in the first steps what they show of the starts.

        again: whether it is seen that the gradients are those of an earlier step. Returns whether they are.
        """
        tangents = self.tangents
        dg = tangents.of_gradient(comparison, read)
        if again and comparison is None and dg is None:  # of a step without a product
            dg = g.new_zeros(len(self.vector.moving), len(g))
        again = again or (fresh is None and dg is not None and not tangents.resting)
        scale = getattr(self.optimizers[i], "grad_scale", None)  # fused optimizers unscale by themselves
        if scale is not None:
            g, dg = g / scale, None if dg is None else dg / scale
        tuning = bool(self.vector.moving) and not self.hyper.frozen
        ours = again or fresh is not None
        self.unknown.note(i, self.t, ours, dg is not None, comparison, tangents.resting, tuning)
        if fresh is not None and dg is not None and (self.apart or not fresh.stepped):
            tangents.curvature.add(tangents.tangent, fresh, i if self.apart else None)
        search = self.starts.search
        before = tangents.copied() if self.apart and search.begins(i) else None
        tangents.push(state, g, active, values, self.used.slopes, dg)

        def push_again() -> None:
            self.writer.write(i, self.t, False, self.known)
            tangents.take_again(before)
            tangents.push(state, g, active, self._use(i), self.used.slopes, dg)

        self.starts.make_small(i, self.t, state, push_again)
        search.stepped(i, self.t)
        self.starts.size_decay(i, self.t, state, g, active, values, self.hyper.frozen)
        return again

    def _use(self, i: int) -> Values:
        """Note the values of this step as optimizer i uses them, and dx/dφ."""
        return self.used.note(i, self.transition.values(self.known), self.writer.slopes(self.t))

    # ---- after the step

    def after_load(self, i: int) -> None:
        """Optimizer i has loaded a state."""
        self.writer.loaded(i, self.t)

    def after_step(self, i: int) -> None:
        self.writer.restore(i, self.t)
        if self.skipped:
            return
        self.stepped.add(i)
        self.stepped_with.stepped(i)
        try:
            if len(self.stepped) == len(self.optimizers):
                self._end_step()
        finally:  # val_loss may be interrupted
            if self.mode == "forward":
                self.tangents.note_weights()

    def _end_step(self) -> None:
        """One training step is done: count it, move the hyperparameters if it is time."""
        self.stepped.clear()
        self.void = False
        self.t += 1
        self.tangents.frozen.step_done()
        self.counts |= {"steps": self.t, **self.tangents.counts}
        k, formed, search = len(self.vector.moving), not self.tangents.resting, self.starts.search
        due = self.mode == "forward" and self.bound.reads(self.t, not self.vector.moving, search.active)
        if due and self.hyper.take(self.t, search.active, search.coupled, self.bound.affords_second_draws()):
            assert self.hyper.record is not None
            self.recovery.go_back(self.t, self.hyper.record, self.hyper.val_loss)
        if self.t == self.total:
            self.hyper.progress.say_end(self.t)
        self.bound.step_done(self.t, k, formed, search.active)
        self.follow_phase()

    def follow_phase(self) -> None:
        """Tune what is tuned after so many steps. Where that is a change tangents are zero, as they are of other numbers."""
        if self.choose_what_is_tuned():
            self.starts.begin_phase()
            self.tangents.forget(also_pending=True)
            self.bound.begin_phase(self.counts["capped"])
        self._choose_products()

    def _choose_products(self) -> None:
        names = {self.vector.entries[j].name for j in self.vector.moving}
        self.tangents.stride = self.bound.products_every(self.starts.search.active, names, self.counts["capped"])
        self.tangents.skipping = self.t % self.tangents.stride != 0

    def choose_what_is_tuned(self) -> bool:
        """Tune what is tuned after so many steps. True where that is a change."""
        numbers = Counter(entry.name for entry in self.vector.entries)
        if self.phases is None:
            return self.vector.tune_only(numbers)
        at_rest, in_loss = not self.outer.climbing(), self.vector.hypers
        return self.vector.tune_only(
            self.phases.tuned_at(self.t, self.total, numbers, at_rest, in_loss, self.bound.spending)
        )

    @property
    def apart(self) -> bool:
        """Whether every optimizer goes down a loss of its own, as in a GAN."""
        return self.starts.search.apart

    def state_dict(self) -> dict[str, Any]:
        return {
            "t": self.t,
            "used": self.used.state_dict(),
            "stepped": sorted(self.stepped),
            "void": self.void,
            "unknown changes": self.unknown.state_dict(),
            "cost bound": self.bound.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.t = int(state["t"])
        self.used.load_state_dict(state["used"])
        self.stepped, self.void = set(state["stepped"]), bool(state["void"])
        self.unknown.load_state_dict(state["unknown changes"])
        self.bound.load_state_dict(state["cost bound"])
