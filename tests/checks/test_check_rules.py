"""`hypergrad.check` on optimizers that keep something in lower precision, or read a number at their construction."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hypergrad
from hypergrad.checks.precision import Promote
from tests import references

AVERAGES = ("lr", "weight_decay", "betas")
ROWS: dict[str, tuple[Any, dict[str, Any], tuple[str, ...]]] = {
    "adagrad": (torch.optim.Adagrad, {"lr": 0.1, "eps": 1e-3}, ("lr", "initial_accumulator_value", "lr_decay")),
    "adamax": (torch.optim.Adamax, {"lr": 0.02, "eps": 1e-2}, AVERAGES),
    "nadam": (torch.optim.NAdam, {"lr": 0.02, "eps": 1e-2}, (*AVERAGES, "momentum_decay")),
    "radam": (torch.optim.RAdam, {"lr": 0.02, "eps": 1e-2, "betas": (0.9, 0.9)}, AVERAGES),
    "adadelta": (torch.optim.Adadelta, {"lr": 0.5, "eps": 1e-3}, ("lr", "weight_decay", "rho")),
    "adafactor": (torch.optim.Adafactor, {"lr": 0.05, "d": 1.1}, ("lr", "weight_decay", "beta2_decay", "d")),
    "muon": (torch.optim.Muon, {"lr": 0.02}, ("lr", "weight_decay", "momentum", "ns_coefficients")),
    "muon without nesterov": (torch.optim.Muon, {"lr": 0.02, "nesterov": False}, ("lr", "weight_decay", "momentum")),
    "lion": (references.Lion, {"lr": 0.01}, AVERAGES),
    "lamb": (references.Lamb, {"lr": 0.01, "eps": 1e-2}, AVERAGES),
}


@pytest.mark.slow
@pytest.mark.parametrize("taken", [0, 2])
@pytest.mark.parametrize("name", ROWS)
def test_a_users_float32_loop(name: str, taken: int) -> None:
    cls, numbers, wrt = ROWS[name]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5, bias="muon" not in name), nn.Tanh(), nn.Linear(5, 2, bias=False))
    optimizer = cls(model.parameters(), weight_decay=0.1, **numbers)
    x, y = torch.randn(8, 10, 4), torch.randn(8, 10, 2)

    def loss(model: nn.Module, i: int) -> Tensor:
        return ((model(x[i]) - y[i]) ** 2).mean()

    for i in range(taken):
        optimizer.zero_grad()
        loss(model, i).backward()
        optimizer.step()
    before = [p.clone() for p in model.parameters()]
    report = hypergrad.check(model, optimizer, loss, list(range(3, 7)), lambda: loss(model, 7), wrt)
    assert report, str(report)
    assert len(report.rows) >= len(wrt)
    assert all(p.dtype == torch.float32 and torch.equal(a, p) for a, p in zip(before, model.parameters(), strict=True))


def test_a_cast_that_is_passed_over_still_makes_a_copy() -> None:
    """torch's Muon divides the bfloat16 copy of its buffer in place."""
    x = torch.ones(3, dtype=torch.float64)
    with Promote():
        x.bfloat16().div_(2)
        x.half().div_(2)
    assert torch.equal(x, torch.ones(3, dtype=torch.float64))
