"""The context in which every mode runs on the user's model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

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
        for name in trajectory.directions.unreached(trajectory.problem.read):
            diagnostics.warn(
                f"nothing depends on hypers[{name!r}], neither the training loss, nor a schedule, nor val_loss: gradient 0."
            )
        moved = trajectory.problem.unfollowed_since(before) if diagnostics.moved is None else diagnostics.moved
        if moved:
            diagnostics.warn(
                f"training changes the buffers {', '.join(moved)}; a path through them to the validation loss is not part of the "
                "hypergradient. hypergrad.check tells whether that matters here."
            )
            warnings.warn(diagnostics.warnings[-1], stacklevel=4)
