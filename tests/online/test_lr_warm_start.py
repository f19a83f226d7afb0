"""The start of lr and weight decay is a hint: any start ends in the same place, and nothing moves where nothing may."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import hypergrad
from hypergrad.online.policies.lr_warm_start import LrSearch, LrWarmStart
from tests.online.live_loops import CURVATURES, Bowl, data, mse, two_layers, validation


def loop(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 40, **options) -> hypergrad.Tuner:
    tuner = hypergrad.Tuner(model, optimizer, model, every=1000, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        tuner.backward(model())
        optimizer.step()
    return tuner


@pytest.mark.parametrize("start", [1e-8, 1e-3, 1.0, 100.0])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_lr_comes_from_the_curvature_not_from_its_start(kind, start):
    found = []
    for lr in (start, 1e-2):
        model = Bowl()
        found.append(loop(model, kind(model.parameters(), lr=lr), tune=("lr",)).values["lr"].item())
        assert bool(torch.isfinite(model.theta).all())
    assert found[0] == pytest.approx(found[1], rel=0.3)


def test_it_is_a_share_of_the_lr_that_is_best_along_the_steps():
    """Along the gradient h θ a quadratic is least at lr = Σ h² θ² / Σ h³ θ² for one step, and at less for several."""
    model = Bowl()
    found = loop(model, torch.optim.SGD(model.parameters(), lr=1e-7), tune=("lr",)).values["lr"].item()
    best = float((CURVATURES**2).sum() / (CURVATURES**3).sum())
    assert 0.125 * best < found < best


@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_momentum_is_foreseen(momentum):
    """Of lr/(1 − m) it is the long run that counts, not what the first steps have seen of it."""
    effective = []
    for m in (0.0, momentum):
        model = Bowl()
        tuner = loop(model, torch.optim.SGD(model.parameters(), lr=1e-5, momentum=m), tune=("lr",))
        effective.append(tuner.values["lr"].item() / (1 - m))
    assert 0.2 < effective[1] / effective[0] < 5


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("first", [1e-3, 1e-2, 0.03, 0.1, 0.3])
def test_a_first_step_not_far_below_the_best_is_no_hint_either(first: float, momentum: float) -> None:
    """½ θ², every batch the same: one step by g goes to the minimum at lr/(1 − m) = 1 in the long run.

    lr passes it before the fewest observations are made, and comes down again while what it did stays in z.
    """
    search, lr, theta, tangent = LrSearch(LrWarmStart(), True), first, 1.0, 0.0
    buffer = buffer_tangent = 0.0
    while search.active:
        if tangent:
            lr *= search.observe(theta * tangent, tangent**2, momentum)
        buffer, buffer_tangent = momentum * buffer + theta, momentum * buffer_tangent + tangent
        theta, tangent = theta - lr * buffer, tangent - lr * (buffer_tangent + buffer)
    assert 0.1 < lr / (1 - momentum) < 1


def test_what_a_larger_lr_has_done_is_not_taken_for_a_smaller_ones() -> None:
    """lr 1, 2, 4, 8, of which nothing is seen; then batches that would have z half as large: 4 was best, half of it is 2."""
    search = LrSearch(LrWarmStart(shortest=8), True)
    for _ in range(3):
        search.observe(0.0, 0.0, 0.0)
    assert search.lr == 8
    found = [search.lr * search.observe(0.5, 1.0, 0.0) for _ in range(5)]
    assert found == [4, 2, 2, 2, 2]
    assert not search.active


@pytest.mark.parametrize("b", [(3.0, -1.0, -1.5, -0.2), (-1.0, -2.0, 3.1)])
def test_a_curvature_that_signs_at_random_would_give_stops_no_search(b: tuple[float, ...]) -> None:
    """√(Σ b²) is the root mean square of Σ ±b over random signs, at e = 1. Terms of one sign sum to more, and stop a search."""
    assert 0 < sum(b) < math.sqrt(sum(x**2 for x in b))
    for signs, stops in ((b, False), (tuple(map(abs, b)), True)):
        search = LrSearch(LrWarmStart(shortest=1), True)
        for x in signs:
            search.lr = 1.0
            factor = search.observe(0.0, x, 0.0)
        assert (factor < 1) is stops
        assert search.active is not stops


def test_steps_that_lead_uphill_say_nothing_of_lr() -> None:
    """Slope 2 and curvature 1 along z: the loss is least at −1 times z, and lr stays. Then half of what is best by all."""
    search = LrSearch(LrWarmStart(shortest=1), True)
    assert [search.observe(2.0, 1.0, 0.0) for _ in range(8)] == [1] * 8
    assert search.active
    assert search.observe(-23.0, 1.0, 0.0) == pytest.approx(8 / 9)  # of all slopes −7, curvatures 9: least at 1 + 7/9
    assert not search.active


def test_groups_keep_their_ratio():
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": 1e-6}, {"params": model[2].parameters(), "lr": 5e-6}]
    )
    x, y = torch.randn(32, 4), torch.randn(32, 1)
    tuner = hypergrad.Tuner(model, optimizer, lambda: mse(model, (x, y)), tune=("lr",), every=1000)
    for _ in range(40):
        optimizer.zero_grad()
        tuner.backward(mse(model, (x, y)))
        optimizer.step()
    first, second = tuner.values["lr"].tolist()
    assert second / first == pytest.approx(5, rel=1e-6)
    assert first > 1e-3


@pytest.mark.parametrize("case", ["given", "off", "frozen"])
def test_a_start_that_is_meant_is_kept(case):
    model = Bowl()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    options = {"given": {"tune": {"lr": hypergrad.Hyperparameter(1e-4)}}, "off": {"warm_start": False, "tune": "lr"}}
    tuner = hypergrad.Tuner(model, optimizer, model, every=1000, **options.get(case, {"tune": "lr"}))
    if case == "frozen":
        tuner.freeze()
    for _ in range(10):
        optimizer.zero_grad()
        tuner.backward(model())
        optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 1e-4


@pytest.mark.parametrize("case", ["hint", "given", "off", "frozen", "lr given"])
def test_momentum_that_is_tuned_begins_at_0_9_unless_it_is_meant(case):
    model = Bowl()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.3)
    tune = {"lr": 1e-4 if case == "lr given" else None, "momentum": 0.3 if case == "given" else None}
    tuner = hypergrad.Tuner(model, optimizer, model, tune=tune, every=1000, warm_start=case != "off")
    if case == "frozen":
        tuner.freeze()
    for _ in range(3):
        optimizer.zero_grad()
        tuner.backward(model())
        optimizer.step()
    assert optimizer.param_groups[0]["momentum"] == pytest.approx(0.9 if case == "hint" else 0.3)


@pytest.mark.parametrize(("typed", "total", "begins"), [(0.3, 399, 0.3), (0.99, 399, 0.9), (0.3, 400, 0.9)])
def test_momentum_of_a_short_run_begins_no_higher_than_it_was(typed, total, begins):
    model = Bowl()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=typed)
    loop(model, optimizer, steps=3, tune=("lr", "momentum"), total_steps=total)
    assert optimizer.param_groups[0]["momentum"] == pytest.approx(begins)


@pytest.mark.parametrize("decay", [1e-9, 1e-1, 1e3])
def test_weight_decay_starts_where_it_decays_something_but_not_all(decay):
    steps, model = 400, Bowl()
    tuner = loop(model, torch.optim.SGD(model.parameters(), lr=1e-3, weight_decay=decay), steps=60, total_steps=steps)
    lr, wd = tuner.values["lr"].item(), tuner.values["weight_decay"].item()
    assert 0.05 < lr * wd * steps / 2 < 1.0


@pytest.mark.parametrize("decay", [1e-9, 1e3])
def test_weight_decay_of_each_of_two_optimizers_starts_where_it_makes_sense(decay):
    steps, (bowl, other) = 400, (Bowl(), Bowl())
    optimizers = [
        torch.optim.SGD(bowl.parameters(), lr=1e-3, momentum=0.9, weight_decay=decay),
        torch.optim.AdamW(other.parameters(), lr=1e-3, weight_decay=decay),
    ]
    tuner = hypergrad.Tuner(bowl, optimizers, lambda: bowl() + other(), total_steps=steps, every=1000)
    for _ in range(60):
        for optimizer in optimizers:
            optimizer.zero_grad()
        tuner.backward(bowl() + other())
        for optimizer in optimizers:
            optimizer.step()
    lr, wd = tuner.values["lr"], tuner.values["weight_decay"]
    decayed = lr * wd * torch.tensor([1 / (1 - 0.9), 1.0]) * steps / 2
    assert bool((decayed > 0.05).all() and (decayed < 1.0).all()), decayed


def test_resumed_in_the_middle_it_goes_on():
    def run(stop: int | None) -> list[float]:
        model = two_layers()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, weight_decay=1e-4)
        tuner = hypergrad.Tuner(model, optimizer, validation(model), total_steps=40, every=3)
        for step, batch in enumerate(data()[0] * 2):
            if step == stop:
                saved = tuner.state_dict(), optimizer.state_dict()
                tuner.close()
                optimizer = torch.optim.SGD(model.parameters(), lr=7.0, momentum=0.9, weight_decay=1e-4)
                optimizer.load_state_dict(saved[1])
                tuner = hypergrad.Tuner(model, optimizer, validation(model), total_steps=40, every=3)
                tuner.load_state_dict(saved[0])
            optimizer.zero_grad()
            tuner.backward(mse(model, batch))
            optimizer.step()
        return [*tuner.values["lr"].tolist(), *tuner.values["weight_decay"].tolist()]

    whole = run(None)
    assert all(math.isfinite(x) for x in whole)
    assert run(5) == whole
    assert run(12) == whole
