"""Loops in which every optimizer goes down a loss of its own: each is judged by its own past, and has its own warm start."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hypergrad
from experiments.gan import fit
from tests.online.live_loops import FD_RTOL, STEPS, Backward, as_given, data, float64, mse, slope, two_layers
from tests.online.test_tuner_several_optimizers import LOOPS, in_turn, make, tuned
from tests.tiers import slow_but

__all__ = ["float64"]  # the fixture


class Bowls(nn.Module):
    """Two losses ½ c θ² of very different curvature, each with weights of its own."""

    CURVATURES = (1.0, 1e4)

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ParameterList([torch.ones(3), torch.ones(3)])

    def loss(self, i: int) -> Tensor:
        return 0.5 * (self.CURVATURES[i] * torch.tensor([1.0, 0.3, 0.1]) * self.parts[i] ** 2).sum()


def found(turns: tuple[int, ...], start: float, alone: int | None = None) -> list[float]:
    """lr of each after its warm start. turns: whose step it is, over and over; alone: that optimizer's tuner has no other."""
    model = Bowls()
    opts = [torch.optim.SGD([p], lr=start) for p in model.parts]
    mine = opts if alone is None else [opts[alone]]
    losses = range(2) if alone is None else [alone]
    tuner = hypergrad.Tuner(model, mine, lambda: sum(model.loss(i) for i in losses), tune=("lr",), every=10**4)  # type: ignore[arg-type]
    for _ in range(40):
        for i in turns:
            if i in losses:
                opts[i].zero_grad()
                tuner.backward(model.loss(i))
                opts[i].step()
    assert tuner.stats["spikes"] == tuner.stats["rollbacks"] == 0
    return tuner.values["lr"].tolist()


@pytest.mark.parametrize("turns", [(0, 1), (1, 0), (0, 0, 0, 0, 0, 1), (1, 1, 1, 0)])
@pytest.mark.parametrize("start", slow_but([1e-8, 1e-3], 1e-8))
def test_lr_of_each_is_what_its_own_loss_calls_for(turns: tuple[int, ...], start: float) -> None:
    together = found(turns, start)
    for i in range(2):
        assert together[i] == pytest.approx(found(turns, start, alone=i)[0], rel=0.3)


def run(losses: Callable[[int, int, Tensor], Tensor], steps: int = 60) -> hypergrad.Tuner:
    """Two linear models in turn; losses(i, t, loss) is what optimizer i's loss is made of at step t."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(5, 1), nn.Linear(5, 1)])
    opts = [torch.optim.SGD(m.parameters(), lr=1e-6) for m in model]
    batches, val = data()
    tuner = as_given(model, opts, lambda: mse(model[0], val) + mse(model[1], val), tune=("lr",), every=10**4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for t in range(steps):
            for i, opt in enumerate(opts):
                opt.zero_grad()
                tuner.backward(losses(i, t, mse(model[i], batches[t % STEPS])))
                opt.step()
    return tuner


def test_a_loss_far_above_the_other_optimizers_is_no_spike() -> None:
    tuner = run(lambda i, t, loss: loss * (1e-3, 1e3)[i])
    assert all(tuner.stats[name] == 0 for name in ("spikes", "rollbacks", "nonfinite_steps"))


def test_a_loss_that_rises_as_the_other_learns_is_no_blow_up() -> None:
    """As a generator's does: from 0.7 to 5, in steps."""
    tuner = run(lambda i, t, loss: 0.01 * loss + (5.0 if i and t > 20 else 0.7))
    assert all(tuner.stats[name] == 0 for name in ("spikes", "rollbacks", "nonfinite_steps"))


def test_a_spike_of_the_smaller_loss_is_passed_over() -> None:
    """Far above its own past, far below the other loss."""
    tuner = run(lambda i, t, loss: loss * (1e-3 if i == 0 else 1e3) * (1e5 if i == 0 and t == 40 else 1.0))
    assert tuner.stats["spikes"] == 1 and tuner.stats["rollbacks"] == 0


def test_losses_that_are_not_finite_are_the_business_of_the_one_that_steps() -> None:
    tuner = run(lambda i, t, loss: loss * (math.nan if i == 0 and t in (30, 31, 32) else 1.0))
    assert tuner.stats["nonfinite_steps"] + tuner.stats["rollbacks"] >= 3


# ---- which losses are whose


def shared_trunk() -> tuple[Any, list[Any]]:
    """Actor and critic on one trunk, which the actor's optimizer holds."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"trunk": nn.Linear(5, 4), "actor": nn.Linear(4, 1), "critic": nn.Linear(4, 1)})
    held = [[*model["trunk"].parameters(), *model["actor"].parameters()], [*model["critic"].parameters()]]
    return model, [torch.optim.SGD(p, lr=0.05, momentum=0.8, weight_decay=0.01) for p in held]


def losses_of(model: Any, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    h = torch.tanh(model["trunk"](batch[0]))
    value = model["critic"](h)
    return ((model["actor"](h) - batch[1]) ** 2 * (1 + value**2)).mean(), 100 * ((value - batch[1]) ** 2).mean() / 64


def both_before_the_steps(model: Any, opts: list[Any], backward: Any) -> None:
    for batch in data()[0]:
        model.zero_grad()
        actor, critic = losses_of(model, batch)
        backward(actor, inputs=opts[0].param_groups[0]["params"], retain_graph=True)
        backward(critic, inputs=opts[1].param_groups[0]["params"])
        for opt in opts:
            opt.step()


def critic_first(model: Any, opts: list[Any], backward: Any) -> None:
    for batch in data()[0]:
        for i in (1, 0):
            model.zero_grad()
            backward(losses_of(model, batch)[i])
            opts[i].step()


@pytest.mark.parametrize("loop", [both_before_the_steps, critic_first])
def test_actor_and_critic_have_the_hypergradients_of_differences(loop: Callable[..., None]) -> None:
    def val_loss(model: Any) -> Tensor:
        return losses_of(model, data()[1])[0]

    model, opts = shared_trunk()
    tuner = as_given(model, opts, lambda: val_loss(model), every=STEPS, average=False)
    loop(model, opts, tuner.backward)
    assert tuner._loop.apart
    for name, gradient in tuner.hypergradients.items():
        for i, got in enumerate(gradient.tolist()):

            def at(x: float, name: str = name, i: int = i) -> float:
                model, opts = shared_trunk()
                opts[i].param_groups[0][name] += x
                loop(model, opts, Tensor.backward)
                return val_loss(model).item()

            assert got == pytest.approx(slope(at), rel=FD_RTOL), (name, i)


@pytest.mark.parametrize("name", LOOPS)
def test_optimizers_that_go_down_one_loss_together_are_not_taken_apart(name: str) -> None:
    loop, options = LOOPS[name]
    assert tuned(loop, **options)._loop.apart == ("turn" in name or "twice" in name)


def test_a_part_that_is_frozen_for_a_while_does_not_take_them_apart() -> None:
    model, opts = make()
    tuner = as_given(model, opts, lambda: mse(model, data()[1]), tune=("lr",), every=100)
    for t, batch in enumerate(data()[0]):
        model[0].requires_grad_(t % 4 != 1)
        for opt in opts:
            opt.zero_grad(set_to_none=t % 2 == 0)
        tuner.backward(mse(model, batch))
        for opt in opts:
            opt.step()
    assert not tuner._loop.apart
    in_turn(model, opts, tuner.backward, None)
    assert tuner._loop.apart


def test_losses_of_one_optimizer_stay_together() -> None:
    """Real and generated batches, each with a backward of its own."""
    model = two_layers()
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    tuner = as_given(model, opt, lambda: mse(model, data()[1]), tune=("lr",), every=100)
    backward: Backward = tuner.backward
    for x, y in data()[0]:
        opt.zero_grad()
        backward(mse(model, (x, y)))
        backward(2 * mse(model, (x, y + 1)))
        opt.step()
    assert not tuner._loop.apart and tuner.stats["changed_gradients"] == 0


# ---- a GAN


@pytest.fixture
def float32() -> Any:
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("turns", [1, 5])
@pytest.mark.slow
def test_no_step_of_a_gan_is_thrown_away(turns: int, float32: None) -> None:
    for start in (1e-4, 2e-3):
        _, row = fit(0, start, turns, 40 // turns, tuned=True)
        assert row["passed_over"] == row["rollbacks"] == 0
        assert math.isfinite(row["distance"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("turns", [1, 5])
def test_a_gan_ends_no_worse_than_twice_a_plain_run(turns: int, float32: None) -> None:
    plain = [fit(seed, 2e-3, turns, 400, tuned=False)[1]["distance"] for seed in range(2)]
    for start in (1e-4, 2e-3):
        ours = [fit(seed, start, turns, 400, tuned=True)[1]["distance"] for seed in range(2)]
        assert sum(ours) <= 2 * sum(plain), (start, ours, plain)
