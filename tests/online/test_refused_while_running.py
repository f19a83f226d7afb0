"""What a loop may do that a tuner cannot follow: said, or refused with a way out."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hypergrad
from tests.online.live_loops import as_given, data, float64, mse, sgd, two_layers, validation
from tests.references import ScheduleFree

__all__ = ["float64"]  # the fixture


# ---- validation losses that write to parameters


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(5, 1)


MODELS = {"a linear model": linear, "an MLP": two_layers}
WEIGHTS = {"lerp_": False, "lerp_ of .data": True}


@pytest.mark.parametrize("silently", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_schedule_free_optimizer_in_val_loss(make: Callable[[], nn.Module], silently: bool) -> None:
    """Its eval() and train() exchange the weights under the graph: refused before anything changes."""
    model = make()
    opt = ScheduleFree(model.parameters(), lr=0.05, silently=silently)

    def val_loss() -> Tensor:
        opt.eval()
        loss = mse(model, data()[1])
        opt.train()
        return loss

    with pytest.raises(ValueError, match=r"val_loss writes to the parameters.*without optimizer.eval\(\)"):
        as_given(model, opt, val_loss, tune=("lr",), every=2)
    assert not opt._optimizer_step_pre_hooks
    assert vars(opt).keys() == vars(ScheduleFree(model.parameters(), lr=0.05)).keys()  # nothing is left on it


@pytest.mark.parametrize("silently", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("mode", ["unrolled", "forward"])
def test_hypergradient_of_one(mode: str, silently: bool) -> None:
    model = linear()
    opt = ScheduleFree(model.parameters(), lr=0.05, silently=silently)

    def val_loss() -> Tensor:
        opt.eval()
        loss = mse(model, data()[1])
        opt.train()
        return loss

    with pytest.raises(ValueError, match="val_loss writes to the parameters"):
        hypergrad.hypergradient(model, opt, mse, data()[0][:3], val_loss, wrt="lr", mode=mode)


def test_schedule_free_without_eval_is_tuned() -> None:
    """The validation loss at the weights of the gradients: against differences of the loop."""

    def ends_at(lr: float) -> float:
        model = linear()
        opt = ScheduleFree(model.parameters(), lr=lr)
        for batch in data()[0][:4]:
            opt.zero_grad()
            mse(model, batch).backward()
            opt.step()
        return mse(model, data()[1]).item()

    model = linear()
    opt = ScheduleFree(model.parameters(), lr=0.05)
    got = hypergrad.hypergradient(
        model, opt, mse, data()[0][:4], lambda: mse(model, data()[1]), wrt="lr", mode="forward"
    )
    h = 1e-5
    assert float(got.gradients["lr"][0]) == pytest.approx((ends_at(0.05 + h) - ends_at(0.05 - h)) / (2 * h), rel=1e-6)


@pytest.mark.parametrize("by", ["copy_", ".data", "_foreach_copy_"])
def test_weights_exchanged_for_their_average_in_val_loss(by: str) -> None:
    """Seen before training: also where they are the same as yet, and are put back to the last bit."""
    model = two_layers()
    average = [p.detach().clone() for p in model.parameters()]

    def write(values: list[Tensor]) -> None:
        with torch.no_grad():
            if by == "_foreach_copy_":
                torch._foreach_copy_(list(model.parameters()), values)
                return
            for p, x in zip(model.parameters(), values, strict=True):
                (p if by == "copy_" else p.data).copy_(x)

    def val_loss() -> Tensor:
        kept = [p.detach().clone() for p in model.parameters()]
        write(average)
        loss = mse(model, data()[1])
        write(kept)
        return loss

    with pytest.raises(ValueError, match=r"val_loss writes to the parameters.*average=True"):
        hypergrad.Tuner(model, sgd()(model), val_loss)


def test_a_val_loss_may_write_to_what_is_no_parameter() -> None:
    model, seen = two_layers(), torch.zeros(1)

    def val_loss() -> Tensor:
        seen.add_(1)
        x = data()[1][0].clone().mul_(1.0)
        return mse(model, (x, data()[1][1]))

    hypergrad.Tuner(model, sgd()(model), val_loss)
    assert seen > 0


# ---- optimizers that call a closure


@pytest.mark.parametrize("use", ["Tuner", "hypergradient", "check", "tune_run"])
def test_an_optimizer_that_needs_a_closure(use: str) -> None:
    model = linear()
    opt = torch.optim.LBFGS(model.parameters(), lr=0.1)
    calls: dict[str, Callable[[], Any]] = {
        "Tuner": lambda: hypergrad.Tuner(model, opt, validation(model)),
        "hypergradient": lambda: hypergrad.hypergradient(model, opt, mse, data()[0], validation(model), "lr"),
        "check": lambda: hypergrad.check(model, opt, mse, data()[0], validation(model), "lr"),
        "tune_run": lambda: hypergrad.tune_run(
            lambda seed: hypergrad.Run(model, opt, data()[0], mse, validation(model)), {"lr": 0.1}
        ),
    }
    with pytest.raises(NotImplementedError, match=r"LBFGS .*calls a closure within its step.*AdamW"):
        calls[use]()


# ---- tensors that are detached


def self_paced(model: nn.Module, batch: tuple[Tensor, Tensor], net: nn.Module, cut: bool = True) -> Tensor:
    each = (model(batch[0]) - batch[1]) ** 2
    return (net(each.detach() if cut else each) * each).mean()


def stop_gradient(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    out = model(batch[0]).tanh()
    return (out.detach() * out).mean() + mse(model, batch)


def by_numbers(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Its weights are a new tensor: the graph does not show where they come from."""
    each = (model(batch[0]) - batch[1]) ** 2
    return (torch.exp(-each.detach()) * each).mean()


def with_a_log(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    loss = mse(model, batch)
    float(loss.detach())
    return loss


NET = nn.Sequential(nn.Linear(1, 1), nn.Sigmoid()).double()
nn.init.constant_(NET[0].weight, -0.5)  # type: ignore[arg-type]
nn.init.constant_(NET[0].bias, 0.3)  # type: ignore[arg-type]
CUT: dict[str, tuple[Callable[..., Tensor], bool]] = {
    "weights by a net from loss.detach()": (lambda m, b: self_paced(m, b, NET), True),
    "weights by a net from the loss": (lambda m, b: self_paced(m, b, NET, cut=False), False),
    "stop-gradient": (stop_gradient, True),
    "weights of numbers": (by_numbers, False),
    "logged": (with_a_log, False),
}


def off(loss: Callable[..., Tensor]) -> float:
    """The relative error of d/dlr against central differences of torch's own loop."""

    def ends_at(lr: float) -> float:
        model = two_layers().eval()
        opt = torch.optim.SGD(model.parameters(), lr=lr)
        for batch in data()[0]:
            opt.zero_grad()
            loss(model, batch).backward()
            opt.step()
        return mse(model, data()[1]).item()

    model = two_layers().eval()
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    got = hypergrad.hypergradient(model, opt, loss, data()[0], validation(model), "lr").gradients["lr"][0]
    h = 1e-5
    true = (ends_at(0.05 + h) - ends_at(0.05 - h)) / (2 * h)
    return abs(float(got) / true - 1)


@pytest.mark.parametrize("name", CUT)
def test_a_detached_tensor_is_said_where_the_graph_shows_it(name: str) -> None:
    """And the number is off there; where weights are computed from it outside of the graph, check tells."""
    loss, said = CUT[name]
    model = two_layers().eval()
    call = (model, torch.optim.SGD(model.parameters(), lr=0.05), loss, data()[0], validation(model), "lr")
    for mode in ("unrolled", "forward"):
        found = hypergrad.hypergradient(*call, mode=mode).stats["warnings"]
        assert [bool(re.search("detached", x)) for x in found] == [True] * said
    assert (off(loss) > 1e-4) == (said or name == "weights of numbers")
    assert bool(hypergrad.check(*call)) == (not said and name != "weights of numbers")


@pytest.mark.parametrize("mode", ["forward", "unrolled", "implicit"])
@pytest.mark.parametrize("name", ["stop-gradient", "logged"])
def test_and_by_a_tuner_at_its_first_step(name: str, mode: str, recwarn: pytest.WarningsRecorder) -> None:
    loss, said = CUT[name]
    model = two_layers()
    tuner = as_given(model, sgd()(model), validation(model), loss=loss, mode=mode, tune=("lr",))
    for batch in data()[0][:3]:
        tuner.step(batch)
    assert sum("detached" in str(w.message) for w in recwarn) == said


# ---- compiled


def test_a_whole_step_compiled_that_leaves_autograd_as_it_is() -> None:
    """torch.compile leaves the tuner alone; with a backend that keeps the graph the numbers are those of the plain loop."""
    found = []
    for compiled in (False, True):
        model = two_layers().eval()
        opt = sgd()(model)
        tuner = as_given(model, opt, validation(model), every=4)

        def step(x: Tensor, y: Tensor, model: Any = model, opt: Any = opt, tuner: Any = tuner) -> None:
            opt.zero_grad()
            tuner.backward(mse(model, (x, y)))
            opt.step()

        run = torch.compile(step, backend="eager") if compiled else step
        for x, y in data()[0]:
            run(x, y)
        assert tuner.stats["hyper_steps"] == 3
        found.append(tuner.hypergradients["lr"])
    assert torch.allclose(*found, rtol=1e-9)


def test_a_whole_step_compiled_by_aot_autograd_is_refused_before_weights_change() -> None:
    model = two_layers().eval()
    opt = sgd()(model)
    tuner = as_given(model, opt, validation(model))
    before = [p.detach().clone() for p in model.parameters()]

    def step(x: Tensor, y: Tensor) -> None:
        opt.zero_grad()
        tuner.backward(mse(model, (x, y)))
        opt.step()

    run = torch.compile(step, backend="aot_eager")
    with pytest.raises(
        NotImplementedError, match=r"under torch.compile.*compiled module.*the tuner may not be compiled"
    ):
        run(*data()[0][0])
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
