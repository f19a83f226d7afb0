"""`check` beside kinks: a right hypergradient is not called wrong because a kink lies within the step of the difference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hypergrad

LR = 0.1


def loop(kink: float, slope: float, lost: bool = False) -> tuple[tuple[Any, ...], float]:
    """One step of SGD on w²/2 from w = 1, so that w' = 1 − lr. L = w'² + slope · max(0, bend − w'), bent at lr = LR (1 + kink).

    Returns:
        what `check` takes, and dL/dlr: −2 (1 − lr), and slope more where the bend is passed already.
    """
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    bend = 1 - LR * (1 + kink)

    def val_loss() -> Tensor:
        w = model.weight.sum()
        bent = slope * torch.relu(bend - w)
        return w.square() + (bent.detach() if lost else bent)

    batches = [torch.ones(1, 1)]
    true = -2 * (1 - LR) + (slope if kink < 0 else 0.0)
    return (model, optimizer, lambda model, _: model.weight.square().sum() / 2, batches, val_loss, "lr"), true


@pytest.mark.parametrize("kink", [3e-5, -3e-5, 6e-5, -7e-7])
@pytest.mark.parametrize("slope", [2e-3, 0.5, 30.0])
def test_a_kink_within_the_step_is_stepped_over(kink: float, slope: float) -> None:
    arguments, true = loop(kink, slope)
    report = hypergrad.check(*arguments)
    row = report.rows[0]
    assert row.hypergradient == pytest.approx(true, rel=1e-9)
    assert row.finite_difference == pytest.approx(true, rel=2e-5) and row.smooth and report.ok, str(report)


@pytest.mark.parametrize("slope", [2e-3, 0.5])
def test_a_lost_part_of_the_graph_is_found_all_the_same(slope: float) -> None:
    arguments, true = loop(-0.5, slope, lost=True)
    report = hypergrad.check(*arguments)
    assert not report.ok and report.rows[0].smooth and "OFF" in str(report)
    assert report.rows[0].finite_difference == pytest.approx(true, rel=1e-6)
