r"""The weights at the best validation loss of a run.

A validation loss is read at every hyperparameter step. Where it is that of a random batch, the lowest of many readings is
mostly luck, and early readings, of which there are many, have the most of it. So each reading v_t is judged by the mean of the
last WINDOW readings too:

    u_t = mean of the last WINDOW readings up to v_t (of fewer at the beginning)
    s_t = max(v_t, u_t)                                        best where s_t is less than ever before

Both have to be low: the mean, as one reading alone proves little; and the reading itself, so that a high one does not pass on
the credit of those before it. What is kept then are the weights of v_t.

On a fixed validation set the readings have no noise. While the loss falls u_t is above v_t and falls too, so the newest weights
are kept; where it rises again, the best is at most (WINDOW − 1)/2 readings, about, behind the lowest reading. A lone dip is
passed over there as well. On simulated runs of 150 readings with noise the rule halves the excess of the true loss at the weights
kept over the least (0.012 → 0.006, with readings whose standard deviation is 0.03), and costs 0.003 at most where there is
no noise but the weights themselves jump by as much. Reading the loss twice would tell which of the two it is, and would
shift a validation loss that draws its batches from an iterator or a generator of its own: nothing is read for this rule alone.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from hypergrad.host_copy import HostCopy
from hypergrad.problem import Problem, Saved
from hypergrad.updates.transition import Transition

WINDOW = 5
_NOTHING = {"loss": math.nan, "step": -1, "score": math.inf, "recent": (), "last": (0, math.nan), "tensors": ()}


class BestWeights:
    """Weights and buffers at the best validation loss so far, one copy of them in host memory.

    Args:
        transition, problem: the parameters that the optimizers hold, and the model's buffers.
    """

    def __init__(self, transition: Transition, problem: Problem):
        self.transition, self.problem, self.copy = transition, problem, HostCopy(problem.device)
        self.load_state_dict(None)

    def read(self, t: int, loss: float, theta: Tensor | None = None) -> None:
        """Note a validation loss.

        Args:
            t: training steps done.
            loss: one that is not finite never counts.
            theta: the weights [n] at which it was read; None: those in the model. Buffers are the model's.
        """
        self.last = t, loss
        if not math.isfinite(loss):
            return
        self.recent.append(loss)
        score = max(loss, math.fsum(self.recent) / len(self.recent))
        if score < self.score:
            self.score, self.loss, self.step = score, loss, t
            theta = self.transition.flatten(self.transition.params) if theta is None else theta
            self.copy.write([theta, *self.problem.buffers])

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """The best weights and buffers in the model; what was there, random numbers included, back on the way out."""
        if self.step < 0:
            raise RuntimeError(
                "there are no best weights yet: no finite validation loss was read. One is read every `every` steps "
                "(Tuner(every=...))."
            )
        with self.problem.untouched():
            theta, *buffers = self.copy.read()
            self.transition.load(theta.to(self.problem.device))
            pairs = zip(self.problem.buffers, buffers, strict=True)
            self.problem.write_buffers([Saved(now, x.to(now.device)) for now, x in pairs])
            yield

    def sentence(self, t: int) -> str | None:
        """What is to be said after t steps, the last ones; None where no loss was read in them, or no finite one."""
        at, loss = self.last
        if at == 0 or self.step < 0:
            return None
        end = "at the end" if at == t else f"at step {at:,}, the last one read,"
        best = f"best {self.loss:.4g} at step {self.step:,}"
        return f"validation loss {end} {loss:.4g}, {best} (tuner.best() has those weights)."

    def state_dict(self) -> dict[str, Any]:
        return {
            "loss": self.loss,
            "step": self.step,
            "score": self.score,
            "recent": list(self.recent),
            "last": list(self.last),
            "tensors": list(self.copy.read()),
        }

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """None: nothing was read yet, as in the state of a tuner with keep_best=False."""
        state = _NOTHING if state is None else state
        self.loss, self.step = float(state["loss"]), int(state["step"])  # of the weights kept
        self.score = float(state["score"])  # s of the weights kept
        self.recent = deque(state["recent"], maxlen=WINDOW)
        self.last = int(state["last"][0]), float(state["last"][1])  # step and loss of the last reading
        self.copy.write(state["tensors"])
