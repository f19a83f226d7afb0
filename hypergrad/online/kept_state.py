"""A training state that is kept to go back to: weights, the optimizers' tensors and counts, and the model's buffers.

What optimizers with a rule keep, moments of gradients, is rounded to bfloat16 (8 bits, the range of float32): half the memory.
Before the first step there are none, and they take none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hypergrad.core.host_copy import HostCopy
from hypergrad.core.problem import Problem, Saved
from hypergrad.optimizers.binding import State
from hypergrad.optimizers.traced.packing import packed, unpacked
from hypergrad.optimizers.transition import Transition


class KeptState:
    """Its tensors are never written to. θ and the slots lie in host memory, so that a device's is left to the model.

    Args:
        state: none of its tensors is written to later.
        buffers: the model's.
    """

    def __init__(self, state: State, buffers: list[Saved]):
        tensors = [state.theta, *state.slots.values()]
        self.host, self.devices = HostCopy(state.theta.device), [x.device for x in tensors]
        self.host.write(tensors, given=len(tensors))
        self.names, self.counts, self.rest, self.buffers = tuple(state.slots), state.counts, state.rest, buffers

    @staticmethod
    def of(state: State, problem: Problem, transition: Transition) -> KeptState:
        """Of a state of the live optimizers, as `transition.live` reads it: on a CPU its weights are not copied."""
        made_in_constructor = any(getattr(rule, "first", {}) for rule in transition.rules)
        if any(state.counts) or made_in_constructor or transition.fallbacks:
            return KeptState(state.copied(torch.bfloat16), problem.read_buffers())
        nothing = state.theta.new_zeros(1)  # nobody reads them when they are written back
        return KeptState(replace(state, slots=dict.fromkeys(state.slots, nothing)), problem.read_buffers())

    @property
    def state(self) -> State:
        """Where the model is; waits for what a device had still to send."""
        theta, *slots = (self.host.back(i, device) for i, device in enumerate(self.devices))
        return State(theta, dict(zip(self.names, slots, strict=True)), self.counts, self.rest)

    def state_dict(self) -> dict[str, Any]:
        """Tensors are not copied."""
        theta, *slots = self.host.give()
        return {
            "theta": theta,
            "slots": dict(zip(self.names, slots, strict=True)),
            "counts": self.counts,
            "rest": [[i, packed(x)] for i, x in self.rest.items()],
            "buffers": values_of(self.buffers),
        }

    @staticmethod
    def from_state_dict(saved: Mapping[str, Any], problem: Problem, transition: Transition) -> KeptState:
        like = problem.params[0]
        slots = {name: x.to(like.device, copy=True) for name, x in saved["slots"].items()}
        rest = {i: unpacked(x, transition.fallbacks[i].read()[1]) for i, x in saved["rest"]}
        state = State(saved["theta"].to(like, copy=True), slots, tuple(saved["counts"]), rest)
        return KeptState(state, as_buffers(saved["buffers"], problem))


def values_of(buffers: Sequence[Saved]) -> list[Tensor]:
    return [saved.value for saved in buffers]


def as_buffers(values: Sequence[Tensor], problem: Problem) -> list[Saved]:
    """Values of the model's buffers, as they were saved."""
    return [Saved(b, x.to(b.device, copy=True)) for b, x in zip(problem.buffers, values, strict=False)]
