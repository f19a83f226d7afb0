"""The context in which every mode runs on the user's model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hypergrad.core.detached import CUT
from hypergrad.core.loss_tensors import unread_error
from hypergrad.core.user_warnings import warn_user
from hypergrad.differentiate.diagnostics import Diagnostics
from hypergrad.differentiate.trajectory import Trajectory


@contextmanager
def evaluation(trajectory: Trajectory) -> Iterator[Diagnostics]:
    """Run a mode on the user's model in place and leave everything as it was found."""
    with trajectory.problem.untouched():
        trajectory.problem.follow_running_stats(trajectory.val_loss, trajectory.val_steps[-1])
        trajectory.problem.check_running_stats()
        diagnostics, before = Diagnostics(trajectory.problem.device), trajectory.problem.read_buffers()
        yield diagnostics
        directions, problem = trajectory.directions, trajectory.problem
        unread = problem.loss_tensors.unread(directions.wrt, problem.read | directions.schedules.reached)
        if unread and diagnostics.differentiated:
            raise unread_error(unread)
        if problem.cut:
            diagnostics.warn(CUT)
        moved = trajectory.problem.unfollowed_since(before) if diagnostics.moved is None else diagnostics.moved
        if moved:
            diagnostics.warn(
                f"training changes the buffers {', '.join(moved)}; a path through them to the validation loss is not part of the "
                "hypergradient. hypergrad.check tells whether that matters here."
            )
            warn_user(diagnostics.warnings[-1])
