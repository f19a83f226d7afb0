"""optimizer.step(closure): the same numbers as backward and step, for optimizers that call it once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.online.live_loops import as_given, data, float64, mse, sgd, two_layers, validation  # noqa: F401

OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": sgd(momentum=0.8),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=0.02),
    "Adadelta": lambda model: torch.optim.Adadelta(model.parameters(), lr=0.5),
}
GIVEN: dict[str, Callable[[Any, Any], Any]] = {
    "by position": lambda opt, closure: opt.step(closure),
    "by name": lambda opt, closure: opt.step(closure=closure),
}


def closure(model: Any, opt: Any, batch: Any, backward: Callable[[Tensor], object]) -> Tensor:
    opt.zero_grad()
    loss = mse(model, batch)
    backward(loss)
    return loss


def trained(make: Callable[[nn.Module], torch.optim.Optimizer], step: Callable[[Any, Any], Any] | None) -> Any:
    """Weights, values and hypergradients after a run, and what step returned. None: backward, then step()."""
    model = two_layers()
    opt, returned = make(model), []
    tuner = as_given(model, opt, validation(model), "lr", every=4)
    torch.manual_seed(3)
    for batch in data()[0]:
        compute = partial(closure, model, opt, batch, tuner.backward)
        if step is None:
            returned.append(compute())
            opt.step()
        else:
            returned.append(step(opt, compute))
    numbers = {**tuner.values, **{f"d/d{name}": x for name, x in tuner.hypergradients.items()}}
    return [*model.parameters(), *numbers.values(), *returned], tuner.stats


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_closure_gives_what_backward_and_step_give(name: str, given: str) -> None:
    (plain, stats), (found, stats_found) = trained(OPTIMIZERS[name], None), trained(OPTIMIZERS[name], GIVEN[given])
    assert len(plain) == len(found) and all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
    assert stats == stats_found and stats["hyper_steps"] == 3 and stats["changed_gradients"] == 0


def test_frozen_it_trains_as_without_a_tuner() -> None:
    weights = []
    for tuned in (True, False):
        model = two_layers()
        opt = torch.optim.AdamW(model.parameters(), lr=0.02)
        tuner = as_given(model, opt, validation(model), "lr") if tuned else None
        if tuner is not None:
            tuner.freeze()
        torch.manual_seed(3)
        for batch in data()[0]:
            opt.step(partial(closure, model, opt, batch, Tensor.backward if tuner is None else tuner.backward))
        weights.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_a_closure_that_raises_leaves_the_step_undone() -> None:
    model = two_layers()
    opt = sgd()(model)
    tuner = as_given(model, opt, validation(model), "lr")
    tuner.backward(mse(model, data()[0][0]))
    opt.step()
    before = [p.clone() for p in model.parameters()]

    def interrupted() -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        opt.step(interrupted)
    assert tuner.stats["steps"] == 1 and all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    opt.zero_grad()
    tuner.backward(mse(model, data()[0][1]))
    opt.step()
    assert tuner.stats["steps"] == 2 and tuner.stats["changed_gradients"] == tuner.stats["plain_steps"] == 0


class TwoGradients(torch.optim.SGD):
    """Sharpness-aware: the gradient of a step is that at weights moved uphill."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        if closure is None:
            return super().step()
        with torch.enable_grad():
            closure()
        moved = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        with torch.no_grad():
            for p in moved:
                p.add_(p.grad, alpha=0.1)
            with torch.enable_grad():
                loss = closure()
            for p in moved:
                p.sub_(p.grad, alpha=0.1)
        super().step()
        return loss


def test_an_optimizer_that_needs_two_gradients_is_refused_and_weights_stay() -> None:
    model = two_layers()
    opt = TwoGradients(model.parameters(), lr=0.1)
    tuner = as_given(model, opt, validation(model), "lr")
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(NotImplementedError, match=r"TwoGradients.step calls its closure more than once.*close\(\)"):
        opt.step(partial(closure, model, opt, data()[0][0], tuner.backward))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
