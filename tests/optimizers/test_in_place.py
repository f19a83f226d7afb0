"""Tangents taken through a step in their own memory, from slots that are joined range by range, are those of the plain call."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import hypergrad.optimizers.transition as steps
from hypergrad.optimizers.transition import Tangent, Transition
from tests.optimizers.live_optimizers import FLAGS, always, gradients, sometimes, trained


def copied(tangent: Tangent) -> Tangent:
    return Tangent(tangent.theta.clone(), {name: x.clone() for name, x in tangent.slots.items()})


@pytest.mark.parametrize("present", [always, sometimes])
@pytest.mark.parametrize("taken", [0, 4], ids=["fresh", "live"])
@pytest.mark.parametrize("flags", FLAGS)
def test_in_place_and_from_live_slots(
    flags: str, taken: int, present: Callable[[int, int], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    params, optimizer = trained(flags, torch.float64, taken, present)
    transition = Transition([optimizer], frozenset())
    grads = gradients(params, taken, present)
    g, active = transition.flatten(grads), tuple(x is not None for x in grads)
    state, seeds = transition.read(), [{"lr": torch.randn(2, 1, dtype=torch.float64)} for _ in transition.groups]
    tangent = Tangent(
        torch.randn(2, len(g)).double(), {n: torch.randn(2, x.numel()).double() for n, x in state.slots.items()}
    )
    dg, before = torch.randn(2, len(g)).double(), copied(tangent)

    def pushed(state: steps.State, into: bool) -> Tangent:
        rest = copied(tangent)
        out = transition.jvp(state, g, active, transition.values(), rest, dg, seeds, in_place=into)
        if into:
            assert out.theta.data_ptr() == rest.theta.data_ptr()
        return out

    want = pushed(state, False)
    monkeypatch.setattr(steps, "CHUNK", 3)
    live = Transition([optimizer], frozenset()).live()
    for name, x in live.copied().slots.items():
        assert torch.equal(x, state.slots[name])
    got = [pushed(state, True), pushed(live, True), pushed(live, False)]
    pairs: list[tuple[Tensor, Tensor]] = [(tangent.theta, before.theta)]
    pairs += [(out.theta, want.theta) for out in got]
    pairs += [(out.slots[name], x) for out in got for name, x in want.slots.items()]
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-13, atol=0, equal_nan=True)
