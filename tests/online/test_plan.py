"""`Tuner(cost=, plan=)`: what is measured, what follows from it, that the bound is kept, and that runs repeat."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils._python_dispatch import TorchDispatchMode

import hypergrad
from hypergrad.core.processes import ALONE
from hypergrad.online.calibration import FIRST, STEPS, Calibration
from hypergrad.online.plan import PERIOD, STRIDE, Plan, Spending, as_plan
from hypergrad.online.policies.phases import Phases
from hypergrad.online.tangents import Tangents
from hypergrad.policies import DEFAULT, Backtracking, LrWarmStart, replaced, without
from tests import unbounded
from tests.tiers import slow_but

pytestmark = pytest.mark.clock
BOTH = {"lr": 1, "weight_decay": 1}
PLAN = Plan(cost=2.0, product=3.0, validation=3.0, every=10, resting=20)


class Run:
    """A small net on fixed data."""

    def __init__(self, total: int | None, **options: Any):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.x, self.y = torch.randn(64, 5), torch.randn(64, 1)
        self.tuner = hypergrad.Tuner(self.model, self.optimizer, self.val_loss, total_steps=total, **options)
        self.tuned: list[int] = []  # Hessian products of each step

    def val_loss(self) -> torch.Tensor:
        return mse_loss(self.model(self.x[32:]), self.y[32:])

    def step(self) -> None:
        before = self.tuner.stats["hessian_products"]
        self.optimizer.zero_grad()
        self.tuner.backward(mse_loss(self.model(self.x[:32]), self.y[:32]))
        self.optimizer.step()
        self.tuned.append(self.tuner.stats["hessian_products"] - before)

    def go(self, steps: int) -> Run:
        for _ in range(steps):
            self.step()
        return self

    def weights(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


# ---- what follows from a plan


def spent_in(
    plan: Plan, total: int | None, steps: int, numbers: dict[str, int], climbs_until: int = 0
) -> dict[str, list[int]]:
    """The steps in which each name is tuned."""
    spending, found = Spending(plan), {name: list[int]() for name in numbers}
    for t in range(steps):
        names = Phases().tuned_at(t, total, numbers, at_rest=t >= climbs_until, spending=spending)
        for name in names:
            found[name].append(t)
        spending.step(t, sum(numbers[name] for name in names), t % plan.stride == 0, total)
    return found


@pytest.mark.parametrize("climbs_until", [0, 200, 1000])
@pytest.mark.parametrize("numbers", [BOTH, {"lr": 2, "weight_decay": 2}, {"lr": 1, "momentum": 1, "weight_decay": 3}])
@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("cost", [1.15, 1.5, 2.0, 3.0, 8.0])
def test_the_bound_is_kept(cost: float, stride: int, numbers: dict[str, int], climbs_until: int):
    plan = Plan(cost, 2.5, 3.0, 10, 10, stride)
    found = spent_in(plan, 1000, 1000, numbers, climbs_until)
    products = sum(numbers[name] * sum(t % stride == 0 for t in steps) for name, steps in found.items())
    active = {t for steps in found.values() for t in steps}
    seconds = 0.04 * 1000 + 2.5 * products + 3.0 * len(active) / 10 + 1.0 * (1000 - len(active)) / 10
    dearest = plan.price(sum(numbers.values()), 1.0)
    assert seconds <= (cost - 1) * 1000 + dearest
    unbounded = spent_in(Plan(1000.0, 2.5, 3.0, 10, 10, stride), 1000, 1000, numbers, climbs_until)
    assert seconds >= 0.9 * (cost - 1) * 1000 or active >= {t for steps in unbounded.values() for t in steps}


def test_both_phases_of_a_run():
    """Allowance (2 − 1 − 0.04 − 1/20) · 1000 = 910, a step 3.3: 138 steps each, weight decay's the last of the first 900."""
    found = spent_in(PLAN, 1000, 1000, BOTH)
    assert found["lr"] == list(range(138))
    assert found["weight_decay"] == list(range(900 - 137, 900))


def test_what_lr_does_not_need_goes_to_weight_decay():
    """With cost=8 lr has its 300 steps and weight decay its 600: nothing is left out."""
    found = spent_in(Plan(8.0, 2.5, 3.0, 10, 10), 1000, 1000, BOTH)
    assert found["lr"] == list(range(300)) and found["weight_decay"] == list(range(300, 900))


def test_weight_decay_alone_is_tuned_late():
    found = spent_in(PLAN, 1000, 1000, {"weight_decay": 1})
    assert found["weight_decay"] == list(range(900 - 275, 900))


def test_without_a_length_the_bound_is_kept_in_every_thousand_steps():
    found = spent_in(PLAN, None, 3 * PERIOD, BOTH)
    each = [t for t in found["lr"] if t < PERIOD]
    assert each == list(range(145))  # 910 / 6.3
    assert found["lr"] == found["weight_decay"] == [t + i * PERIOD for i in range(3) for t in each]


def test_dear_validation_losses_are_read_more_rarely():
    """v/e ≤ (cost − 1)/4 at e = 4 v/(cost − 1), of the loss alone at a third of it; at most 5 and 20 times as rarely."""
    plan = Plan.made(2.0, 3.0, 10.0, 10)
    assert (plan.product, plan.validation) == pytest.approx((2 ** (7 / 4), 2 ** (14 / 4)))
    assert plan.every == 46 and plan.resting == 16  # 4 · 2^(14/4) = 45.3, a third 15.1
    dear = Plan.made(2.0, 3.0, 60.0, 10)  # 4 · 64 = 256, a third 85.3
    assert (dear.every, dear.resting) == (50, 86)
    assert Plan.made(1.5, 3.0, 60.0, 10).resting == 171  # ⌈64 / 3 / (0.25 · 0.5)⌉
    assert Plan.made(1.15, 3.0, 60.0, 10).resting == 200
    assert Plan.made(2.0, 3.0, 60.0, 10, fixed=True).every == 10
    assert Plan.made(1.05, 3.0, 300.0, 10).allowance(1000) == 0


@pytest.mark.parametrize("k", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("cost", [1.3, 2.0, 3.0, 6.0])
def test_the_stride_is_the_least_that_pays_for_the_whole_run(cost: float, k: float):
    plan = Plan.made(cost, 2.5, 1.0, 10, k=k)
    every = 10 if plan.every == plan.stride else plan.every  # before it was made as large as the stride

    def more(stride: int) -> float:  # than a plain step, in the mean
        readings = 0.9 * plan.validation / every + 0.1 * plan.validation / 3 / plan.resting
        return 0.9 * k * plan.product / stride + readings

    assert more(plan.stride) <= cost - 1 or plan.stride == STRIDE
    assert plan.every >= plan.stride  # a hyperparameter step has new tangents
    assert plan.stride % 2 == 1 and (plan.stride == 1 or more(plan.stride - 2) > cost - 1)


@pytest.mark.parametrize(("tangents", "stride"), [(0.1, 21), (1.0, 9), (2.0, 5), (5.0, 3), (10.0, 1)])
def test_products_are_not_left_out_where_tangents_are_dearer(tangents: float, stride: int):
    """Nothing can pay for them all: a product of 2 in s steps is a quarter of its tangents' price, or the rarest there is."""
    assert Plan.made(1.1, 1.9, 1.0, 10, tangents=tangents).stride == stride


# ---- tangents by strides


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_hypergradients_with_products_in_every_third_step(
    optimizer: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By central differences of a stock loop in float64, in which the gradients of all steps but 0, 3, 6, … are constants."""
    stride, steps, h = 3, 12, 1e-6
    torch.manual_seed(0)
    x, y = torch.randn(steps, 16, 5, dtype=torch.float64), torch.randn(steps, 16, 1, dtype=torch.float64)
    start = [p.detach().clone() for p in nn.Linear(5, 1, dtype=torch.float64).parameters()]

    def made() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Linear(5, 1, dtype=torch.float64)
        for p, first in zip(model.parameters(), start, strict=True):
            p.data.copy_(first)
        return model, optimizer(model.parameters(), lr=0.01, weight_decay=0.1)

    def trained(more: float, given: list[list[torch.Tensor]] | None) -> tuple[float, list[list[torch.Tensor]]]:
        """The validation loss, and the gradients; given: those of another run, which the steps without products take."""
        model, opt = made()
        opt.param_groups[0][name] += more
        found = []
        for t in range(steps):
            opt.zero_grad()
            mse_loss(model(x[t]), y[t]).backward()
            if given is not None and t % stride:
                for p, g in zip(model.parameters(), given[t], strict=True):
                    p.grad = g.clone()
            found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
            opt.step()
        return mse_loss(model(x[0]), y[0]).item(), found

    _, grads = trained(0.0, None)
    true = (trained(h, grads)[0] - trained(-h, grads)[0]) / (2 * h)
    model, opt = made()
    plan = Plan(9.0, 1.0, 1.0, steps, steps, stride)
    monkeypatch.setattr(unbounded.PLACE, unbounded.without_clock)  # it rules from the first step
    tuner = hypergrad.Tuner(
        model,
        opt,
        lambda: mse_loss(model(x[0]), y[0]),
        (name,),
        every=steps,
        average=False,
        warm_start=False,
        plan=plan,
    )
    for t in range(steps):
        opt.zero_grad()
        tuner.backward(mse_loss(model(x[t]), y[t]))
        opt.step()
    assert tuner.stats["hessian_products"] == steps // stride - 1  # the first tangent is 0
    assert tuner.stats["capped"] == 0
    assert tuner.hypergradients[name].item() == pytest.approx(true, rel=1e-6)


H = np.array([40.0, 1.0, 0.1, 0.01])  # of the quadratic ½ θᵀHθ, diagonal
STARTS = {"SGD": np.array([0.1, 1.0, 1.0, 1.0]), "AdamW": np.array([0.02, 30.0, 30.0, 30.0])}


def by_sgd(lr: float, m: float, stride: int, steps: int) -> tuple[float, list[float]]:
    """dL/dlr of SGD with momentum, and c of every product, by a recursion: z and its velocity."""
    theta, velocity = STARTS["SGD"].copy(), np.zeros(4)
    z, dv, weights = np.zeros(4), np.zeros(4), []
    for t in range(steps):
        g, q = H * theta, H * z
        u = -lr * q * sum(m**i for i in range(stride))  # in the weights when the next product comes
        c = float(np.clip(-(z @ u) / (u @ u), 1, stride)) if u.any() and m > 0.9 else 1.0
        weights += [c] if t % stride == 0 and t else []
        velocity = m * velocity + g
        dv = m * dv + (c * q if t % stride == 0 else 0)
        z = z - lr * dv - velocity
        theta = theta - lr * velocity
    return float((H * theta) @ z), weights


def by_adamw(lr: float, m: float, stride: int, steps: int) -> tuple[float, list[float]]:
    """The same of AdamW with β = (m, 0.99) and a weight decay of 0.1."""
    beta, decay = 0.99, 0.1
    theta, first, second = STARTS["AdamW"].copy(), np.zeros(4), np.zeros(4)
    z, d1, d2, weights = np.zeros(4), np.zeros(4), np.zeros(4), []
    for t in range(steps):
        g, q = H * theta, H * z
        first, second = m * first + (1 - m) * g, beta * second + (1 - beta) * g**2
        one, two = 1 - m ** (t + 1), 1 - beta ** (t + 1)
        below = np.sqrt(second / two) + 1e-8

        def moved(d1: np.ndarray, d2: np.ndarray) -> np.ndarray:
            """What tangents of the moments make of that of first / one / below."""
            return d1 / one / below - first / one / below**2 * d2 / two / (2 * np.sqrt(second / two))  # noqa: B023

        u = -lr * moved((1 - m) * q, 2 * (1 - beta) * g * q) * sum(m**i for i in range(stride))
        c = float(np.clip(-(z @ u) / (u @ u), 1, stride)) if u.any() and m > 0.9 else 1.0
        weights += [c] if t % stride == 0 and t else []
        dg = c * q if t % stride == 0 else 0 * q
        d1, d2 = m * d1 + (1 - m) * dg, beta * d2 + 2 * (1 - beta) * g * dg
        z = (1 - lr * decay) * z - decay * theta - first / one / below - lr * moved(d1, d2)
        theta = (1 - lr * decay) * theta - lr * first / one / below
    return float((H * theta) @ z), weights


@pytest.mark.parametrize("momentum", [0.9, 0.95])
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_products_stand_for_the_steps_without_one_where_momentum_is_heavy(
    optimizer: str, momentum: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """dL/dlr by recursions written out in numpy, with c from the definition."""
    stride, steps, lr = 3, 13, {"SGD": 0.01, "AdamW": 0.03}[optimizer]
    true, weights = {"SGD": by_sgd, "AdamW": by_adamw}[optimizer](lr, momentum, stride, steps)
    assert any(1 < c < stride for c in weights) == (momentum > 0.9)

    model = nn.Linear(4, 1, bias=False, dtype=torch.float64)
    model.weight.data.copy_(torch.tensor(STARTS[optimizer]))
    root = torch.diag(torch.tensor(H).sqrt())

    def loss() -> torch.Tensor:
        return 0.5 * model(root).square().sum()

    opt: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    if optimizer == "AdamW":
        opt = torch.optim.AdamW(model.parameters(), lr=lr, betas=(momentum, 0.99), weight_decay=0.1)
    monkeypatch.setattr(unbounded.PLACE, unbounded.without_clock)  # it rules from the first step
    plan = Plan(9.0, 1.0, 1.0, steps, steps, stride)
    options = {"every": steps, "average": False, "warm_start": False, "plan": plan}
    tuner = hypergrad.Tuner(model, opt, loss, ("lr",), **options)
    for _ in range(steps):
        opt.zero_grad()
        tuner.backward(loss())
        opt.step()
    assert tuner.stats["capped"] == 0
    assert tuner.hypergradients["lr"].item() == pytest.approx(true, rel=1e-9)


@pytest.mark.parametrize(("name", "k"), [("momentum", 2), ("betas", 3)])
def test_products_come_in_every_step_while_momentum_is_tuned(name: str, k: int):
    """Of lr and momentum, or lr, β₁ and β₂; in one step of 3 once weight decay is tuned."""
    torch.manual_seed(0)
    x, y = torch.randn(64, 5), torch.randn(64, 1)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))
    opt: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if name == "momentum":
        opt = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.5, weight_decay=1e-4)
    tuner = hypergrad.Tuner(
        model,
        opt,
        lambda: mse_loss(model(x[32:]), y[32:]),
        ("lr", name, "weight_decay"),
        total_steps=300,
        warm_start=False,
        plan=Plan(9.0, 2.0, 1.0, 10, 10, 3),
        policies=without(DEFAULT, Backtracking),
    )
    formed = []
    for _ in range(300):
        before = tuner.stats["hessian_products"]
        opt.zero_grad()
        tuner.backward(mse_loss(model(x[:32]), y[:32]))
        opt.step()
        formed.append(tuner.stats["hessian_products"] - before)
    assert formed[40:90] == [k] * 50
    assert formed[150:240] == [1, 0, 0] * 30
    assert formed[270:] == [0] * 30


def test_products_come_in_every_step_once_tangents_of_weight_decay_have_met_the_cap():
    """To the end of its phase, at step 270; not in lr's, which ends before step 90."""
    run = Run(300, plan=Plan(9.0, 2.0, 1.0, 10, 10, 3), warm_start=False, policies=without(DEFAULT, Backtracking))
    counts = run.tuner._loop.tangents.counts
    for more in (40, 110, 150):  # a hit in lr's phase, and one in that of weight decay
        run.go(more)
        counts["capped"] += 1
    in_threes = [*range(30, 84), *range(100, 148)]
    assert [run.tuned[t] for t in in_threes] == [float(t % 3 == 0) for t in in_threes]
    assert run.tuned[155:265] == [1] * 110


# ---- what is measured


class Scripted(Calibration):
    """With a clock that is set by hand, and takes `each` seconds to look at."""

    now_, each = 0.0, 0.0

    def clock(self) -> float:
        self.now_ += self.each
        return self.now_

    def train(self, unit: float) -> None:
        """A plain step takes 4 units, the tuner 1.5 before the optimizer's step and 0.5 after it, and 50 more once; two products
        7; a validation loss 10."""
        for t in range(100):
            formed = not self.timing or t % 3 == 0
            self.now_ += unit * (3.0 + (50.0 if t == 23 else 0.0) + (7.0 if formed else 0.0))
            with self.time_own():
                self.now_ += 1.5 * unit
            self.now_ += unit  # the optimizer's step
            with self.time_own():
                self.now_ += 0.25 * unit
                if t % 7 == 6:
                    with self.time_reading():
                        self.now_ += 10.0 * unit
                self.step_done(t + 1, 2, formed, searching=t < 20)
                self.now_ += 0.25 * unit


@pytest.mark.parametrize("each", [0.0, 0.7])
def test_seconds_are_told_apart(each: float):
    """Whatever a look at the clock takes: the tuner adds 2/4 of a plain step, 0.04 of which in every step, for two numbers."""
    stopwatch = Scripted(torch.device("cpu"), True)
    stopwatch.each = each
    stopwatch.train(1.0)
    assert not stopwatch.timing and (len(stopwatch.plain), len(stopwatch.formed)) == (8, 4) and stopwatch.complete
    found = stopwatch.result(2, ALONE)
    assert found == pytest.approx((7 / 4 / 2, 10 / 4, (2 / 4 - 0.04) / 2, 4.0), rel=1e-9)
    assert not stopwatch.active


def test_tangents_are_not_measured_where_steps_are_short():
    """Steps of 4e-4 s: with the tuner's part 6e-4, which is taken for 1 + 2 · 0.15 plain ones."""
    stopwatch = Scripted(torch.device("cpu"), True)
    stopwatch.train(1e-4)
    plain = 6e-4 / 1.3
    assert stopwatch.result(2, ALONE) == pytest.approx((7e-4 / plain / 2, 1e-3 / plain, 0.15, 4e-4))


def test_a_tuner_times_what_it_does_around_the_step(monkeypatch: pytest.MonkeyPatch):
    """Tangents that take 30 s, in a plain step of 3 s: 10 − 0.04, rounded up to a power of 2^(1/4)."""
    clock, push = [0.0], Tangents.push

    def slow(self: Tangents, *args: Any) -> None:
        clock[0] += 30.0
        push(self, *args)

    monkeypatch.setattr(Tangents, "push", slow)
    monkeypatch.setattr(Calibration, "clock", lambda _: clock[0])
    run = Run(200, cost=2.0)
    while run.tuner.plan is None:
        clock[0] += 3.0
        run.step()
    assert run.tuner.plan.tangents == pytest.approx(2 ** (14 / 4))
    assert run.tuner.plan.stride == 1  # 4 · 2 / 11.3


def test_the_plan_is_made_once_and_can_be_given():
    measured = Run(200, cost=3.0).go(FIRST)
    assert measured.tuner.plan is None
    measured.go(190)
    plan = measured.tuner.plan
    assert plan is not None and plan.cost == 3.0
    assert 0 in measured.tuned[FIRST : FIRST + 20 + STEPS]
    for given in (plan, plan.state_dict(), as_plan(plan.state_dict())):
        run = Run(200, plan=given)
        assert run.tuner.plan == plan
        run.go(200)
        assert torch.equal(run.weights(), measured.weights()) and run.tuned == measured.tuned
        assert run.tuner.stats["val_evaluations"] == measured.tuner.stats["val_evaluations"]


@pytest.mark.parametrize("cost", [None, 1.15, 2.0])
def test_readings_before_there_is_a_plan(cost: float | None):
    """Those that measure, once each; none while lr's start is found. Without a bound: as often as was asked for."""
    run = Run(200, cost=cost, policies=replaced(DEFAULT, LrWarmStart(shortest=25)))
    calls: dict[int, int] = {}  # by training steps done: of val_loss with its gradient
    validate = run.tuner._loop.hyper.problem.validate

    def counted(*args: Any) -> Any:
        calls[run.tuner.stats["steps"]] = calls.get(run.tuner.stats["steps"], 0) + 1
        return validate(*args)

    run.tuner._loop.hyper.problem.validate = counted  # type: ignore[method-assign]
    while run.tuner._loop.starts.search.active:
        run.go(1)
    found = run.tuner.stats["steps"]
    assert found > 20 and list(calls) == ([] if cost else list(range(10, found, 10)))
    while cost and run.tuner.plan is None:
        run.go(1)
    if cost:
        assert calls and all(t % 10 == 0 and n == 1 for t, n in calls.items())


def test_readings_are_more_frequent_in_the_first_three_tenths_of_a_short_run():
    """Nine from the plan on, one in 5 steps at most, whatever they cost; not where `every` or no length was given."""
    dear = Plan.made(2.0, 2.0, 16.0, 10, tuned=0.9, total=300, done=45)
    assert (dear.early, dear.every) == (5, 50)
    assert [dear.every_at(t, 300) for t in (0, 89, 90, 299)] == [5, 5, 50, 50]
    assert dear.every_at(0, None) == 50
    made = [Plan.made(2.0, 2.0, 16.0, 10, total=total, done=45) for total in (120, 360, 600, 1500)]
    assert [plan.early for plan in made] == [5, 7, 15, 45]
    assert Plan.made(2.0, 2.0, 16.0, 10, total=10_000).early == 50
    assert Plan.made(2.0, 2.0, 1.0, 10, total=1500).early == 10
    assert Plan.made(2.0, 2.0, 16.0, 10, fixed=True, total=300).early == 10
    assert Plan.made(2.0, 2.0, 16.0, 10).early == 50
    older = {name: x for name, x in dear.state_dict().items() if name != "early"}
    assert [as_plan(older).every_at(t, 300) for t in (0, 299)] == [50, 50]
    # what they cost is counted, in steps without a product
    dear = Plan(2.0, 3.0, 16.0, every=50, resting=50, stride=21, early=5)
    assert dear.price(1, 0.0, 5) == pytest.approx(16 / 5) and dear.price(1, 0.0) == pytest.approx(16 / 50)
    spending = Spending(dear)
    for t in range(300):
        spending.step(t, 1 if t < 270 else 0, False, 300)
    assert spending.spent == pytest.approx(90 * 16 / 5 + 180 * 16 / 50)


@pytest.mark.parametrize("early", [5, 0])
def test_a_short_run_reads_as_often_as_its_plan_says(early: int):
    """Once in 5 steps from the plan on to 30 % of 200 steps, then once in 20; with a plan of an older version once in 20."""
    plan = Plan(2.0, 2.0, 2.0, every=20, resting=20, stride=3, early=early)
    run = Run(200, plan=plan, policies=replaced(DEFAULT, LrWarmStart(shortest=10)))
    times = []
    validate = run.tuner._loop.hyper.problem.validate

    def noted(*args: Any) -> Any:
        times.append(run.tuner.stats["steps"])
        return validate(*args)

    run.tuner._loop.hyper.problem.validate = noted  # type: ignore[method-assign]
    while run.tuner._loop.bound.plan is None:
        run.go(1)
    begun = run.tuner.stats["steps"] + 1
    assert begun < 50
    times.clear()
    run.go(161 - begun)
    first = [t for t in range(begun, 60) if t % (early or 20) == 0]
    assert sorted(set(times)) == [*first, *range(60, 161, 20)]


@pytest.mark.parametrize("cost", slow_but([1.5, 2.0, 4.0], 1.5))
def test_a_run_given_its_plan_is_the_one_that_measured_it(cost: float):
    """Whatever the clock said, and stopped and resumed before or after the plan was made."""
    measured = Run(150, cost=cost).go(150)
    for stop in (5, 20, 100):
        first = Run(150, plan=measured.tuner.plan).go(stop)
        state = copy.deepcopy([x.state_dict() for x in (first.model, first.optimizer, first.tuner)])
        again = Run(150, plan=measured.tuner.plan)
        for x, saved in zip((again.model, again.optimizer, again.tuner), state, strict=True):
            x.load_state_dict(saved)
        assert torch.equal(again.go(150 - stop).weights(), measured.weights())


def test_a_run_repeats_given_its_plan():
    one, other = Run(100, plan=PLAN).go(100), Run(100, plan=PLAN).go(100)
    assert torch.equal(one.weights(), other.weights()) and one.tuned == other.tuned
    assert 0 < sum(map(bool, one.tuned)) <= 2 * 15  # 95 / 3.3 = 28


@pytest.mark.parametrize("stop", slow_but([5, 15, 25, 60, 95], 15, 60))
@pytest.mark.parametrize("options", [{"plan": PLAN}, {"cost": 20.0}], ids=["plan", "cost"])
def test_a_resumed_run_has_the_same_plan(stop: int, options: dict[str, Any]):
    """cost=20: whatever the clock says, products are formed in every step once the plan is made."""
    whole = Run(100, **options).go(stop)
    state = copy.deepcopy([x.state_dict() for x in (whole.model, whole.optimizer, whole.tuner)])
    again = Run(100, **options)
    for x, saved in zip((again.model, again.optimizer, again.tuner), state, strict=True):
        x.load_state_dict(saved)
    assert again.tuner.plan == whole.tuner.plan
    assert torch.equal(whole.go(100 - stop).weights(), again.go(100 - stop).weights())


# ---- what a step costs while nothing is tuned


class Copies(TorchDispatchMode):
    """Which operations make a tensor as large as all the weights, or join tensors."""

    def __init__(self, n: int):
        super().__init__()
        self.n, self.found = n, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() >= self.n:
            self.found.append(str(func))
        return out


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_nothing_is_copied_while_nothing_is_tuned(optimizer: Any):
    """On two rows of data, so that only what holds all weights is as large as they are."""
    model, x = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 1)), torch.randn(2, 100)
    opt = optimizer(model.parameters(), lr=1e-3)
    policies = replaced(DEFAULT, Phases(0.0, 0.0, 0.0))
    tuner = hypergrad.Tuner(model, opt, lambda: model(x).square().mean(), ("lr",), total_steps=1000, policies=policies)

    def go(steps: int) -> None:
        for _ in range(steps):
            opt.zero_grad()
            tuner.backward(model(x).square().mean())
            opt.step()

    go(12)  # the last went into the running average
    with Copies(sum(p.numel() for p in model.parameters())) as copies:
        go(7)
    assert copies.found == []
    with copies:
        go(2)  # a loss is read, and its state is kept as a good one
    assert copies.found


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"cost": 1.0}, ValueError, "above 1"),
        ({"cost": "2"}, ValueError, "above 1"),
        ({"cost": float("nan")}, ValueError, "above 1"),
        ({"cost": True}, ValueError, "above 1"),
        ({"plan": PLAN, "mode": "unrolled", "loss": lambda m, b: 0}, ValueError, "tuner.backward"),
        ({"plan": {"cost": 2.0}}, TypeError, "state_dict"),
        ({"plan": 2.0}, TypeError, "state_dict"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], error: type[Exception], match: str):
    with pytest.raises(error, match=match):
        Run(100, **options)
