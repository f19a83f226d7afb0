"""Which processes train together, and how a gradient is recognised as the mean of theirs. Several: test_distributed.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hypergrad.core.data_parallel import processes_of
from hypergrad.core.processes import ALONE, SUMS, column_sums, is_mean
from hypergrad.core.survey import survey


def test_one_process_is_alone() -> None:
    model = nn.Linear(2, 1)
    found = processes_of(model, [torch.optim.SGD(model.parameters(), lr=0.1)])
    x = torch.randn(3)
    assert found is ALONE and found.mean(x) is x and found.all(1) == [1]


@pytest.mark.parametrize("n", [1, 5, SUMS, SUMS + 1, 1000])
def test_sums_add_up(n: int) -> None:
    x = torch.randn(n, dtype=torch.float64)
    *sums, norm = column_sums(x).tolist()
    assert len(sums) == min(n, SUMS)
    assert sum(sums) == pytest.approx(float(x.sum()), abs=1e-12) and norm == pytest.approx(float(x.norm()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [3, 100, 20_000])
def test_a_mean_is_told_from_a_rank_s_own_gradient_and_from_a_sum(dtype: torch.dtype, n: int) -> None:
    """Ranks whose gradients share a direction, as those of large batches do."""
    common = torch.randn(n)
    own = [(common + 0.3 * torch.randn(n)).to(dtype) for _ in range(4)]
    means = torch.stack([column_sums(g) for g in own]).double().mean(0).tolist()
    mean = torch.stack(own).mean(0)
    for g, right in ((mean, True), (own[0], False), (4 * mean, False), (torch.zeros_like(mean), False)):
        assert is_mean(column_sums(g).tolist(), means, dtype) is right
    assert is_mean(column_sums(mean * float("nan")).tolist(), means, dtype)  # judged elsewhere


def test_synchronised_batchnorm_is_refused_by_name() -> None:
    class SyncBatchNorm(torch.autograd.Function):  # torch's own wants a GPU
        @staticmethod
        def forward(ctx, x):  # type: ignore[override]
            return x.clone()

        @staticmethod
        def backward(ctx, g):  # type: ignore[override]
            return g

    loss = SyncBatchNorm.apply(torch.ones(2, requires_grad=True)).sum()
    with pytest.raises(NotImplementedError, match="SyncBatchNorm has no second derivative"):
        survey(loss)
