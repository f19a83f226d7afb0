"""Loops that call `optimizer.step()`, `zero_grad()` or `loss.backward()` where they should not: what is said, and how often."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hypergrad
from hypergrad.online.plan import Plan
from tests.online.live_loops import (
    Backward,
    as_given,
    data,
    float64,
    matches_differences,
    mse,
    sgd,
    two_layers,
    validation,
)

__all__ = ["float64"]  # the fixture
STRIDE = 3
PLAN = Plan(cost=2.0, product=2.0, validation=1.0, every=1000, resting=1000, stride=STRIDE)
AGAIN = r"optimizer.step\(\) was called again without a backward"
Body = Callable[[nn.Module, Any, hypergrad.Tuner, int], None]


def train(body: Body, steps: int, freeze: bool = False, **options: Any) -> tuple[hypergrad.Tuner, list[str]]:
    """What is said of a loop with this body."""
    model = two_layers()
    opt = sgd()(model)
    tuner = as_given(model, opt, validation(model), **{"tune": ("lr",), "every": 1000, **options})
    if freeze:
        tuner.freeze()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for t in range(steps):
            torch.manual_seed(t)
            body(model, opt, tuner, t)
    return tuner, [str(w.message) for w in caught]


def backward(model: nn.Module, opt: Any, tuner: hypergrad.Tuner, t: int, plain: bool = False) -> None:
    opt.zero_grad()
    loss = mse(model, data()[0][t % 12])
    loss.backward() if plain else tuner.backward(loss)


# ---- the step called again


def twice(model: nn.Module, opt: Any, tuner: hypergrad.Tuner, t: int) -> None:
    backward(model, opt, tuner, t)
    opt.step()
    opt.step()


OPTIONS: dict[str, dict[str, Any]] = {
    "products in every step": {},
    "products in one step of three": {"plan": PLAN},
    "nothing is tuned": {"freeze": True},
    "nothing is tuned any more": {"total_steps": 20},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_a_step_called_again_is_said_once_and_counted(case: str) -> None:
    tuner, said = train(twice, 30, **OPTIONS[case])
    assert len([x for x in said if "step() was called again" in x]) == 1
    assert not any("did not come from" in x for x in said)
    stats = tuner.stats
    assert (stats["steps"], stats["repeated_steps"], stats["gradients"]) == (60, 30, 30)
    assert stats["plain_steps"] == stats["changed_gradients"] == 0


def test_steps_taken_twice_on_purpose_have_the_hypergradients_of_differences_and_the_weights_of_the_plain_loop() -> (
    None
):
    def loop(model: nn.Module, opt: Any, backward: Backward) -> None:
        for batch in data()[0][:6]:
            opt.zero_grad()
            backward(mse(model, batch))
            opt.step()
            opt.step()

    def make() -> tuple[Any, Any]:
        model = two_layers()
        return model, sgd(momentum=0.9)(model)

    with pytest.warns(UserWarning, match=AGAIN):
        matches_differences(make, loop)
    (model, opt), (same, stock) = make(), make()
    tuner = as_given(model, opt, validation(model))
    tuner.freeze()
    torch.manual_seed(7)
    with pytest.warns(UserWarning, match=AGAIN):
        loop(model, opt, tuner.backward)
    torch.manual_seed(7)
    loop(same, stock, Tensor.backward)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), same.parameters(), strict=True))


def test_a_gradient_that_was_cleared_or_came_from_elsewhere_is_no_step_called_again() -> None:
    def body(model: nn.Module, opt: Any, tuner: hypergrad.Tuner, t: int) -> None:
        backward(model, opt, tuner, t)
        opt.step()
        opt.zero_grad(set_to_none=t % 2 == 0)
        mse(model, data()[0][t % 12]).backward()
        opt.step()
        opt.step()  # of a gradient that is not the tuner's

    tuner, said = train(body, 10, plan=PLAN)
    assert tuner.stats["repeated_steps"] == 0 and tuner.stats["plain_steps"] == 20
    assert not any("again without" in x for x in said)


def test_optimizers_in_turn_and_gradients_left_to_accumulate_are_no_steps_called_again() -> None:
    first, second = two_layers(), two_layers(1)
    model = nn.ModuleList([first, second])
    opts = [torch.optim.SGD(x.parameters(), lr=0.01) for x in (first, second)]
    tuner = as_given(model, opts, lambda: mse(first, data()[1]) + mse(second, data()[1]), tune=("lr",), every=1000)
    for t in range(8):
        tuner.backward(mse(first, data()[0][t % 12]) + mse(second, data()[0][t % 12]))
        for opt in opts[: 1 + t % 2]:
            opt.step()
    assert tuner.stats["repeated_steps"] == tuner.stats["plain_steps"] == tuner.stats["changed_gradients"] == 0


def test_a_tuner_does_not_hold_gradients_that_were_cleared() -> None:
    model = two_layers()
    opt = sgd()(model)
    tuner = as_given(model, opt, validation(model), tune=("lr",), every=1000)
    backward(model, opt, tuner, 0)
    opt.step()
    (_, ref, _), *_ = tuner._loop.stepped_with.last.values()
    assert ref() is not None
    opt.zero_grad()
    assert ref() is None


# ---- steps by loss.backward()


@pytest.mark.parametrize("case", ["products in every step", "products in one step of three", "nothing is tuned"])
def test_every_step_by_loss_backward_is_counted(case: str) -> None:
    tuner, said = train(lambda m, o, t, i: by_turns(m, o, t, i, 2), 60, **OPTIONS[case])
    assert tuner.stats["plain_steps"] == 30 and tuner.stats["repeated_steps"] == 0
    assert "did not come from tuner.backward(loss): it trains" in said[0]
    often = [x for x in said if "of 80 steps 20 or more" in x]
    assert len(often) == (0 if case == "nothing is tuned" else 1) and len(said) == 1 + len(often)


def by_turns(model: nn.Module, opt: Any, tuner: hypergrad.Tuner, t: int, every: int) -> None:
    backward(model, opt, tuner, t, plain=t % every == 0)
    opt.step()


def test_rare_steps_by_loss_backward_are_said_once() -> None:
    tuner, said = train(lambda m, o, t, i: by_turns(m, o, t, i, 5), 115)
    assert tuner.stats["plain_steps"] == 23 and len(said) == 1


# ---- zero_grad between backward and step


def emptied_unless(keep: Callable[[int], bool], to_none: bool = True) -> Body:
    def body(model: nn.Module, opt: Any, tuner: hypergrad.Tuner, t: int) -> None:
        backward(model, opt, tuner, t)
        if not keep(t):
            opt.zero_grad(set_to_none=to_none)
        opt.step()

    return body


@pytest.mark.parametrize("case", ["products in every step", "products in one step of three", "nothing is tuned"])
def test_gradients_emptied_before_the_step_are_said_at_the_twentieth_in_a_row(case: str) -> None:
    assert train(emptied_unless(lambda t: False), 19, **OPTIONS[case])[1] == []
    tuner, said = train(emptied_unless(lambda t: False), 40, **OPTIONS[case])
    assert len(said) == 1 and "gradients were emptied between" in said[0] and tuner.stats["steps"] == 40


def test_gradients_emptied_now_and_then_are_not_said() -> None:
    assert train(emptied_unless(lambda t: t % 20 == 0), 60)[1] == []


def test_gradients_set_to_zero_before_every_step_are_an_error_that_says_so() -> None:
    with pytest.raises(ValueError, match=r"they were set to zero\. Call optimizer\.zero_grad\(\) before"):
        train(emptied_unless(lambda t: False, to_none=False), 30)


def test_an_optimizer_that_no_loss_reaches_is_not_told_of_emptied_gradients() -> None:
    first, second = two_layers(), two_layers(1)
    model = nn.ModuleList([first, second])
    opts = [torch.optim.SGD(x.parameters(), lr=0.01) for x in (first, second)]
    tuner = as_given(model, opts, lambda: mse(first, data()[1]) + mse(second, data()[1]), tune=("lr",), every=1000)
    for t in range(30):
        for opt in opts:
            opt.zero_grad()
        tuner.backward(mse(first, data()[0][t % 12]))
        for opt in opts:
            opt.step()
    assert tuner.stats["steps"] == 30
