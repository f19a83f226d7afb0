"""Traps without a right number: errors that say the way out. Layers that are refused are rows of tests/layers.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hypergrad
from tests.cases import Case
from tests.layer_nets import OnceDifferentiable
from tests.problems import DEVICE, STEPS, randn

BOTH = ("forward", "unrolled")


@pytest.mark.parametrize("mode", BOTH)
def test_trap_layer_that_is_first_used_later(mode: str) -> None:
    """The graph of every step is checked, not only that of the first."""
    model = nn.Linear(4, 4).double().to(DEVICE)

    def loss(model: nn.Module, batch: tuple[Tensor, bool]) -> Tensor:
        x, cubed = batch
        y = model(x)
        return (OnceDifferentiable.apply(y) if cubed else y).square().sum() / 100

    x = randn(3, 4, seed=0)
    with pytest.raises(NotImplementedError, match="OnceDifferentiable"):
        hypergrad.hypergradient(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            loss,
            [(x, t == STEPS // 2) for t in range(STEPS)],
            lambda: model(x).sum(),
            "lr",
            mode,
        )


@pytest.mark.parametrize("flags", [{"dampening": 0.1}, {"nesterov": True}], ids=str)
@pytest.mark.parametrize("mode", BOTH)
def test_trap_sgd_momentum_is_discontinuous_at_zero(mode: str, flags: dict[str, Any]) -> None:
    setup = Case("mlp", "momentum").build()
    optimizer = torch.optim.SGD(setup.model.parameters(), lr=0.1, momentum=0.5, **flags)
    optimizer.param_groups[0]["momentum"] = 0.0
    with pytest.raises(ValueError, match="discontinuous"):
        hypergrad.hypergradient(
            setup.model, optimizer, setup.loss, setup.batches, setup.val_loss, ("lr", "momentum"), mode
        )


@pytest.mark.parametrize("mode", BOTH)
def test_trap_dampening_at_momentum_zero(mode: str) -> None:
    """torch ignores dampening where momentum is 0: alone its derivative is 0 there, beside momentum's own it has none."""
    setup = Case("mlp", "sgd_at_zero").build()
    call = (setup.model, setup.optimizer, setup.loss, setup.batches, setup.val_loss)
    assert not hypergrad.hypergradient(*call, "dampening", mode).gradients["dampening"].any()
    with pytest.raises(ValueError, match="discontinuous"):
        hypergrad.hypergradient(*call, ("momentum", "dampening"), mode)
