"""The guard of a live run: it takes a blow-up back, and leaves a healthy run alone."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hypergrad
from hypergrad.core.problem import Problem
from hypergrad.online.policies import DivergenceGuard
from hypergrad.optimizers.transition import Transition
from tests.online.live_loops import as_given, data, float64, mse, sgd, two_layers, validation
from tests.tiers import slow_but

__all__ = ["float64"]  # the fixture
STEPS = 300
Batch = tuple[Tensor, Tensor]


def task(t: int) -> Batch:
    """A linear task with noise of size 0.5."""
    g = torch.Generator().manual_seed(t)
    x = torch.randn(16, 5, generator=g)
    return x, x.sum(1, keepdim=True) + 0.5 * torch.randn(16, 1, generator=g)


def easy_at_first(t: int) -> Batch:
    """The first batches' targets are nearly 0."""
    x, y = task(t)
    return (x, y) if t >= 5 else (0.1 * x, 0.1 * y)


def scaled_loss(model: nn.Module, t: int) -> Tensor:
    """The loss itself becomes 24 times as large."""
    return mse(model, task(t)) * (1.0 if t < 5 else 24.0)


def noisy_later(t: int) -> Batch:
    """Half-way labels become noise of size 3."""
    x, y = task(t)
    return (x, y) if t < STEPS // 2 else (x, y + 3 * torch.randn(16, 1, generator=torch.Generator().manual_seed(t)))


def ends_at(loss: Callable[[nn.Module, int], Tensor], lr: float, tuned: bool, **sgd: Any) -> tuple[float, Any]:
    """The mean training loss of the last 20 steps, and the tuner, which hardly moves lr: the guard alone is at work."""
    torch.manual_seed(0)
    model = nn.Linear(5, 1)
    opt = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, **sgd)
    x, y = task(10**6)
    easy = 0.1 * x, 0.1 * y  # so that the validation loss before the first step tells nothing of what comes

    def val_loss() -> Tensor:
        return -loss(model, 10**6) if sgd else mse(model, easy)

    tuner = as_given(model, opt, val_loss, tune=("lr",), hyper_lr=1e-6)
    if not tuned:
        tuner.close()
    last = []
    for t in range(STEPS):
        opt.zero_grad()
        value = loss(model, t)
        tuner.backward(value)
        opt.step()
        last.append(float(value.detach()))
    return sum(last[-20:]) / 20, tuner


HARDER: dict[str, tuple[Callable[[nn.Module, int], Tensor], float]] = {
    "easy batches first": (lambda m, t: mse(m, easy_at_first(t)), 0.02),
    "a loss that is scaled up": (scaled_loss, 0.001),
    "noise later": (lambda m, t: mse(m, noisy_later(t)), 0.01),
}


@pytest.mark.filterwarnings("ignore:blow-up", "ignore:a loss was far above")
@pytest.mark.parametrize("name", slow_but(HARDER, "noise later"))
def test_data_that_becomes_harder_does_not_destroy_a_healthy_run(name: str) -> None:
    loss, lr = HARDER[name]
    stock, _ = ends_at(loss, lr, tuned=False)
    ours, tuner = ends_at(loss, lr, tuned=True)
    assert tuner.stats["rollbacks"] <= 5
    assert ours <= 1.1 * stock


def test_a_reward_that_rises_is_no_blow_up() -> None:
    def reward(model: nn.Module, t: int) -> Tensor:
        return torch.exp(-mse(model, task(t)))

    start, _ = ends_at(reward, 1e-9, tuned=False, maximize=True)
    stock, _ = ends_at(reward, 0.05, tuned=False, maximize=True)
    ours, tuner = ends_at(reward, 0.05, tuned=True, maximize=True)
    assert stock > 10 * start
    assert tuner.stats["rollbacks"] == 0
    assert ours >= 0.9 * stock


def test_a_loss_that_falls_below_zero_is_no_blow_up() -> None:
    """A log density: from +20 to below −1."""

    def nll(model: nn.Module, t: int) -> Tensor:
        return 5 * mse(model, task(t)) - 5

    ours, tuner = ends_at(nll, 0.002, tuned=True)
    assert ours < -1 and tuner.stats["rollbacks"] == 0


@pytest.mark.parametrize("fused", [False, True])
def test_overflows_of_a_scaler_in_a_row_are_no_blow_up(fused: bool) -> None:
    """A scale that starts too high: steps that the scaler skips are not counted, nothing is rolled back."""
    model = two_layers()
    opt = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    tuner = as_given(model, opt, validation(model), tune=("lr",), every=4, scaler=scaler)
    for i, (x, y) in enumerate(data()[0]):
        opt.zero_grad()
        tuner.backward(scaler.scale(mse(model, (x * math.inf if 3 <= i < 7 else x, y))))
        scaler.step(opt)
        scaler.update()
    assert tuner.stats["steps"] == 8 and scaler.get_scale() == 4.0
    assert all(tuner.stats[k] == 0 for k in ("rollbacks", "nonfinite_steps", "plain_steps", "changed_gradients"))
    assert tuner.stats["hyper_steps"] == 2
    assert 0.008 < float(tuner.values["lr"][0]) <= 0.01 * math.exp(2 * 0.7)  # two steps, neither cut by 4


def test_fused_and_unfused_are_tuned_alike_under_a_scaler_that_skips() -> None:
    found = []
    for fused in (False, True):
        model = two_layers()
        opt = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        tuner = as_given(model, opt, validation(model), every=4, scaler=scaler)
        torch.manual_seed(7)
        for i, (x, y) in enumerate(data()[0]):
            opt.zero_grad()
            tuner.backward(scaler.scale(mse(model, (x * math.inf if 3 <= i < 7 else x, y))))
            scaler.step(opt)
            scaler.update()
        found.append(tuner)
    for name in ("lr", "weight_decay"):
        torch.testing.assert_close(found[0].values[name], found[1].values[name], rtol=1e-9, atol=0)
        torch.testing.assert_close(found[0].hypergradients[name], found[1].hypergradients[name], rtol=1e-7, atol=0)


def test_bad_data_for_a_while_is_told_from_a_blow_up() -> None:
    """Ten batches that are not finite in a row: passed over, and lr is where it was before them."""
    model = two_layers()
    opt = sgd()(model)
    tuner = as_given(model, opt, validation(model), tune=("lr",), every=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i, (x, y) in enumerate(data()[0] * 2):
            opt.zero_grad()
            tuner.backward(mse(model, (x * math.nan if 6 <= i < 16 else x, y)))
            opt.step()
    assert tuner.stats["rollbacks"] <= 1
    assert tuner.values["lr"].tolist() == pytest.approx([0.05, 0.03])


@pytest.mark.filterwarnings("ignore:a loss was far above")
def test_roll_back_says_so_where_lr_is_not_tuned() -> None:
    model = two_layers()
    opt = torch.optim.SGD(model.parameters(), lr=100.0, momentum=0.9, weight_decay=0.01)
    tuner = as_given(model, opt, validation(model), tune=("weight_decay",), every=5)
    with pytest.warns(UserWarning, match="blow-up") as caught:
        for batch in data()[0]:
            opt.zero_grad()
            tuner.backward(mse(model, batch))
            opt.step()
    said = [str(w.message) for w in caught if "blow-up" in str(w.message)]
    assert opt.param_groups[0]["lr"] == 100.0
    assert all("lr is not tuned" in message and "divided" not in message for message in said)


def guard_after(losses: list[float]) -> tuple[list[str], Any]:
    """Verdicts on a series of training losses, and the guard; its states are kept as a loop keeps them."""
    model = nn.Linear(2, 1)
    transition = Transition([torch.optim.SGD(model.parameters(), lr=0.1)], frozenset({"lr"}))
    guard = DivergenceGuard().start(transition, Problem(model, transition.params, None), losses[0])
    verdicts = []
    for loss in losses:
        verdicts.append(guard.judge(loss, True))
        guard.keep(transition.read())
    return verdicts, guard


def test_progress_that_is_lost_again_is_a_blow_up():
    """From 2.3 to 0.1, and back to 2.2: below the loss at the start, and yet the run is lost."""
    verdicts, _ = guard_after([2.3] * 5 + [0.1] * 60 + [2.2] * 40)
    assert set(verdicts[:65]) == {"good"}
    assert "blow-up" in verdicts[65:]


def test_a_loss_that_gives_back_a_little_or_is_all_noise_is_none():
    little, _ = guard_after([2.3] * 5 + [0.1] * 60 + [0.9] * 40)
    noise = (500 + 22 * torch.randn(2000, generator=torch.Generator().manual_seed(0))).tolist()
    assert set(little) == set(guard_after(noise)[0]) == {"good"}


FALLING = [1 / (1 + 0.1 * min(t, 100)) for t in range(200)]  # to 0.09, smoothly, as where every batch is the whole set


def test_a_surge_is_a_blow_up_once_it_lasts():
    """Far below the loss at the start, and far above the last ones."""
    verdicts, guard = guard_after([*FALLING, 0.3, 0.4, 0.5])
    assert verdicts[-3:] == ["good", "good", "blow-up"] and set(verdicts[:-3]) == {"good"}
    assert guard.cut == 2.0
    assert guard.roll_back() and guard.judge(0.1, True) == "good"
    assert guard.cut == 4.0
    for surge in ([0.3, 0.4, 0.09], [0.12] * 10):
        verdicts, guard = guard_after([*FALLING, *surge])
        assert set(verdicts) == {"good"}


def test_a_surge_above_the_first_loss_is_a_step_passed_over():
    verdicts, _ = guard_after([*FALLING, 1.5, 0.09, 0.09])
    assert verdicts[-3:] == ["spike", "good", "good"]


def test_a_surge_at_the_good_weights_too_is_the_data():
    _, guard = guard_after([*FALLING, 0.4, 0.4, 0.4])
    guard.roll_back()
    assert guard.judge(0.4, True) == "false alarm"
    assert guard.cut == 2.0  # by which lr is multiplied again
    assert guard.reference == FALLING[0]
    more = [guard.judge(0.4, True) for _ in range(40)]
    assert set(more) == {"good"}


def test_lost_progress_at_the_good_weights_too_is_the_data():
    verdicts, guard = guard_after([2.3] * 5 + [0.1] * 60)
    while guard.judge(2.2, True) != "blow-up":
        pass
    assert guard.roll_back()
    assert guard.judge(2.2, True) == "false alarm"
    assert guard.judge(2.2, True) == "good"
    assert set(verdicts) == {"good"}


SPIKE, NOT_A_NUMBER = 1e4, math.nan


def disturbed(
    factors: dict[int, float], lr: float = 1e-3, steps: int = 160, norm: bool = False
) -> tuple[float, Any, float]:
    """A run from the defaults in which some batches' losses are multiplied: its loss at the end, the tuner, the first lr."""
    first = math.nan
    torch.manual_seed(0)
    body = [nn.BatchNorm1d(5), nn.Linear(5, 1)] if norm else [nn.Linear(5, 1)]
    model = nn.Sequential(*body)
    opt = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-4)
    x, y = task(10**6)
    tuner = hypergrad.Tuner(model, opt, lambda: mse(model, (x, y)), total_steps=steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for t in range(steps):
            opt.zero_grad()
            factor = factors.get(t, 1.0)
            x_t, y_t = task(t)
            tuner.backward(mse(model, (x_t * math.nan, y_t) if math.isnan(factor) else (x_t, y_t)) * max(1.0, factor))
            opt.step()
            assert all(bool(torch.isfinite(value).all()) for value in model.state_dict().values()), t
            first = float(tuner.values["lr"]) if math.isnan(first) and not tuner._loop.starts.search.active else first
    return float(sum(mse(model, task(t)).detach() for t in range(2000, 2050))) / 50, tuner, first


@pytest.mark.slow
@pytest.mark.parametrize("at", [(2,), (30,), (80, 150), (30, 31)])
def test_a_spike_is_passed_over_and_leaves_lr_alone(at: tuple[int, ...]) -> None:
    """One loss far too large is the batch's fault: rolled back, lr divided by 4 late in a run would never come back."""
    usual, plain, _ = disturbed({})
    ours, tuner, _ = disturbed(dict.fromkeys(at, SPIKE))
    assert tuner.stats["spikes"] == len(at) and tuner.stats["rollbacks"] == 0
    assert float(tuner.values["lr"]) == pytest.approx(float(plain.values["lr"]), rel=0.5)
    assert ours <= 1.05 * usual


def test_spikes_in_a_row_are_a_blow_up() -> None:
    verdicts, guard = guard_after([1.0] * 30)
    assert set(verdicts) == {"good"}
    told = [guard.judge(11.0, True) for _ in range(3)]
    assert told == ["spike", "spike", "blow-up"]
    assert guard.roll_back()
    assert guard.judge(1.0, True) == "good"


@pytest.mark.slow
@pytest.mark.parametrize("at", [(0,), (0, 1, 2, 3), (1,), (5, 7)])
def test_the_first_lr_is_found_in_spite_of_batches_that_are_not_finite(at: tuple[int, ...]) -> None:
    """From lr 100, with BatchNorm, whose running statistics a NaN batch spoils."""
    usual, _, plain = disturbed({}, norm=True)
    ours, tuner, first = disturbed(dict.fromkeys(at, NOT_A_NUMBER), lr=100.0, norm=True)
    assert tuner.stats["nonfinite_steps"] == len(at) and tuner.stats["rollbacks"] == 0
    assert 1 / 4 < first / plain < 4  # other batches; a warm start cut short is off by far more
    assert ours <= 1.05 * usual
