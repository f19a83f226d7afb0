"""A state written back into a live optimizer: it goes on from there as it did the first time (what a roll-back needs)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hypergrad.optimizers.transition import Transition
from tests import references
from tests.optimizers.live_optimizers import assert_equal, gradients, make, parameters, sometimes

CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.2}),
    "adam": (torch.optim.Adam, {"lr": 0.1}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.1, "initial_accumulator_value": 0.3, "lr_decay": 0.1}),
    "nadam": (torch.optim.NAdam, {"lr": 0.1}),
    "adafactor": (torch.optim.Adafactor, {"lr": 0.1}),
    "muon": (torch.optim.Muon, {"lr": 0.1}),
    "lion": (references.Lion, {"lr": 0.1}),
    "lamb": (references.Lamb, {"lr": 0.1}),
    "lamb of pytorch_optimizer": ("pytorch_optimizer.Lamb", {"lr": 0.1}),
}


@pytest.mark.parametrize("taken", [0, 1, 4])
@pytest.mark.parametrize("name", CASES)
def test_training_goes_on_from_a_state_written_back(name: str, taken: int) -> None:
    """`taken` steps are done before the state is read, some parameters having had no gradient yet."""
    params = parameters(torch.float32, CASES[name][0])
    optimizer = make(*CASES[name], params)
    grads = [gradients(params, t, sometimes) for t in range(taken + 3)]

    def steps(first: int) -> None:
        for row in grads[first:]:
            for p, g in zip(params, row, strict=True):
                p.grad = None if g is None else g.clone()
            optimizer.step()

    grads, later = grads[:taken], grads[taken:]
    steps(0)
    transition = Transition([optimizer], frozenset())
    state, grads = transition.read(), later
    steps(0)
    want, counts = transition.read(), transition.counts()
    transition.write(state)
    assert transition.read().equals(state)
    steps(0)
    assert transition.counts() == counts
    assert_equal(transition.read().theta, want.theta)
    assert all(torch.equal(x, want.slots[slot]) for slot, x in transition.read().slots.items())
