"""Steps that are passed over, roll-backs and backtracks: what is done once a policy has judged that something went wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from hypergrad.core.problem import Problem
from hypergrad.logging import Journal
from hypergrad.online.kept_state import KeptState
from hypergrad.online.outer_optimizer import OuterOptimizer
from hypergrad.online.policies.backtracking import LossRecord
from hypergrad.online.policies.divergence_guard import StepJudge
from hypergrad.online.tangents import Tangents
from hypergrad.optimizers.binding import State


class Recovery:
    """Acts on the verdicts of DivergenceGuard and Backtracking.

    Args:
        judge: judges every step; None: all are taken.
        counts: what happened, for `tuner.stats`.
    """

    def __init__(
        self,
        judge: StepJudge | None,
        problem: Problem,
        outer: OuterOptimizer,
        tangents: Tangents,
        journal: Journal,
        counts: dict[str, int],
    ):
        self.judge, self.problem, self.outer, self.tangents = judge, problem, outer, tangents
        self.journal, self.counts = journal, counts
        self.dropped = 0  # steps that did nothing, for whatever reason

    def doubts(self, i: int, loss: float) -> bool:
        """Whether a loss of optimizer i, not judged yet, looks like the batch's own fault."""
        return self.judge is not None and self.judge.doubts(loss, i)

    def part(self, begun: Collection[int]) -> None:
        """Each optimizer has a loss of its own; those so far were of the optimizers that have begun."""
        if self.judge is not None:
            self.judge.part(begun)

    def verdict(
        self, i: int, state: Callable[[], State], finite: bool, loss: float | None, keep: bool, first: bool
    ) -> str:
        """What a step of optimizer i is: "good" where it may be taken, else what is wrong with it, for `act`.

        Args:
            state: reads it.
            finite: whether the gradient is.
            keep: note the state as a good one, where it is.
            first: of the optimizers' steps that make this training step; then a state is kept also where there is none yet.
        """
        if self.judge is None:
            return "good"
        verdict = self.judge.judge(loss, finite, i)
        if verdict in ("false alarm", "bad data"):
            self.counts["false_alarms"] += 1
            self.outer.multiply("lr", self.judge.cut)
            self.outer.cap("lr", math.inf)
        if verdict == "good" and (keep or (first and not self.judge.good)):
            self.judge.keep(state())
        if verdict in ("good", "false alarm"):
            return "good"
        self.tangents.drop_pending()
        self.dropped += 1
        return verdict

    def act(self, t: int, verdict: str, loss: float | None) -> None:
        """Pass step t over, or roll back."""
        assert self.judge is not None
        self.judge.mend_buffers()
        usual = self.judge.usual
        if verdict == "spike":
            self._pass_over(t, "spikes", "a loss was far above the first")
        elif verdict != "blow-up" or not self.judge.roll_back():
            self._pass_over(t, "nonfinite_steps", "a loss or gradient was not finite")
        else:
            self._cut_after_roll_back(t, self.judge.cut, loss, usual)

    def _pass_over(self, t: int, count: str, why: str) -> None:
        self.counts[count] += 1
        self.journal.note_once(t, f"{why}: the step was passed over (tuner.stats['{count}']).")

    def _cut_after_roll_back(self, t: int, by: float, loss: float | None, usual: float) -> None:
        """usual: what the loss had come down to."""
        self.counts["rollbacks"] += 1
        cut = self._cut_lr(by)
        then = (
            f"lr was divided by {by:g}, and training goes on"
            if cut
            else "lr is not tuned and stays: if this goes on, lower it"
        )
        shown = math.nan if loss is None else loss
        self.journal.note(
            t,
            f"blow-up at step {t:,}: the training loss rose to {shown:.3g} from {usual:.3g}, as it does where lr is too large. "
            f"Weights were taken back to the last good ones, {then}.",
            warn=not cut or self.counts["rollbacks"] == 1,
        )

    def _cut_lr(self, by: float) -> bool:
        """lr divided, with a ceiling; tangents and averages start again. False where lr is not tuned."""
        cut = self.outer.multiply("lr", 1 / by)
        self.outer.cap("lr", by**0.5)
        self.tangents.start_again()
        return cut

    def undo_start(self, t: int, kept: KeptState, by: float) -> None:
        """The warm start has led to where training is worse off than before the first step: there again, with a smaller lr."""
        transition = self.tangents.transition
        transition.write(kept.state)
        self.problem.write_buffers(kept.buffers)
        if self.judge is not None:
            self.judge.start_again(transition.live())
        self._cut_lr(by)
        self.tangents.drop_pending()
        self.dropped += 1
        self.counts["rollbacks"] += 1
        back = (
            f"the lr found in the first steps led nowhere: weights taken back to the first ones, lr divided by {by:g}."
        )
        self.journal.note(t, back, warn=False)

    def go_back(self, t: int, record: LossRecord, loss: float) -> None:
        """The validation loss has risen to `loss`: weights back to where it was lowest, with a smaller lr."""
        step, by = record.go(), record.policy.lr_cut
        if self.judge is not None:
            self.judge.start_again(self.tangents.transition.live())
        self._cut_lr(by)
        self.counts["backtracks"] += 1
        back = f"the validation loss rose to {loss:.3g}: weights taken back to those of step {step:,}, lr divided by {by:g}."
        self.journal.note(t, back, warn=False)

    def state_dict(self) -> dict[str, Any]:
        return {"judge": None if self.judge is None else self.judge.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.judge is not None and state["judge"] is not None:
            self.judge.load_state_dict(state["judge"])
