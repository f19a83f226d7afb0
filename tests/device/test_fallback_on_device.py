"""Optimizers without a rule on the stand-in for a GPU, checked there first; some of them keep Python floats."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import hypergrad
from hypergrad.optimizers.traced import self_check
from tests import problems
from tests.cases import Case, Row
from tests.device.stand_in import NAME, stand_in
from tests.device.test_modes_on_device import on_host
from tests.optimizers.third_party import THIRD_PARTY
from tests.oracle import MODES_AGREE, assert_matches, assert_same, hypergradient


class Growing(torch.optim.Optimizer):
    """Gradient descent whose steps are scaled by a float that the gradients move: read by `.item()`, kept in the group."""

    def __init__(self, params: Any, lr: float = 0.1, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "d": 1.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            squares = [p.grad.square().sum() for p in group["params"] if p.grad is not None]
            group["d"] = 0.9 * group["d"] + 0.1 * torch.stack(squares).sum().sqrt().item()
            for p in group["params"]:
                if p.grad is not None:
                    g = p.grad.add(p, alpha=group["weight_decay"])
                    p.add_(g, alpha=-group["lr"] * group["d"])


@dataclass(frozen=True)
class Foreign(Case):
    """A case whose optimizer is no row of the case table."""

    @property
    def row(self) -> Any:
        if self.optimizer == "Growing":
            return Row(Growing, {"lr": 0.1, "weight_decay": 0.02}, {"lr": 0.05}, ("lr", "weight_decay"))
        THIRD_PARTY[self.optimizer].skip_if_absent()
        return THIRD_PARTY[self.optimizer]

    def arithmetic(self) -> Any:
        return nullcontext()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Growing", "AdamP", "schedulefree SGD", "Prodigy"])
def test_hypergradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_default_dtype(torch.float64)  # conftest.py puts it back
    case = Foreign("mlp" if name == "Growing" else THIRD_PARTY[name].problem, name)
    _ = case.row
    monkeypatch.setattr(self_check, "_KNOWN", {})
    with stand_in(), monkeypatch.context() as patch:
        patch.setattr(problems, "DEVICE", NAME)
        there = {mode: on_host(hypergradient(case, mode=mode)) for mode in ("forward", "unrolled")}
    for mode, result in there.items():
        assert_same(result, hypergradient(case, mode=mode), MODES_AGREE)
    if name == "Growing":
        assert_matches(there["forward"], case)


@pytest.mark.slow
def test_a_tuner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "_KNOWN", {})
    found = []
    for device in (NAME, "cpu"):
        with stand_in() if device == NAME else nullcontext():
            torch.manual_seed(0)
            model = torch.nn.Linear(4, 2).double().to(device)
            x, y = (
                torch.randn(32, 4, dtype=torch.float64).to(device),
                torch.randn(32, 2, dtype=torch.float64).to(device),
            )
            opt = Growing(model.parameters(), lr=1e-3, weight_decay=1e-3)

            def loss(model: Any = model, x: Any = x, y: Any = y) -> torch.Tensor:
                return (model(x) - y).square().mean()

            tuner = hypergrad.Tuner(model, opt, loss, total_steps=60)
            for _ in range(60):
                opt.zero_grad()
                tuner.backward(loss())
                opt.step()
            found.append([p.detach().cpu() for p in model.parameters()] + [*tuner.values.values()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=0)
