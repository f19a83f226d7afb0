r"""The weights at the best validation loss of a run.

A validation loss is read at every hyperparameter step. On a fixed set best is where it is lowest. On random batches the lowest of
many readings is mostly luck, and a mean has to be low too. Which of the two it is shows in the readings v_1, v_2, …: a curve
seldom reverses, white noise does at 2 readings in 3.

    a_t = share of the last 20 readings, about, at which v reversed: (v_t − v_{t−1}) (v_{t−1} − v_{t−2}) < 0
    u_t = mean of the last WINDOW readings up to v_t (of fewer at the beginning)
    s_t = v_t where a_t ≤ REVERSALS, else max(v_t, u_t)            best where s_t < s of the weights kept, by the same formula

In max(v_t, u_t) the mean is there as one low reading proves little, and the reading so that a high one does not take the credit
of those before it. What is kept are the weights of v_t. a_t begins as if PRIOR readings had not reversed: one alone is no noise.

On simulated runs of 150 readings with noise of standard deviation 0.03 the true loss at the weights kept was 0.001 to 0.007 above
the least (at the lowest reading: 0.002 to 0.013); where the set is fixed and the weights themselves jump by 0.03, at most 0.003.
It fails where noisy readings fall and rise again within a few: it is then late by two to four of them. To read the loss
twice would tell noise from jumps, but would shift a validation loss that draws its batches from an iterator or a generator
of its own: nothing is read for this rule alone.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from hypergrad.core.host_copy import HostCopy
from hypergrad.core.problem import Problem, Saved
from hypergrad.optimizers.transition import Transition

WINDOW = 5
REVERSALS, HORIZON, PRIOR = 1 / 3, 20, 3
_NUMBERS: dict[str, Any] = {
    "loss": math.nan,  # v and
    "mean": math.inf,  # u of the weights kept;
    "step": -1,  # −1: none are
    "reversals": 0.0,  # a
    "pairs": 0,  # of differences that a was made of
    "last_step": 0,  # of the last reading, and its loss
    "last_loss": math.nan,
}


class BestWeights:
    """Weights and buffers at the best validation loss so far, one copy of them in host memory.

    Args:
        transition, problem: the parameters that the optimizers hold, and the model's buffers.
    """

    loss: float
    mean: float
    step: int
    reversals: float
    pairs: int
    last_step: int
    last_loss: float

    def __init__(self, transition: Transition, problem: Problem):
        self.transition, self.problem, self.copy = transition, problem, HostCopy(problem.device)
        self.load_state_dict(None)

    def read(self, t: int, loss: float, theta: Tensor | None = None) -> None:
        """Note a validation loss.

        Args:
            t: training steps done.
            loss: one that is not finite never counts.
            theta: the weights [n] at which it was read, never written to; None: those in the model. Buffers are the model's.
        """
        self.last_step, self.last_loss = t, loss
        if not math.isfinite(loss):
            return
        self.recent.append(loss)
        if len(self.recent) > 2:
            x, y, z = list(self.recent)[-3:]
            self.pairs += 1
            self.reversals += (float((z - y) * (y - x) < 0) - self.reversals) * max(
                1 / (PRIOR + self.pairs), 1 / HORIZON
            )
        mean = math.fsum(self.recent) / len(self.recent)
        if self.step < 0 or self._score(loss, mean) < self._score(self.loss, self.mean):
            self.loss, self.mean, self.step = loss, mean, t
            theta = self.transition.flatten(self.transition.params) if theta is None else theta
            self.copy.write([theta, *self.problem.buffers], given=1)

    def _score(self, loss: float, mean: float) -> float:
        return loss if self.reversals <= REVERSALS else max(loss, mean)

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
        at, loss = self.last_step, self.last_loss
        if at == 0 or self.step < 0:
            return None
        end = "at the end" if at == t else f"at step {at:,}, the last one read,"
        best = f"best {self.loss:.4g} at step {self.step:,}"
        return f"validation loss {end} {loss:.4g}, {best} (tuner.best() has those weights)."

    def state_dict(self) -> dict[str, Any]:
        numbers = {name: getattr(self, name) for name in _NUMBERS}
        return numbers | {"recent": list(self.recent), "tensors": self.copy.give()}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """None: nothing was read yet, as in the state of a tuner with keep_best=False."""
        state = _NUMBERS | {"recent": (), "tensors": ()} if state is None else state
        for name, x in _NUMBERS.items():
            setattr(self, name, type(x)(state[name]))
        self.recent = deque(state["recent"], maxlen=WINDOW)
        self.copy.write(state["tensors"])
