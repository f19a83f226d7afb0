"""What keeps a run alive: steps on bad batches do nothing, a blow-up is rolled back.

With L₀ the larger of the first training loss and the validation loss before the first step, and the running mean of the training
loss taken over about `horizon` steps, once it has seen so many:

    bad batch    a loss or gradient that is not finite with weights that are
    surge        a loss above surge · mean, and `surge_sds` standard deviations above the mean
    spike        a surge above L₀, or a loss above blow_up · L₀
    blow-up      weights that are not finite; or a mean above drift · L₀; or a mean above L* + lost_share · (L₀ − L*) and
                 2 standard deviations above L*, the least mean so far; or `patience` bad batches, or spikes and surges, in a row:
                 one may be the batch's fault, several are the weights'

Steps on bad batches and spikes are passed over. At a blow-up weights, buffers and optimizer tensors go back to the older of two
good states, and lr is divided by `lr_cut` (after surges, which are noticed early, by `surge_cut`). A roll-back after which the
loss is as high at the good weights was a *false alarm* (L₀ becomes that loss), or it was *bad data* where the loss is not
finite there either.

Where every batch is the whole set, surges are how lr beyond the edge of stability shows, long before the mean does: left to
itself it kills ReLU units, and its tangents speak of nothing else for hundreds of steps.

Where every optimizer has a loss of its own, each is judged beside its own past, and may rise (loss_past.py).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hypergrad.core.multi_tensor import norms
from hypergrad.core.problem import Problem
from hypergrad.online.kept_state import KeptState, as_buffers, values_of
from hypergrad.online.policies.loss_past import Limits, LossPast
from hypergrad.optimizers.binding import State
from hypergrad.optimizers.transition import Transition

NEVER = 10**9


@dataclass(frozen=True)
class DivergenceGuard(Limits):
    """Left out, every step is taken as it comes."""

    def start(self, transition: Transition, problem: Problem, reference: float) -> StepJudge:
        """reference: the validation loss before the first step."""
        return StepJudge(self, transition, problem, reference)


class StepJudge:
    """Judges every step before it is taken, and keeps the last good states."""

    def __init__(self, policy: DivergenceGuard, transition: Transition, problem: Problem, reference: float):
        self.policy, self.transition, self.problem, self.before = policy, transition, problem, reference
        self.past = self._new()  # of the losses that the last step was judged by
        self.own: dict[int, LossPast] | None = None  # by optimizer, where each has a loss of its own
        self.good: deque[KeptState] = deque(maxlen=2)
        self.first_buffers = problem.read_buffers()

    def _new(self) -> LossPast:
        return LossPast(self.policy, self.before, self.transition.maximizes)

    def part(self, begun: Collection[int]) -> None:
        """Each optimizer has a loss of its own from now on; those so far were of the optimizers that have begun."""
        common = self.past
        self.own = {i: common.copy() if i in begun else self._new() for i in range(len(self.transition.optimizers))}
        for past in self.own.values():
            past.alone = True

    @property
    def cut(self) -> float:
        """By which lr is divided at the next roll-back."""
        return self.past.cut

    @property
    def reference(self) -> float:
        return self.past.reference

    @property
    def usual(self) -> float:
        """What the training loss had come down to."""
        past = self.past
        return min(past.best, past.mean) if math.isfinite(past.best) else past.reference

    def judge(self, loss: float | None, finite: bool, optimizer: int = 0) -> str:
        """One of good, bad batch, spike, blow-up, and after a roll-back false alarm or bad data.

        Args:
            loss: None: not known.
            finite: whether the gradient is.
            optimizer: whose step it is.
        """
        past = self.past = self.past if self.own is None else self.own[optimizer]
        if finite and (loss is None or math.isfinite(loss)):
            verdict = "good" if loss is None else past.judge(loss, not self.good)
            past.bad_in_a_row = past.bad_in_a_row + 1 if verdict in ("spike", "surge") else 0
            if past.bad_in_a_row >= self.policy.patience:
                return "blow-up"
            return "good" if verdict == "surge" else verdict
        if past.restored and self._weights_finite():  # at good weights too: it is the data
            past.restored, past.bad_in_a_row = False, -NEVER
            return "bad data"
        past.bad_in_a_row += 1
        if not self._weights_finite() or past.bad_in_a_row >= self.policy.patience:
            return "blow-up"
        return "bad batch"

    def doubts(self, loss: float, optimizer: int = 0) -> bool:
        """Whether a loss, not judged yet, looks like the batch's own fault: nothing is to be learnt from that batch."""
        past = self.past if self.own is None else self.own[optimizer]
        if (math.isfinite(loss) and not past.is_spike(loss)) or past.bad_in_a_row + 1 >= self.policy.patience:
            return False
        return self._weights_finite()

    def _weights_finite(self) -> bool:
        return bool(
            norms([p.detach() for p in self.transition.params], math.inf).isfinite().all()
        )  # one wait for a device

    def _pasts(self) -> list[LossPast]:
        return [self.past] if self.own is None else list(self.own.values())

    def keep(self, state: State) -> None:
        """Note a live state as good, if the loss has kept most of the progress it made."""
        if all(past.healthy() for past in self._pasts()) or not self.good:
            if len(self.good) == self.good.maxlen:
                self.good.popleft()  # its memory is free before the new one takes its own
            self.good.append(KeptState.of(state, self.problem, self.transition))

    def mend_buffers(self) -> None:
        """A bad batch may have put a NaN into running statistics: take those of the last good state, or the first ones."""
        if not all(bool(torch.isfinite(b).all()) for b in self.problem.buffers):
            self.problem.write_buffers(self.good[-1].buffers if self.good else self.first_buffers)

    def start_again(self, state: State) -> None:
        """From a live state that is a good one, and not the one that training has come to: forget the losses so far."""
        for past in self._pasts():
            past.start_again(False)
            past.best = past.level = math.inf
        self.good.clear()
        self.good.append(KeptState.of(state, self.problem, self.transition))

    def roll_back(self) -> bool:
        """Copy weights, buffers and optimizer tensors back, in place, from the older of the states kept."""
        if not self.good:
            return False
        good = self.good[0]
        self.good.clear()
        self.good.append(good)
        for past in self._pasts():
            past.start_again(True)
        self.problem.write_buffers(good.buffers)
        self.transition.write(good.state)
        return True

    def state_dict(self) -> dict[str, Any]:
        return {
            "past": self.past.state_dict(),
            "own": None if self.own is None else [[i, past.state_dict()] for i, past in self.own.items()],
            "good": [kept.state_dict() for kept in self.good],
            "first buffers": values_of(self.first_buffers),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.past.load_state_dict(state["past"])
        self.own = None if state["own"] is None else {int(i): self._new() for i, _ in state["own"]}
        for i, saved in state["own"] or ():
            assert self.own is not None
            self.own[int(i)].load_state_dict(saved)
        self.good = deque(
            (KeptState.from_state_dict(x, self.problem, self.transition) for x in state["good"]), maxlen=2
        )
        self.first_buffers = as_buffers(state["first buffers"], self.problem)
