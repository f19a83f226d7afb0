"""A device that has no float64, as Apple's MPS: the numbers of the CPU in float32, or a refusal before training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hypergrad
from hypergrad import schedules
from tests import references
from tests.device.stand_in import NAME, stand_in

SAME = 1e-4  # relative, in float32: the same operations, some of them in one kernel for several tensors
STEPS = 6

Make = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, eps=1e-3),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, eps=1e-3, weight_decay=1e-2),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2, eps=1e-3, weight_decay=1e-2),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, eps=1e-3, weight_decay=1e-2),
}


class Run:
    """A loop in float32 on a device."""

    def __init__(self, device: str, make: Make):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).to(device)
        self.optimizer = make(self.model.parameters())
        draws = torch.Generator().manual_seed(1)
        make_batch = lambda: (torch.randn(16, 5, generator=draws), torch.randint(3, (16,), generator=draws))  # noqa: E731
        self.batches = [tuple(x.to(device) for x in make_batch()) for _ in range(STEPS + 1)]
        self.c = torch.tensor([0.01, 0.02], device=device)
        self.device = device

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        out = model(batch[0])
        return cross_entropy(out, batch[1]) + self.c[0] * out.square().mean() + self.c[1] * out.pow(4).mean()

    def val_loss(self) -> Tensor:
        self.model.eval()
        try:
            return self.loss(self.model, self.batches[-1])
        finally:
            self.model.train()

    def hypergradient(self, **options: Any) -> list[float]:
        given = (self.model, self.optimizer, self.loss, self.batches[:-1], self.val_loss)
        found = hypergrad.hypergradient(*given, **options)
        return [float(found.value), *(x for g in found.gradients.values() for x in g.cpu().flatten().tolist())]

    def tune(self, mode: str) -> list[float]:
        tuner = hypergrad.Tuner(
            self.model, self.optimizer, self.val_loss, tune=("lr",), hypers={"c": self.c}, loss=self.loss, every=2, mode=mode,
            horizon=2, policies=hypergrad.policies.without(hypergrad.policies.DEFAULT, hypergrad.policies.Backtracking),
        )  # fmt: skip
        for batch in self.batches[:-1]:
            tuner.step(batch)
        found = {name: x.cpu() for name, x in tuner.hypergradients.items()}
        return [tuner.val_loss, *found["lr"].tolist(), *found["c"].tolist(), *self.c.cpu().tolist()]


def same(work: Callable[[Run], list[float]], make: Make = OPTIMIZERS["momentum"]) -> None:
    want = work(Run("cpu", make))
    with stand_in(float64=False):
        found = work(Run(NAME, make))
    assert found == pytest.approx(want, rel=SAME, abs=1e-7)


@pytest.mark.parametrize("mode", ["unrolled", "forward"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.slow
def test_hypergradient(optimizer: str, mode: str) -> None:
    same(lambda run: run.hypergradient(wrt=("lr", "c"), hypers={"c": run.c}, mode=mode), OPTIMIZERS[optimizer])


def test_a_schedule() -> None:
    def work(run: Run) -> list[float]:
        knots = torch.tensor([0.1, 0.05, 0.01], device=run.device)
        plan = {"lr": lambda t, h: schedules.knots(t / STEPS, h["v"])}
        return run.hypergradient(wrt="v", hypers={"v": knots}, schedules=plan)

    same(work)


@pytest.mark.filterwarnings("ignore:val_loss runs BatchNorm")
@pytest.mark.parametrize("mode", ["forward", "unrolled"])
def test_tuner(mode: str) -> None:
    same(lambda run: run.tune(mode))


def test_what_needs_float64_is_refused_before_training() -> None:
    with stand_in(float64=False):
        run = Run(NAME, lambda p: references.ScheduleFree(p, lr=0.1))
        with pytest.raises(NotImplementedError, match=r"ScheduleFree .*traced in float64.*AdamW"):
            hypergrad.Tuner(run.model, run.optimizer, run.val_loss, tune=("lr",))
        run = Run(NAME, OPTIMIZERS["momentum"])
        given = (run.model, run.optimizer, run.loss, run.batches, run.val_loss)
        with pytest.raises(NotImplementedError, match=r"check computes in float64.*CPU"):
            hypergrad.check(*given)
