"""Backtracking: a validation loss that has risen by more than chance takes the weights back, and nothing else does."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hypergrad
from hypergrad.core.problem import Problem
from hypergrad.online.policies.backtracking import Backtracking, LossRecord
from hypergrad.optimizers.transition import Transition

TOTAL = 1000


def made(before: float, total: int | None = None) -> tuple[LossRecord, nn.Linear, torch.optim.Optimizer]:
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    transition = Transition([optimizer], frozenset({"lr"}))
    return Backtracking().start(transition, Problem(model, transition.params, None), before, total), model, optimizer


def weights(t: int) -> Tensor:
    return torch.full((2,), float(t))


def first_return(
    back: LossRecord, losses: Sequence[float], truth: Callable[[Tensor], list[float]], every: int = 10
) -> int | None:
    """The number of the reading at which training is to go back. `truth`: a second reading at given weights, PAIRS times."""
    for i, loss in enumerate(losses):
        if back.read(every * (i + 1), loss, weights(i), [0], lambda best, i=i: (truth(weights(i)), truth(best))):
            return i
    return None


def test_a_rise_goes_back_to_the_lowest() -> None:
    losses = [1.0, 0.8, 0.6, 0.5, 0.52, 0.9, 1.3]
    back, model, _ = made(before=2.0)
    assert first_return(back, losses, lambda theta: 4 * [losses[int(theta[0])]]) == 5
    assert back.go() == 40  # the lowest is the fourth
    assert torch.equal(model.weight[0], weights(3))


@pytest.mark.parametrize("losses", [[1.0, 0.8, 0.6, 0.5, 0.45, 0.42, 0.41], [1.0, 0.5, 0.6, 0.62, 0.6, 0.61]])
def test_a_fall_and_a_small_rise_do_not(losses: list[float]) -> None:
    back, _, _ = made(before=2.0)
    assert first_return(back, losses, lambda theta: 4 * [losses[int(theta[0])]]) is None


def test_chance_does_not() -> None:
    """Random batches around a constant: the lowest of many readings is luck, which second readings show."""
    draws = torch.Generator().manual_seed(0)
    back, _, _ = made(before=1.0)
    noise = (0.3 * torch.randn(2000, generator=draws)).tolist()
    assert (
        first_return(back, [0.9 + x for x in noise], lambda theta: [0.9 + 0.3 * x for x in (1.0, -1.0, 0.5, -0.5)])
        is None
    )


def test_the_noise_of_the_weights_themselves_does_not() -> None:
    """Weights that jump about their average: the average is what is read again, and it is no worse."""
    draws = torch.Generator().manual_seed(1)
    back, _, _ = made(before=10.0)
    levels = (0.5 + 0.2 * torch.randn(500, generator=draws)).tolist()
    for i, loss in enumerate(levels):
        assert not back.read(10 * (i + 1), loss, weights(i), [0], lambda best: (4 * [0.5], 4 * [levels[int(best[0])]]))


def test_a_loss_that_is_not_finite_is_no_reading() -> None:
    back, _, _ = made(before=2.0)
    assert first_return(back, [1.0, float("nan"), float("inf"), 0.9], lambda theta: 4 * [1.0]) is None
    assert back.best == 0.9


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", ["now", "then"])
def test_second_readings_that_are_not_finite_decide_nothing(bad: float, at: str) -> None:
    back, _, _ = made(before=2.0)
    found = ([1.0, bad, 1.0, 1.0], [0.4] * 4) if at == "now" else ([1.0] * 4, [0.4, bad, 0.4, 0.4])
    for i, loss in enumerate([1.0, 0.5, 0.4, 1.0]):
        assert not back.read(10 * (i + 1), loss, weights(i), [0], lambda _: found)
    assert back.best == 0.4 and not back.read(50, 1.0, weights(4), [0], lambda _: pytest.fail("it waits"))
    assert back.read(60, 1.0, weights(5), [0], lambda _: ([1.0] * 4, [0.4] * 4))


def test_readings_of_another_turn_do_not_compare() -> None:
    back, _, _ = made(before=float("nan"))
    for t, loss in enumerate([0.5, 0.4, 0.3]):
        assert not back.read(t, loss, weights(t), [0], lambda *_: pytest.fail("nothing is suspect"))
    for t, loss in enumerate([3.0, 2.9, 2.8, 2.7, 2.6]):
        assert not back.read(t, loss, weights(t), [1], lambda *_: pytest.fail("nothing is suspect"))


def test_early_in_a_run_it_starts_again_optimizer_state_and_all() -> None:
    back, model, optimizer = made(before=1.0, total=TOTAL)
    start = model.weight.detach().clone()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.weight, start) and optimizer.state
    assert first_return(back, [1.5, 1.6, 1.7], lambda theta: 4 * [1.0 if torch.equal(theta, start[0]) else 1.7]) == 1
    assert back.go() == 0
    assert torch.equal(model.weight, start) and not optimizer.state[model.weight]


def test_weights_loaded_before_the_first_step_are_where_it_starts_again() -> None:
    back, model, optimizer = made(before=1.0, total=TOTAL)
    with torch.no_grad():
        model.weight.fill_(3.0)
    optimizer.state[model.weight]["momentum_buffer"] = torch.full((1, 2), 0.5)
    back.starts_from(model.weight.detach().flatten().clone())
    with torch.no_grad():
        model.weight.fill_(5.0)
    assert first_return(back, [1.5, 1.6, 1.7], lambda theta: 4 * [1.0 if float(theta[0]) == 3 else 1.7]) == 1
    assert back.go() == 0
    assert torch.equal(model.weight[0], weights(3))
    assert torch.equal(optimizer.state[model.weight]["momentum_buffer"], torch.full((1, 2), 0.5))


def test_a_tuner_tells_where_its_first_step_starts_from() -> None:
    run = Run(total_steps=300)
    loaded = {k: x.clone() + 0.25 if x.is_floating_point() else x for k, x in run.model.state_dict().items()}
    run.model.load_state_dict(loaded)
    run.train(0, 1)
    record = run.tuner._hyper.record
    assert record is not None and record.start is not None
    assert torch.equal(
        record.start.state.theta, torch.cat([loaded[k].flatten() for k, _ in run.model.named_parameters()])
    )


@pytest.mark.parametrize("loaded", [False, True])
def test_running_statistics_to_start_again_from_are_those_before_the_first_batch(loaded: bool) -> None:
    """A first batch that is not finite makes BatchNorm's running statistics NaN; a run does not start again from those."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    opt = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-3)
    tuner = hypergrad.Tuner(model, opt, lambda: model(torch.randn(8, 2)).square().mean(), total_steps=100)
    if loaded:  # the same weights
        opt.load_state_dict(opt.state_dict())
    before = [b.clone() for b in model.buffers()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the step is passed over
        tuner.backward(model(torch.full((8, 2), float("nan"))).mean())
        opt.step()
    record = tuner._hyper.record
    assert record is not None and record.start is not None
    assert all(torch.equal(a.value, b) for a, b in zip(record.start.buffers, before, strict=True))


class Run:
    """A net that can fit its training rows, whose labels are random."""

    def __init__(self, **options: Any):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 3)).double()
        self.x, self.y = torch.randn(32, 8, dtype=torch.float64), torch.randint(3, (32,))
        val = torch.randn(32, 8, dtype=torch.float64), torch.randint(3, (32,))
        self.val_loss = lambda: cross_entropy(self.model(val[0]), val[1])
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.tuner = hypergrad.Tuner(self.model, self.optimizer, self.val_loss, **options)

    def train(self, first: int, last: int) -> None:
        for t in range(first, last):
            rows = torch.arange(8) + 8 * t % 32
            loss = cross_entropy(self.model(self.x[rows % 32]), self.y[rows % 32])
            self.optimizer.zero_grad()
            self.tuner.backward(loss)
            self.optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"total_steps": 300}, {}, {"total_steps": 300, "average": False}])
def test_labels_that_cannot_be_learnt_do_no_harm(options: dict[str, Any]) -> None:
    run = Run(**options)
    before = run.val_loss().item()
    run.train(0, 300)
    assert run.tuner.stats["backtracks"] > 0
    assert run.val_loss().item() < 1.15 * before  # without: twice that and more


@pytest.mark.slow
def test_a_run_goes_on_from_a_state_bit_for_bit() -> None:
    whole = Run(total_steps=300)
    whole.train(0, 300)
    for middle in (15, 120):
        one = Run(total_steps=300)
        one.train(0, middle)
        states = [part.state_dict() for part in (one.model, one.optimizer, one.tuner)]
        other = Run(total_steps=300)
        for part, state in zip((other.model, other.optimizer, other.tuner), states, strict=True):
            part.load_state_dict(state)
        other.train(middle, 300)
        for p, q in zip(whole.model.parameters(), other.model.parameters(), strict=True):
            assert torch.equal(p, q)
        assert whole.tuner.stats == other.tuner.stats


def test_a_frozen_tuner_and_one_that_does_not_tune_lr_never_go_back() -> None:
    frozen, decay = Run(total_steps=300), Run(total_steps=300, tune=("weight_decay",))
    frozen.tuner.freeze()
    for run in (frozen, decay):
        run.train(0, 300)
        assert run.tuner.stats["backtracks"] == 0


def test_second_readings_take_the_running_statistics_of_their_weights() -> None:
    """BatchNorm in eval mode: the record is read with the statistics that it had, and nothing stays changed."""
    run = Run(total_steps=300)
    run.train(0, 20)
    hyper, problem = run.tuner._hyper, run.tuner._hyper.problem
    back = hyper.record
    assert back is not None and back.theta is not None
    theta = torch.cat([p.detach().reshape(-1) for p in run.model.parameters()])

    def eval_loss() -> Tensor:
        return next(iter(problem.buffers)).sum() + 0 * run.model[0].weight.sum()

    hyper.validation = eval_loss
    statistics = [b.clone() for b in problem.buffers]
    now, then = hyper._read_both(20, theta, back.theta)
    assert now == pytest.approx([statistics[0].sum().item()] * len(now))
    assert then == pytest.approx([back.buffers[0].value.sum().item()] * len(then)) and then != now
    assert all(torch.equal(a, b) for a, b in zip(statistics, problem.buffers, strict=True))
    assert torch.equal(theta, torch.cat([p.detach().reshape(-1) for p in run.model.parameters()]))
