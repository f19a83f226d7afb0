"""A tuned run of a compiled model compiles it in its first steps, and not again."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager  # compiles as inductor does, without a C++ compiler
from torch._dynamo.utils import counters

import hypergrad
from hypergrad.online.plan import Plan

STEPS, BATCH = 80, 16
PLAN = Plan(cost=2.0, product=1.0, validation=1.0, every=5, resting=5, stride=3)  # products in one step of three
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9, weight_decay=1e-4),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-3),
}


class Backend:
    """Counts graphs that are compiled, and calls of them."""

    def __init__(self) -> None:
        self.graphs = self.calls = 0

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        self.graphs += 1
        compiled = aot_eager(graph, inputs)

        def call(*args: Any) -> Any:
            self.calls += 1
            return compiled(*args)

        return call


def net() -> nn.Sequential:
    """With what acts differently from call to call: running statistics and dropout."""
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 1))


@pytest.mark.parametrize("val_rows", [BATCH, 2 * BATCH])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("plan", [PLAN, None], ids=["plan", "no plan"])
@pytest.mark.parametrize("total", [STEPS, None])
@pytest.mark.parametrize("wrapped", [True, False], ids=["torch.compile(model)", "model.compile()"])
@pytest.mark.slow
def test_nothing_is_compiled_after_the_first_steps(
    wrapped: bool, total: int | None, plan: Plan | None, optimizer: str, val_rows: int
) -> None:
    torch._dynamo.reset()
    counters.clear()
    backend, inner = Backend(), net()
    if wrapped:
        model: Any = torch.compile(inner, backend=backend)
    else:
        model = inner
        inner.compile(backend=backend)
    opt = OPTIMIZERS[optimizer](inner.parameters())
    x = torch.randn(256, 6)
    y = torch.sin(x[:, :1]) + 0.1 * torch.randn(256, 1)
    in_val: list[int] = []

    def loss(rows: slice) -> Tensor:
        return ((model(x[rows]) - y[rows]) ** 2).mean()

    def val_loss() -> Tensor:
        before = backend.calls
        value = loss(slice(0, val_rows))
        in_val.append(backend.calls - before)
        return value

    every = None if plan else 5
    tuner = hypergrad.Tuner(model, opt, val_loss, total_steps=total, cost=2.0 if plan else None, plan=plan, every=every)
    graphs, phases = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that hypergradients of so small batches are noise
        for t in range(STEPS):
            rows = slice(64 + t % 10 * BATCH, 64 + (t % 10 + 1) * BATCH)
            value = loss(rows)
            opt.zero_grad()
            tuner.backward(value)
            opt.step()
            graphs.append(backend.graphs)
            phases.append(tuple(tuner._loop.hyper.vector.moving))
    tuner.close()
    # the training batch; the validation batch, if of another shape, once
    assert graphs[0] == 1 and graphs[-1] == graphs[14] <= 1 + (val_rows != BATCH)
    assert counters["stats"]["unique_graphs"] == backend.graphs and not counters["graph_break"]
    # what was to be seen came about: phases changed, readings of the validation loss went through compiled code
    assert sum(a != b for a, b in pairwise(phases)) == (0 if total is None else 2)
    assert tuner.stats["hyper_steps"] > 10 and set(in_val[-10:]) == {1}
