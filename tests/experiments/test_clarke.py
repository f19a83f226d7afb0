"""The look-back method as a rival: its hypergradient, its step, and a training that it leaves alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from experiments import datasets, fashion_mnist, rivals
from experiments.clarke import LookBack
from experiments.workloads import RUNGS, WORKLOADS, Task

SERIES = 1e-9  # relative, float64: round-off of five products
EXACT = 1e-12  # relative, float64: a value's way through its coordinate and back
TUNED = ("lr", "weight_decay", "momentum")
START = {"lr": 0.01, "weight_decay": 1e-4, "momentum": 0.5}  # powers of ten: log₁₀ and back is exact
KINDS = ("diabetes", "matrix_factorisation", "mlp_digits")  # SGD, AdamW in two groups, RMSprop
LOOK = range(2 * 5 + 2, 2 * 5 + 8)  # a look: five products, the validation, one gradient of the step or a few
Batch = tuple[Tensor, Tensor]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


@dataclass
class Regression:
    """A tiny tanh network in float64 under heavy-ball SGD, its batches and the one that validates."""

    start: dict[str, float] = field(default_factory=lambda: START)

    def __post_init__(self) -> None:
        draws = torch.Generator().manual_seed(1)
        xs, ys = (torch.randn(31, 6, n, generator=draws, dtype=torch.float64) for n in (3, 1))
        *self.batches, self.val = list(zip(xs, ys, strict=True))
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Dropout(0.2), nn.Linear(2, 1)).double()
        self.optimizer = torch.optim.SGD(self.model.parameters(), **self.start)

    def val_loss(self) -> Tensor:
        return loss(self.model, self.val)

    def rival(self, **options: Any) -> LookBack:
        return LookBack(self.model, self.optimizer, loss, self.val_loss, **options)

    def train(self, steps: int, rival: LookBack | None = None) -> None:
        for batch in self.batches[:steps]:
            if rival:
                rival.look(batch)
            value = loss(self.model, batch)
            self.optimizer.zero_grad()
            value.backward()
            self.optimizer.step()
            if rival:
                rival.move()

    def numbers(self) -> list[float]:
        return [self.optimizer.param_groups[0][name] for name in TUNED]

    def dense_series(self, batch: Batch, terms: int) -> Tensor:
        """Σ_j (∂Φ/∂h)ᵀ ((∂Φ/∂s)ᵀ)ʲ ∂L/∂s for h = (lr, weight decay, momentum), by the dense Jacobians of one step."""
        named = dict(self.model.named_parameters())
        sizes = [p.numel() for p in named.values()]

        def at(theta: Tensor, batch: Batch) -> Tensor:
            pieces = {k: x.view_as(named[k]) for k, x in zip(named, theta.split(sizes), strict=True)}
            return loss(lambda x: functional_call(self.model, pieces, x), batch)  # type: ignore[arg-type]

        def step(s: Tensor, h: Tensor) -> Tensor:
            theta, b = s.chunk(2)
            g = torch.autograd.grad(at(theta, batch), theta, create_graph=True)[0]
            b = h[2] * b + g + h[1] * theta
            return torch.cat([theta - h[0] * b, b])

        buffers = [self.optimizer.state[p]["momentum_buffer"] for p in named.values()]
        s = torch.cat([x.detach().flatten() for x in (*named.values(), *buffers)]).requires_grad_()
        h = torch.tensor(self.numbers(), dtype=torch.float64)
        by_s, by_h = torch.autograd.functional.jacobian(step, (s, h))
        theta = step(s, h).detach().chunk(2)[0].requires_grad_()
        of_theta = torch.autograd.grad(at(theta, self.val), theta)[0]
        lam, total = torch.cat([of_theta, torch.zeros_like(of_theta)]), torch.zeros_like(h)
        for _ in range(terms):
            total, lam = total + lam @ by_h, lam @ by_s
        return total


def test_a_hyperparameter_step_is_that_of_adam_along_the_series_of_dense_jacobians() -> None:
    problem = Regression(START | {"lr": 0.05})
    problem.model.eval()  # no dropout: the dense twin draws nothing
    rival = problem.rival(tune=TUNED)
    phi = torch.tensor([math.log10(0.05), -4.0, 0.0], dtype=torch.float64)
    twin, before = torch.optim.Adam([phi], lr=0.05), problem.numbers()
    problem.train(9, rival)
    assert problem.numbers() == before

    for batch in problem.batches[9:29]:
        is_tenth, numbers = (rival.t + 1) % 10 == 0, torch.tensor(problem.numbers(), dtype=torch.float64)
        want = problem.dense_series(batch, terms=5)
        rival.look(batch)
        assert (rival.found is not None) is is_tenth
        if is_tenth:
            assert rival.found is not None
            got = torch.stack([rival.found[name][0] for name in TUNED])
            assert (got - want).abs().max() <= SERIES * want.abs().max()
            lr, wd, momentum = numbers
            slope = torch.stack([lr * math.log(10), wd * math.log(10), momentum * (1 - momentum)])
            phi.grad = got * slope
            twin.step()
        rival.move()
        expected = [10 ** phi[0].item(), 10 ** phi[1].item(), phi[2].sigmoid().item()]
        assert problem.numbers() == pytest.approx(expected, rel=EXACT)
    assert rival.stats["val_evaluations"] == 2 and rival.stats["hessian_products"] == 10


def test_the_first_step_moves_every_number_by_0_05_of_its_coordinate() -> None:
    problem = Regression(START | {"weight_decay": 0.01})  # its hypergradient is then far above Adam's eps
    problem.train(10, problem.rival(tune=TUNED))
    lr, wd, momentum = problem.numbers()
    moved = [math.log10(lr) + 2, math.log10(wd) + 2, math.log(momentum / (1 - momentum))]
    assert [abs(x) for x in moved] == pytest.approx([0.05] * 3, rel=1e-3)


def test_training_is_untouched_where_nothing_moves() -> None:
    """Bit for bit, dropout's random numbers too."""
    plain, looked = Regression(), Regression()
    for problem, rival in ((plain, None), (looked, looked.rival(hyper_lr=0.0))):
        torch.manual_seed(3)
        problem.train(30, rival)
    assert looked.numbers() == plain.numbers() == list(START.values())
    assert all(torch.equal(p, q) for p, q in zip(plain.model.parameters(), looked.model.parameters(), strict=True))
    assert rival is not None and rival.stats["val_evaluations"] == 3


def test_each_validation_draws_a_batch_of_its_own() -> None:
    problem, seen = Regression(), []

    def val_loss() -> Tensor:
        seen.append(torch.rand(()).item())
        return problem.val_loss()

    problem.model.eval()  # so that training itself draws nothing
    problem.train(30, LookBack(problem.model, problem.optimizer, loss, val_loss))
    assert len(seen) == len(set(seen)) == 3


@pytest.mark.parametrize(
    ("start", "tune", "message"),
    [
        ({"weight_decay": 0.0}, ("lr", "weight_decay"), "weight_decay starts at"),
        ({"momentum": 0.0}, ("momentum",), "momentum starts at"),
        ({}, ("dampening",), "no coordinate for 'dampening'; there are lr"),
    ],
)
def test_a_start_without_a_coordinate_is_refused(start: dict[str, float], tune: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Regression(START | start).rival(tune=tune)


def test_a_lost_run_ends_in_nan_and_raises_nothing() -> None:
    problem = Regression(START | {"lr": 1e200})
    rival = problem.rival()
    problem.train(30, rival)
    assert not all(bool(p.isfinite().all()) for p in problem.model.parameters())
    assert rival.t == 30


@pytest.mark.parametrize("workload", KINDS)
def test_a_short_run_on_each_kind_of_optimizer(workload: str, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        task = WORKLOADS[workload].build(0, steps=60)
    except (FileNotFoundError, SystemExit, ImportError) as missing:
        pytest.skip(str(missing))
    rows, val_loss = [], Task.val_loss
    monkeypatch.setattr(Task, "val_loss", lambda self: rows.append(0) or val_loss(self))
    row = rivals.METHODS["clarke"].train(task)
    assert set(row) >= {*RUNGS, "test", "seconds"} and math.isfinite(row["test"])
    assert len(rows) == 6
    assert (row["gradient_evaluations"] - 60) / 6 in LOOK
    lr, weight_decay = rivals.DEFAULTS[task.workload.optimizer]
    assert 0 < abs(math.log10(row["end_lr"] / lr)) <= 0.31
    assert 0 < abs(math.log10(row["end_weight_decay"] / (weight_decay or rivals.CLARKE_WD))) <= 0.31


def test_it_runs_on_its_own_protocol(stand_in: Any) -> None:
    data = datasets.fashion_mnist(str(stand_in))
    (model, row, *_), (again, row_again, *_) = (fashion_mnist.fit(data, "clarke_momentum", 3, 40) for _ in range(2))
    assert {**row, "seconds": 0} == {**row_again, "seconds": 0}
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    assert (row["gradient_evaluations"] - 40) / 4 in LOOK
    for name, start in fashion_mnist.start(3).items():
        assert row[f"start_{name}"] == start != row[f"end_{name}"]
    assert fashion_mnist.flops_ratio("clarke", 20, str(stand_in), "cpu") > 1
