"""A tuner on every optimizer that has a rule: it brings a learning rate typed far too small up, and frozen it changes nothing."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hypergrad
from tests.references import Lamb, Lion, third_party
from tests.tiers import slow_but

STEPS = 300
Optimizers = list[torch.optim.Optimizer]


def stock(cls: Any, **numbers: Any) -> Callable[[nn.Module], Optimizers]:
    def make(model: nn.Module) -> Optimizers:
        return [(third_party(cls) if isinstance(cls, str) else cls)(model.parameters(), weight_decay=1e-4, **numbers)]

    return make


def muon_and_adamw(lr: float) -> Callable[[nn.Module], Optimizers]:
    """Matrices and the rest, as torch's page on Muon has it."""

    def make(model: nn.Module) -> Optimizers:
        split = [[p for p in model.parameters() if (p.ndim == 2) == matrix] for matrix in (True, False)]
        return [torch.optim.Muon(split[0], lr=lr, weight_decay=1e-4), torch.optim.AdamW(split[1], lr=lr)]

    return make


# at a learning rate a thousand times below torch's default, or thereabouts
MAKE: dict[str, Callable[[nn.Module], Optimizers]] = {
    "adagrad": stock(torch.optim.Adagrad, lr=1e-5),
    "adamax": stock(torch.optim.Adamax, lr=2e-6),
    "nadam": stock(torch.optim.NAdam, lr=2e-6),
    "radam": stock(torch.optim.RAdam, lr=1e-6),
    "adadelta": stock(torch.optim.Adadelta, lr=1e-3),
    "adafactor": stock(torch.optim.Adafactor, lr=1e-5),
    "lion": stock(Lion, lr=1e-7),
    "lamb": stock(Lamb, lr=1e-6),
    "muon and adamw": muon_and_adamw(1e-6),
    "lion of pytorch_optimizer": stock("pytorch_optimizer.Lion", lr=1e-7),
    "lion of lion_pytorch": stock("lion_pytorch.Lion", lr=1e-7),
    "lamb of pytorch_optimizer": stock("pytorch_optimizer.Lamb", lr=1e-6),
}


def problem() -> tuple[nn.Module, Callable[[int], Tensor], Callable[[], Tensor]]:
    """A small network that is to learn another one, from batches of 32."""
    torch.manual_seed(0)
    model, teacher = (nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1)) for _ in range(2))
    x = torch.randn(512, 6)
    y = 3 * teacher(x).detach()

    def loss(rows: slice) -> Tensor:
        return ((model(x[rows]) - y[rows]) ** 2).mean()

    return model, lambda t: loss(slice(t % 12 * 32, t % 12 * 32 + 32)), lambda: loss(slice(384, None))


def train(
    make: Callable[[nn.Module], Optimizers], steps: int, frozen: bool | None
) -> tuple[float, nn.Module, Any, Any]:
    """Validation loss, model, optimizers, tuner. frozen None: without a tuner."""
    model, loss, val_loss = problem()
    optimizers, tuner = make(model), None
    if frozen is not None:
        tuner = hypergrad.Tuner(model, optimizers, val_loss, total_steps=None if frozen else steps)
        if frozen:
            tuner.freeze()
    for t in range(steps):
        for opt in optimizers:
            opt.zero_grad()
        tuner.backward(loss(t)) if tuner is not None else loss(t).backward()
        for opt in optimizers:
            opt.step()
    return float(val_loss().detach()), model, optimizers, tuner


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKE)
def test_a_learning_rate_typed_far_too_small_is_found(name: str) -> None:
    untuned, *_ = train(MAKE[name], STEPS, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is coupled and ill-conditioned is said
        tuned, model, _, tuner = train(MAKE[name], STEPS, False)
    assert tuned < 0.2 * untuned
    assert tuner.stats["changed_gradients"] == tuner.stats["plain_steps"] == 0
    assert all(bool(torch.isfinite(x).all()) for x in (*model.parameters(), *tuner.values.values()))


@pytest.mark.parametrize("name", slow_but(MAKE, "nadam", "adafactor", "lamb", "muon and adamw"))
def test_frozen_it_trains_bit_identically(name: str) -> None:
    plain, tuned = (train(MAKE[name], 30, frozen) for frozen in (None, True))
    assert all(torch.equal(a, b) for a, b in zip(plain[1].parameters(), tuned[1].parameters(), strict=True))
    for a, b in zip(plain[2], tuned[2], strict=True):
        states = [copy.deepcopy(opt.state_dict()) for opt in (a, b)]
        assert states[0]["param_groups"] == states[1]["param_groups"]
        for p, state in states[0]["state"].items():
            assert all(
                torch.equal(torch.as_tensor(x), torch.as_tensor(states[1]["state"][p][k])) for k, x in state.items()
            )
