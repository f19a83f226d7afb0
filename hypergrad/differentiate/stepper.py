"""What computes the steps of a trajectory: the eager code (eager.py) or compiled graphs (compile/compiled.py).

Which of them is chosen once, in hypergradient.py; modes do not ask.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from hypergrad.core.restore import Rng
from hypergrad.differentiate.checkpoints import Checkpoint
from hypergrad.differentiate.diagnostics import Diagnostics
from hypergrad.differentiate.offload import Stacks
from hypergrad.differentiate.one_step import StepVJP
from hypergrad.differentiate.tape import TapePlan
from hypergrad.optimizers.binding import State
from hypergrad.optimizers.transition import Tangent


class Stepper(Protocol):
    """Steps of one trajectory with their vjp and jvp.

    The model's buffers are those before a step when `step` or `jvp` computes it, and those after it on return.
    """

    def plan(self, at: Checkpoint, rng: Rng, stacks: Stacks, every: int | None, graph_memory: float) -> TapePlan:
        """How the trajectory is recorded for `vjp`. Step 0 is computed next.

        Args:
            at, rng: the state and the random numbers before step 0.
            stacks: where checkpoints go.
            every: steps between checkpoints; None: as memory allows.
            graph_memory: bytes that what is kept of steps may take up.
        """
        ...

    def step(self, state: State, t: int, diagnostics: Diagnostics, keep: bool = False) -> tuple[State, Tensor]:
        """The state after step t, and the step's loss. `keep`: keep what the step's vjp can use."""
        ...

    def vjp(self, at: Checkpoint, t: int, lam: Tangent, rng: Rng, diagnostics: Diagnostics) -> StepVJP:
        """The adjoint before step t from that after it. What was kept of the step is used and given up.

        Args:
            at, rng: the state and the random numbers before the step.
        """
        ...

    def jvp(self, state: State, t: int, tangent: Tangent, diagnostics: Diagnostics) -> tuple[State, Tangent]:
        """State and tangents [k, n] after step t."""
        ...

    def load(self, state: State) -> None:
        """Put the parameters of the state that `step` or `jvp` returned into the model, where they are not there yet."""
        ...

    def restore(self, at: Checkpoint) -> None:
        """Put a checkpoint's parameters and buffers into the model."""
        ...

    def stats(self) -> dict[str, Any]:
        """Entries of `Result.stats`."""
        ...
