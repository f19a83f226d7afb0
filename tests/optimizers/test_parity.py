"""Every update rule, driven by constants, is torch.optim to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch

from hypergrad.optimizers.transition import Transition
from tests.optimizers.live_optimizers import (
    FLAGS,
    STEPS,
    always,
    assert_equal,
    gradients,
    make,
    parameters,
    sometimes,
    step_both,
    trained,
)  # fmt: skip
from tests.tiers import slow_but

WAYS: dict[str, tuple[torch.dtype, int, Callable[[int, int], bool]]] = {
    f"{dtype}, {'live' if live else 'fresh'}, {present.__name__}": (dtype, live, present)
    for dtype, live, present in product((torch.float32, torch.float64), (0, 4), (always, sometimes))
}


@pytest.mark.parametrize("way", slow_but(WAYS, "torch.float32, live, sometimes", "torch.float64, fresh, always"))
@pytest.mark.parametrize("flags", FLAGS)
def test_rule_is_torch(flags: str, way: str) -> None:
    dtype, live, present = WAYS[way]
    params, optimizer = trained(flags, dtype, live, present)
    transition = Transition([optimizer], frozenset())
    state = transition.read()
    for t in range(live, live + STEPS):
        state = step_both(optimizer, transition, state, gradients(params, t, present))
    assert_equal(state.theta, transition.flatten(params))
    for name, slot in transition.read().slots.items():
        assert_equal(state.slots[name], slot)
    if not flags.startswith(("sgd", "lion", "muon")):  # those do not count
        assert state.counts == transition.counts()


KERNELS = [
    *product(("SGD", "Adam", "AdamW", "Adagrad"), ("foreach", "fused")),
    *product(("RMSprop", "Adamax", "NAdam", "RAdam", "Adadelta", "Adafactor"), ("foreach",)),
]


@pytest.mark.parametrize(("name", "kernel"), KERNELS)
def test_other_kernels_of_torch_are_the_same_rule(name: str, kernel: str) -> None:
    params = parameters(torch.float32)
    optimizer = make(getattr(torch.optim, name), {"lr": 0.01, "weight_decay": 0.1, kernel: True}, params)
    transition = Transition([optimizer], frozenset())
    state = transition.read()
    for t in range(STEPS):
        state = step_both(optimizer, transition, state, gradients(params, t, sometimes))
    assert_equal(state.theta, transition.flatten(params), bits=False)
    assert_equal(transition.read().theta, state.theta, bits=False)


@pytest.mark.parametrize("clip", ["clip_norm", "clip_value"])
def test_clipping_is_torch(clip: str) -> None:
    params = parameters(torch.float32)
    transition = Transition([torch.optim.SGD(params, lr=0.1)], frozenset(), clip)
    torch_clips = {"clip_norm": torch.nn.utils.clip_grad_norm_, "clip_value": torch.nn.utils.clip_grad_value_}
    for t in range(20):
        grads = gradients(params, t, sometimes)
        threshold = 0.5 * t
        got = transition.clipped(transition.flatten(grads), {clip: [threshold]})
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        torch_clips[clip](params, threshold)
        assert_equal(got, transition.flatten([p.grad for p in params]))


def test_two_optimizers_are_one_transition() -> None:
    params = parameters(torch.float32)
    first, second = torch.optim.SGD(params[:2], lr=0.1, momentum=0.9), torch.optim.AdamW(params[2:], lr=0.01)
    transition = Transition([first, second], frozenset())
    state = transition.read()
    for _ in range(20):
        second_before = [p.detach().clone() for p in params[2:]]
        state = step_both(first, transition, state, gradients(params, 0, always))
        assert all(torch.equal(a, b) for a, b in zip(second_before, params[2:], strict=True))
        second.step()
    assert_equal(state.theta, transition.flatten(params))


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_on_bfloat16_parameters(nesterov: bool) -> None:
    """torch's buffer is scaled in place there without nesterov: refused."""
    params = [p.detach().bfloat16().requires_grad_() for p in parameters(torch.float32, torch.optim.Muon)]
    optimizer = make(torch.optim.Muon, {"lr": 0.1, "nesterov": nesterov}, params)
    transition = Transition([optimizer], frozenset())
    state = transition.read()
    if not nesterov:
        with pytest.raises(NotImplementedError, match="nesterov=True"):
            step_both(optimizer, transition, state, gradients(params, 0, always))
        return
    for t in range(20):
        state = step_both(optimizer, transition, state, gradients(params, t, always))
    assert_equal(state.theta, transition.flatten(params))
