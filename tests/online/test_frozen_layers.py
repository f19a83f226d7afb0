"""What is trained changes in mid-run: frozen, unfrozen, passed by, in turn; against differences of the loop without a tuner."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hypergrad
from tests.online.live_loops import (
    FD_RTOL,
    STEPS,
    Backward,
    as_given,
    data,
    float64,
    matches_differences,
    mse,
    slope,
    validation,
)
from tests.tiers import slow_but

__all__ = ["float64"]  # the fixture


class Net(nn.Module):
    """Three parts: `first`, `norm` and `last`."""

    def __init__(self, first: nn.Module, norm: nn.Module, last: nn.Module):
        super().__init__()
        self.first, self.norm, self.last = first, norm, last
        self.passed_by = False

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.last(h if self.passed_by else torch.tanh(self.norm(h)))


class Tied(nn.Module):
    """`first` is used at both ends, the second time without a call of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 5), nn.LayerNorm(5), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(torch.tanh(self.first(x)))
        return self.last(torch.tanh(nn.functional.linear(h, self.first.weight.T)))


class Pieces(Net):
    """Has no forward of its own: loops call its parts."""

    forward = nn.Module.forward

    def __call__(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(torch.tanh(self.first(x)))))


def conv() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 3, 3), nn.Flatten())


def batch_norm() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (3, 3)), nn.BatchNorm1d(3), nn.Flatten())


NETS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: Net(nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 1)),
    "cnn, batch norm": lambda: Net(conv(), batch_norm(), nn.Linear(9, 1)),
    "tied": Tied,
    "pieces": lambda: Pieces(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 1)),
}  # fmt: skip
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda g: torch.optim.SGD(g, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adamw": lambda g: torch.optim.AdamW(g, lr=0.02, eps=1e-4, weight_decay=0.1),
}


def maker(net: str, optimizer: str) -> Callable[[], tuple[Any, Any]]:
    def make() -> tuple[Any, Any]:
        torch.manual_seed(0)
        model = NETS[net]()
        return model, OPTIMIZERS[optimizer](
            [
                {"params": list(model.first.parameters())},
                {"params": [*model.norm.parameters(), *model.last.parameters()]},
            ]
        )

    return make


def train_only(model: Any, *names: str) -> None:
    for name in ("first", "norm", "last"):
        getattr(model, name).requires_grad_(name in names)


EVENTS: dict[str, Callable[[Any, int], Any]] = {
    "frozen": lambda m, t: t == 5 and m.first.requires_grad_(False),
    "norm frozen": lambda m, t: t == 5 and m.norm.requires_grad_(False),
    "head frozen": lambda m, t: t == 5 and m.last.requires_grad_(False),
    "frozen and unfrozen": lambda m, t: t in (3, 8) and m.first.requires_grad_(t == 8),
    "frozen twice": lambda m, t: t in (2, 4, 7, 10) and m.norm.requires_grad_(t in (4, 10)),
    "all but the head": lambda m, t: t == 6 and train_only(m, "last"),
    "gradual unfreezing": lambda m, t: train_only(m, *("last", "norm", "first")[: 1 + t // 4]),
    "halves in turn": lambda m, t: train_only(m, *(("first",), ("norm", "last"))[t // 2 % 2]),
    "one at a time": lambda m, t: train_only(m, ("first", "norm", "last")[t % 3]),
    "a weight alone": lambda m, t: t == 5 and next(m.first.parameters()).requires_grad_(False),
}


def loop(event: Callable[[Any, int], Any], set_to_none: bool = True, accumulate: int = 1) -> Callable[..., None]:
    def train(model: nn.Module, opt: Any, backward: Backward) -> None:
        for t, (x, y) in enumerate(data()[0]):
            event(model, t)
            opt.zero_grad(set_to_none=set_to_none)
            for rows in torch.arange(6).chunk(accumulate):
                backward(mse(model, (x[rows], y[rows])) / accumulate)
            opt.step()

    return train


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("optimizer", slow_but(OPTIMIZERS, "sgd"))
def test_what_is_trained_changes_in_mid_run(optimizer: str, event: str) -> None:
    matches_differences(maker("mlp", optimizer), loop(EVENTS[event]))


@pytest.mark.parametrize("net", ["cnn, batch norm", "tied", "pieces"])
@pytest.mark.parametrize("event", slow_but(["frozen", "norm frozen", "halves in turn"], "halves in turn"))
def test_layers_of_other_nets_are_frozen_in_mid_run(net: str, event: str) -> None:
    for optimizer in OPTIMIZERS:
        matches_differences(maker(net, optimizer), loop(EVENTS[event]))


@pytest.mark.parametrize("event", slow_but(["frozen", "halves in turn"], "frozen"))
def test_gradients_zeroed_to_zeros_let_a_frozen_layer_move_on(event: str) -> None:
    """Its gradient is 0, not None: momentum and weight decay still act."""
    for optimizer in OPTIMIZERS:
        matches_differences(maker("mlp", optimizer), loop(EVENTS[event], set_to_none=False))


def test_layer_is_frozen_in_a_loop_that_accumulates() -> None:
    matches_differences(maker("mlp", "adamw"), loop(EVENTS["frozen and unfrozen"], accumulate=2))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_layer_passed_by_in_some_steps(optimizer: str) -> None:
    """As with stochastic depth: the loss of those steps does not reach it, and it may be frozen too."""

    def passed_by(model: Any, t: int) -> None:
        model.passed_by = t in (2, 3, 7)

    matches_differences(maker("mlp", optimizer), loop(passed_by))
    both = lambda m, t: (passed_by(m, t), EVENTS["norm frozen"](m, t))  # noqa: E731
    matches_differences(maker("mlp", optimizer), loop(both))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_gradients_of_a_layer_dropped_in_some_steps(optimizer: str) -> None:
    def train(model: Any, opt: Any, backward: Backward) -> None:
        for t, batch in enumerate(data()[0]):
            opt.zero_grad()
            backward(mse(model, batch))
            if t % 3 == 1:
                for p in model.first.parameters():
                    p.grad = None
            opt.step()

    matches_differences(maker("mlp", optimizer), train)


def test_group_frozen_by_lr_0_and_unfrozen() -> None:
    """From then on its number is the scale of what the loop writes."""

    def train(model: Any, opt: Any, backward: Backward, scale: float = 1.0) -> None:
        opt.param_groups[0]["lr"] *= scale
        for t, batch in enumerate(data()[0]):
            if t in (4, 9):
                opt.param_groups[0]["lr"] = 0.03 * scale * (t == 9)
            opt.zero_grad()
            backward(mse(model, batch))
            opt.step()

    def at(x: float) -> float:
        model, opt = maker("mlp", "sgd")()
        train(model, opt, Tensor.backward, 1 + x)
        return validation(model)().item()

    matches_differences(maker("mlp", "sgd"), train, wrt=("weight_decay",))
    model, opt = maker("mlp", "sgd")()
    tuner = as_given(model, opt, validation(model), tune=("lr",), every=STEPS, average=False)
    train(model, opt, tuner.backward)
    typed = maker("mlp", "sgd")()[1].param_groups[0]["lr"]
    assert float(tuner.hypergradients["lr"][0]) * typed == pytest.approx(slope(at), rel=FD_RTOL)


def test_frozen_layer_that_the_validation_loss_does_not_read() -> None:
    """Its tangent counts in the steps of the others alone."""

    def make() -> tuple[Any, Any]:
        model, opt = maker("mlp", "sgd")()
        model.side = nn.Linear(5, 1)
        opt.add_param_group({"params": list(model.side.parameters()), "lr": 0.03, "weight_decay": 0.02})
        return model, opt

    def train(model: Any, opt: Any, backward: Backward) -> None:
        for t, (x, y) in enumerate(data()[0]):
            if t == 5:
                model.side.requires_grad_(False)
            opt.zero_grad()
            backward(((model(x) + model.side(x) - y) ** 2).mean())
            opt.step()

    matches_differences(make, train)


def adversaries() -> tuple[Any, Any]:
    """Two nets, each of which is frozen while the other one learns through it."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"g": nn.Linear(5, 3), "d": nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))})
    return model, [torch.optim.SGD(model[k].parameters(), lr=0.05, momentum=0.8, weight_decay=0.01) for k in ("d", "g")]


def adversarial(model: Any, opts: list[Any], backward: Backward) -> None:
    for x, y in data()[0]:
        model["d"].requires_grad_(True)
        model["g"].requires_grad_(False)
        opts[0].zero_grad()
        backward(((model["d"](model["g"](x)) - y) ** 2).mean())
        opts[0].step()
        model["d"].requires_grad_(False)
        model["g"].requires_grad_(True)
        opts[1].zero_grad()
        backward(-((model["d"](model["g"](x)) - y) ** 2).mean() / 4)
        opts[1].step()


def test_two_nets_each_frozen_while_the_other_learns() -> None:
    def val_loss(model: Any) -> Tensor:
        x, y = data()[1]
        return ((model["d"](model["g"](x)) - y) ** 2).mean()

    model, opts = adversaries()
    tuner = as_given(model, opts, lambda: val_loss(model), every=STEPS, average=False)
    adversarial(model, opts, tuner.backward)
    for name, gradient in tuner.hypergradients.items():
        for i, got in enumerate(gradient.tolist()):

            def at(x: float, name: str = name, i: int = i) -> float:
                model, opts = adversaries()
                opts[i].param_groups[0][name] += x
                adversarial(model, opts, Tensor.backward)
                return val_loss(model).item()

            assert got == pytest.approx(slope(at), rel=FD_RTOL), (name, i)


def generator_first(model: Any, opts: list[Any], backward: Backward) -> None:
    """As Lightning's toggle_optimizer has it: the generator is frozen while the other one learns, and when the step is done."""
    for x, y in data()[0]:
        for learns, opt, sign in (("g", opts[1], -0.25), ("d", opts[0], 1.0)):
            for name, part in model.items():
                part.requires_grad_(name == learns)
            opt.zero_grad()
            backward(sign * ((model["d"](model["g"](x)) - y) ** 2).mean())
            opt.step()


def of_generator(model: Any) -> Tensor:
    return model["g"](data()[1][0]).square().mean()


def test_validation_loss_of_the_net_that_is_frozen_when_it_is_read() -> None:
    model, opts = adversaries()
    tuner = as_given(model, opts, lambda: of_generator(model), every=STEPS, average=False)
    generator_first(model, opts, tuner.backward)
    for name, gradient in tuner.hypergradients.items():
        for i, got in enumerate(gradient.tolist()):

            def at(x: float, name: str = name, i: int = i) -> float:
                model, opts = adversaries()
                opts[i].param_groups[0][name] += x
                generator_first(model, opts, Tensor.backward)
                return of_generator(model).item()

            assert got == pytest.approx(slope(at), rel=FD_RTOL), (name, i)


@pytest.mark.parametrize("warm_start", [True, False])
def test_it_is_read_to_the_end_of_a_run_when_nothing_is_tuned_any_more(warm_start: bool) -> None:
    model, opts = adversaries()
    model["g"].requires_grad_(True)
    tuner = hypergrad.Tuner(
        model, opts, lambda: of_generator(model), every=2, total_steps=2 * STEPS, warm_start=warm_start
    )
    for _ in range(2):
        generator_first(model, opts, tuner.backward)
    assert not tuner._hyper.vector.moving
    assert tuner.val_loss == of_generator(model).item()


def test_validation_loss_of_a_layer_that_is_frozen_before_it_ever_learns() -> None:
    """Its hypergradient is 0, in the steps in which a plain run would not change it; later it is that of finite differences."""
    model, opt = maker("mlp", "sgd")()
    tuner = as_given(model, opt, lambda: model.first.weight.square().sum(), tune=("lr",), every=4, hyper_lr=1e-12)
    found = []
    for t, batch in enumerate(data()[0]):
        model.first.requires_grad_(t >= 6)
        opt.zero_grad()
        tuner.backward(mse(model, batch))
        opt.step()
        found.append(tuner.hypergradients.get("lr", torch.full((2,), torch.nan)).clone())
    assert all(bool((x == 0).all()) for x in found[3:7])
    assert bool(found[-1].any())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("advice", ["frozen from the start", "a new tuner"])
def test_group_added_in_mid_run_is_refused_and_what_the_error_says_works(advice: str) -> None:
    """The layer that comes later learns: without it the loss stays above 0.1."""

    def ends_at(tuned: bool, steps: int = 200) -> tuple[float, list[float]]:
        model, _ = maker("mlp", "sgd")()
        x = torch.randn(64, 5, generator=torch.Generator().manual_seed(5))
        batch = x, x.sum(1, keepdim=True).sin()
        early, late = [*model.norm.parameters(), *model.last.parameters()], list(model.first.parameters())
        held = [{"params": early}, *([{"params": late}] if advice == "frozen from the start" else [])]
        model.first.requires_grad_(False)
        opt = torch.optim.SGD(held, lr=0.05 if not tuned else 1e-4, momentum=0.9)
        tuner = hypergrad.Tuner(model, opt, lambda: mse(model, batch), tune=("lr",), every=5)
        if not tuned:
            tuner.close()
        for t in range(steps):
            if t == 60:
                model.first.requires_grad_(True)
            if t == 60 and advice == "a new tuner":
                opt.add_param_group({"params": late})
                opt.zero_grad()
                if tuned:
                    tuner.backward(mse(model, batch))
                    with pytest.raises(
                        ValueError, match=r"requires_grad_\(False\).*tuner\.close\(\).*warm_start=False"
                    ):
                        opt.step()
                    lr = float(tuner.values["lr"][0])
                    tuner.close()
                    for group in opt.param_groups:
                        group["lr"] = lr
                    tuner = as_given(model, opt, lambda: mse(model, batch), tune=("lr",), every=5)
            opt.zero_grad()
            tuner.backward(mse(model, batch))
            opt.step()
        lrs = [g["lr"] for g in opt.param_groups]
        return mse(model, batch).item(), lrs

    ours, lrs = ends_at(True)
    without, _ = ends_at(True, steps=60)
    assert ours < 0.3 * without, (ours, without)
    assert advice != "a new tuner" or max(lrs) < 20 * min(lrs)


# ---- what the loop and the model are afterwards


@pytest.mark.parametrize("net", slow_but(NETS, "mlp"))
def test_training_and_flags_are_those_of_a_loop_without_a_tuner(net: str) -> None:
    for event in EVENTS.values():
        ends = []
        for tuned in (False, True):
            model, opt = maker(net, "adamw")()
            tuner = as_given(model, opt, validation(model), every=4)
            tuner._hyper.freeze() if tuned else tuner.close()  # tangents go on, values stay
            loop(event)(model, opt, tuner.backward)
            ends.append((list(model.parameters()), [(p.requires_grad, p.grad) for p in model.parameters()]))
        (a, flags), (b, others) = ends
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
        for (x, g), (y, h) in zip(flags, others, strict=True):
            assert x == y and (g is None) == (h is None) and (g is None or torch.equal(g, h))


def frozen_run() -> tuple[Any, Any, hypergrad.Tuner]:
    model, opt = maker("mlp", "sgd")()
    tuner = as_given(model, opt, validation(model), every=100)
    for batch in data()[0][:4]:
        opt.zero_grad()
        tuner.backward(mse(model, batch))
        opt.step()
    opt.zero_grad()
    model.first.requires_grad_(False)
    return model, opt, tuner


def test_plain_backward_leaves_a_frozen_layer_without_a_gradient() -> None:
    model, _, _ = frozen_run()
    mse(model, data()[0][0]).backward()
    assert all(p.grad is None for p in model.first.parameters())
    assert all(p.grad is not None for p in model.last.parameters())


def test_flags_are_put_back_where_a_call_of_the_model_fails_or_is_interrupted() -> None:
    model, opt, tuner = frozen_run()
    for error in (RuntimeError, KeyboardInterrupt):
        handle = model.last.register_forward_pre_hook(lambda *_, error=error: (_ for _ in ()).throw(error()))
        with suppress(error):
            model(data()[0][0][0])
        handle.remove()
        tuner.backward(mse(model, data()[0][0]))
        assert not any(p.requires_grad for p in model.first.parameters())
        assert all(p.grad is None for p in model.first.parameters())
        opt.zero_grad()


def test_hooks_go_with_the_tuner_and_do_nothing_in_copies() -> None:
    model, _, tuner = frozen_run()
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    pickle.dump(model, file)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    assert twin(data()[0][0][0]).grad_fn is not None
    assert not any(p.requires_grad for p in twin.first.parameters())
    assert any(m._forward_pre_hooks for m in model.modules())
    tuner.close()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    other, opt = maker("mlp", "sgd")()
    tuner = as_given(other, opt, validation(other))
    del tuner
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in other.modules())


@pytest.mark.parametrize("what", ["read by itself", "far below"])
def test_frozen_layer_read_outside_of_a_call_is_refused_before_the_step(what: str) -> None:
    model, opt, tuner = frozen_run()
    model.norm.requires_grad_(what == "read by itself")
    x, y = data()[0][0]
    h = torch.tanh(nn.functional.linear(x, model.first.weight, model.first.bias))
    h = torch.tanh(nn.functional.linear(h, model.norm.weight, model.norm.bias))
    if what == "far below":
        tuner._loop.tangents.frozen.called = False
        pred = nn.functional.linear(h, model.last.weight, model.last.bias)
    else:
        h = h.detach().requires_grad_()
        model.norm.requires_grad_(False)
        with torch.no_grad():
            model(x)  # a call, but not this one
        pred = model.last(nn.functional.linear(h, model.norm.weight))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(NotImplementedError, match=r"frozen in mid-run.*norm\.weight.*model\(\.\.\.\)"):
        tuner.backward(((pred - y) ** 2).mean())
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert opt is not None


def test_resumed_after_the_freeze_it_goes_on() -> None:
    ends = []
    for stop in (None, 5, 7):
        model, opt = maker("mlp", "adamw")()
        tuner = as_given(model, opt, validation(model), every=3)
        for t, batch in enumerate(data()[0]):
            if t == stop:
                states = copy.deepcopy([x.state_dict() for x in (model, opt, tuner)])
                tuner.close()
                model, opt = maker("mlp", "adamw")()
                tuner = as_given(model, opt, validation(model), every=3)
                for x, state in zip((model, opt, tuner), states, strict=True):
                    x.load_state_dict(state)
            model.first.requires_grad_(t < 4)
            opt.zero_grad()
            tuner.backward(mse(model, batch))
            opt.step()
        ends.append([*model.parameters(), *tuner.values.values()])
    assert all(torch.equal(a, b) for end in ends[1:] for a, b in zip(ends[0], end, strict=True))


@pytest.mark.parametrize("mode", ["forward", "unrolled"])
def test_whole_steps_with_a_layer_frozen(mode: str) -> None:
    """A window of replayed steps begins anew where what is trained changes."""

    def ends_at(change: Callable[[Any], None], first: int) -> Any:
        model, opt = maker("mlp", "sgd")()
        tuner = None
        options = {"every": 4, "horizon": 4, "average": False, "loss": mse, "mode": mode, "hyper_lr": 1e-12}
        if first < 0:
            tuner = as_given(model, opt, validation(model), **options)
        for t, batch in enumerate(data()[0][:10] if mode == "unrolled" else data()[0][:8]):
            if t == 6:
                model.first.requires_grad_(False)
            if t == first:
                change(opt)
            if tuner is not None:
                tuner.step(batch)
                continue
            opt.zero_grad()
            mse(model, batch).backward()
            opt.step()
        return tuner or validation(model)().item()

    begins = 6 if mode == "unrolled" else 0
    found = ends_at(lambda _: None, -1).hypergradients
    for name in ("lr", "weight_decay"):
        for i in range(2):

            def at(x: float, name: str = name, i: int = i) -> float:
                return ends_at(lambda opt: opt.param_groups[i].update({name: opt.param_groups[i][name] + x}), begins)

            assert float(found[name][i]) == pytest.approx(slope(at), rel=FD_RTOL, abs=1e-9), (name, i)
