"""What is checked once, before the weights first change: whether losses read what is to be tuned, and what a graph shows."""

from __future__ import annotations

from hypergrad.core.batchnorm import RunningStats
from hypergrad.core.detached import CUT
from hypergrad.core.loss_tensors import unread_error
from hypergrad.online.hyper_step import HyperSteps


class FirstStepChecks:
    """The checks of the first training step.

    Args:
        hyper: with the problem, the validation loss, the tangents and the journal.
        validated: False where the validation loss could not be called yet, as it reads the tuner.
        forward: whether tangents are carried along: they leave running statistics out.
    """

    def __init__(self, hyper: HyperSteps, validated: bool, forward: bool):
        self.hyper, self.problem, self.forward = hyper, hyper.problem, forward
        self.validated, self.done = validated, False
        self.left_out = self._left_out()

    def _left_out(self) -> RunningStats | None:
        """The running statistics that the validation loss reads, where tangents leave them out."""
        stats = self.problem.stats
        if self.forward:
            self.problem.stop_following_running_stats()
        return stats if self.forward else None

    def run(self, t: int) -> None:
        """After the backward passes of a step, before it is taken.

        Raises:
            ValueError: no loss reads a tensor that is tuned.
        """
        if self.done:
            return
        self.done, problem = True, self.problem
        if not self.validated:
            problem.validate(self.hyper.validation, t)
            problem.follow_running_stats(self.hyper.validation, t)
            self.left_out = self._left_out()
        problem.read |= self.hyper.tangents.read
        unread = problem.loss_tensors.unread(list(problem.hypers), problem.read)
        if unread:
            raise unread_error(unread)
        if self.hyper.tangents.cut:
            self.hyper.journal.note(t, CUT)
        if self.left_out is not None and self.left_out.trained():
            self.hyper.journal.note(t, STATS)


STATS = (
    "val_loss runs BatchNorm in eval mode: the path from weights to running statistics is not part of the hypergradients "
    "that tuner.backward carries along. Validate in train mode, or use tuner.step with mode='unrolled', which has it."
)
