"""Optimizers without a rule: their own step, replayed and differentiated, against finite differences of the stock loop."""

from __future__ import annotations

import copy
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hypergrad
from hypergrad.optimizers import binding
from hypergrad.optimizers.transition import Transition
from tests.cases import OPTIMIZERS, Case, Row
from tests.optimizers.third_party import THIRD_PARTY, Foreign
from tests.oracle import assert_matches, assert_same, hypergradient
from tests.tiers import slow_but

STEPS = 20
_NUMBERS = {"lr": 0.02, "weight_decay": 0.02}
_ADAM = _NUMBERS | {"betas": (0.8, 0.9), "eps": 1e-2}
_SECOND = {"lr": 0.03}
_DECAYED = ("lr", "weight_decay")
_OF_ADAM = (*_DECAYED, "betas", "eps")
TORCH: dict[str, Row] = {
    "Adadelta": Row(torch.optim.Adadelta, {"lr": 0.5, "weight_decay": 0.02, "eps": 1e-2}, {"lr": 0.3}, (*_DECAYED, "rho", "eps")),
    "Adagrad": Row(torch.optim.Adagrad, {**_NUMBERS, "lr_decay": 0.1, "eps": 1e-2}, _SECOND, (*_DECAYED, "lr_decay", "eps")),
    "Adafactor": Row(torch.optim.Adafactor, {**_NUMBERS}, _SECOND, _DECAYED),
    "Adamax": Row(torch.optim.Adamax, _ADAM, _SECOND, _OF_ADAM),
    "ASGD": Row(torch.optim.ASGD, {"lr": 0.2, "weight_decay": 0.02, "t0": 2.0}, {"lr": 0.1}, (*_DECAYED, "lambd", "alpha")),
    "NAdam": Row(torch.optim.NAdam, _ADAM, _SECOND, (*_OF_ADAM, "momentum_decay")),
    "RAdam": Row(torch.optim.RAdam, _ADAM, _SECOND, _OF_ADAM),
    "Rprop": Row(torch.optim.Rprop, {"lr": 0.02}, _SECOND, ("lr",)),
}  # fmt: skip


@pytest.fixture
def no_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every optimizer goes to the fallback."""
    monkeypatch.setattr(binding, "rule_of", lambda optimizer: None)


@pytest.fixture
def double() -> None:
    """torch.optim keeps some numbers in the default dtype; conftest puts it back."""
    torch.set_default_dtype(torch.float64)


@dataclass(frozen=True)
class ForeignCase(Case):
    """A case whose optimizer is no row of the case table."""

    @property
    def row(self) -> Any:
        return TORCH[self.optimizer] if self.optimizer in TORCH else THIRD_PARTY[self.optimizer]

    def arithmetic(self) -> AbstractContextManager[Any]:
        return nullcontext()


def made(name: str) -> ForeignCase:
    if name not in THIRD_PARTY:
        return ForeignCase("mlp", name)
    THIRD_PARTY[name].skip_if_absent()
    return ForeignCase(THIRD_PARTY[name].problem, name)


@pytest.mark.slow
@pytest.mark.usefixtures("no_rules", "double")
@pytest.mark.parametrize("name", [*TORCH, *THIRD_PARTY])
def test_hypergradients_are_finite_differences_of_the_stock_loop(name: str) -> None:
    case = made(name)
    forward = hypergradient(case, mode="forward")
    assert_matches(forward, case)
    unrolled = hypergradient(case, mode="unrolled")
    assert_matches(unrolled, case)
    for key, x in forward.gradients.items():
        gap = (x - unrolled.gradients[key]).abs().max()
        assert gap <= 1e-9 * x.abs().max() + 1e-15


@pytest.mark.usefixtures("no_rules", "double")
@pytest.mark.parametrize(
    "name",
    slow_but(
        ["nesterov", "dampening", "adam_amsgrad", "adamw_at_zero", "centered_momentum"], "nesterov", "adamw_at_zero"
    ),
)
def test_is_the_rule_where_there_is_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("mlp_live", name)
    ours = [hypergradient(case, mode=mode) for mode in ("forward", "unrolled")]
    monkeypatch.undo()
    rule = hypergradient(case, mode="unrolled")
    for result in ours:
        assert_same(result, rule)


# ---- replay


def parameters() -> list[Tensor]:
    return [torch.randn(shape).requires_grad_() for shape in ((4, 3), (5,), (2, 4), (3,))]


@pytest.mark.slow
@pytest.mark.usefixtures("no_rules")
@pytest.mark.parametrize("name", [*TORCH, *THIRD_PARTY])
def test_a_replayed_step_is_the_stock_step(name: str) -> None:
    """Bit for bit, state and all, in float32; and a state that is written back is the state that was read."""
    row, params = made(name).row, parameters()
    optimizer = row.make([params[:2], params[2:]])
    transition = Transition([optimizer], frozenset())
    first = state = transition.read()
    for t in range(STEPS):
        grads = [torch.randn_like(p) if (t + i) % 5 else None for i, p in enumerate(params)]
        for p, g in zip(params, grads, strict=True):
            p.grad = None if g is None else g.clone()
        active = tuple(g is not None for g in grads)
        state = transition.step(state, transition.flatten(grads), active, transition.values())
        optimizer.step()
        assert state.equals(transition.read()), t
    transition.write(first)
    assert first.equals(transition.read())
    transition.write(state)
    assert state.equals(transition.read())


# ---- refusals


class Broken(torch.optim.Optimizer):
    """Gradient descent whose learning rate may lose its graph on the way, or its momentum, or the parameters."""

    def __init__(self, params: Any, lose: str, lr: float = 0.1, momentum: float = 0.9, weight_decay: float = 0.1):
        self.lose = lose
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            lr, wd = group["lr"], group["weight_decay"]
            lr = float(lr) if self.lose == "lr" else lr
            wd = float(np.sqrt(wd)) ** 2 if self.lose == "weight_decay" else wd
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                old = state.get("buffer", torch.zeros_like(p))
                if self.lose == "buffer":
                    old = torch.tensor(old.tolist()).to(p)
                grad = torch.from_numpy(p.grad.numpy().copy()) if self.lose == "gradients" else p.grad
                decay = p * float(p.norm()) if self.lose == "parameters" else p * p.norm()
                state["buffer"] = group["momentum"] * old + grad + wd * decay
                p.add_(state["buffer"], alpha=-lr)


LOST = {
    "lr": "the parameters on hyperparameter `lr` is lost",
    "weight_decay": "on hyperparameter `weight_decay` is lost",
    "buffer": "on its own `buffer` is lost",
    "gradients": "on the gradients is lost",
    "parameters": "on the parameters is lost",
}


def problem(optimizer: Any) -> tuple[nn.Module, torch.optim.Optimizer, dict[str, Any]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    batches = [(torch.randn(8, 4), torch.randn(8, 2)) for _ in range(4)]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return ((model(batch[0]) - batch[1]) ** 2).mean()

    return (
        model,
        optimizer(model.parameters()),
        {"loss": loss, "batches": batches, "val_loss": lambda: loss(model, batches[0])},
    )


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    return copy.deepcopy(
        (model.state_dict(), [p.grad for p in model.parameters()], optimizer.state_dict(), optimizer.defaults)
    )


def assert_unchanged(before: Any, now: Any) -> None:
    if isinstance(before, Tensor):
        assert torch.equal(before, now)
    elif isinstance(before, dict):
        assert before.keys() == now.keys()
        for key, x in before.items():
            assert_unchanged(x, now[key])
    elif isinstance(before, (list, tuple)):
        assert len(before) == len(now)
        for a, b in zip(before, now, strict=True):
            assert_unchanged(a, b)
    else:
        assert before == now


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["forward", "unrolled"])
@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("lose", LOST)
def test_a_lost_channel_is_refused_by_name(lose: str, stepped: bool, mode: str) -> None:
    model, optimizer, arguments = problem(lambda p: Broken(p, lose))
    if stepped:
        arguments["loss"](model, arguments["batches"][0]).backward()
        optimizer.step()
    before, rng, sqrt = everything(model, optimizer), torch.get_rng_state(), math.sqrt
    with pytest.raises(NotImplementedError, match=f"Broken has no update rule here, .*{LOST[lose]}"):
        hypergrad.hypergradient(model, optimizer, wrt=("lr", "weight_decay", "momentum"), mode=mode, **arguments)
    with pytest.raises(NotImplementedError, match=LOST[lose]):
        hypergrad.Tuner(model, optimizer, arguments["val_loss"], tune=("lr", "weight_decay", "momentum"))
    assert_unchanged(before, everything(model, optimizer))
    assert torch.equal(rng, torch.get_rng_state())
    assert torch.get_default_dtype() == torch.float32
    assert math.sqrt is sqrt


def test_the_same_optimizer_is_right_where_nothing_is_lost() -> None:
    model, optimizer, arguments = problem(lambda p: Broken(p, "nothing"))
    before = everything(model, optimizer)
    assert hypergrad.check(model, optimizer, wrt=("lr", "weight_decay", "momentum"), **arguments)
    hypergrad.hypergradient(model, optimizer, wrt="lr", mode="forward", **arguments)
    assert_unchanged(before, everything(model, optimizer))


class NeedsClosure(Broken):
    def step(self, closure: Any) -> None:  # type: ignore[override]
        closure()


class InTwoModes(Broken):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        raise Exception("call optimizer.train() first")


class WritesLr(Broken):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        for group in self.param_groups:
            group["lr"] = group["lr"] * 0.9


class Around(Broken):
    def __init__(self, params: Any, lose: str):
        super().__init__(params, lose)
        self.inner = torch.optim.SGD(self.param_groups)


REFUSED = {
    "a closure": (NeedsClosure, "calls a closure within its step.*AdamW"),
    "eval mode": (InTwoModes, r"call optimizer.train\(\) first"),
    "a name that a step writes to": (WritesLr, "`lr` is state rather than a hyperparameter"),
    "an optimizer in it": (Around, "it holds a SGD .*give the inner optimizer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_replayed_is_refused(name: str) -> None:
    cls, match = REFUSED[name]
    model, optimizer, arguments = problem(lambda p: cls(p, "nothing"))
    before = everything(model, optimizer)
    with pytest.raises(NotImplementedError, match=match):
        hypergrad.hypergradient(model, optimizer, wrt="lr", **arguments)
    assert_unchanged(before, everything(model, optimizer))


def test_what_the_constructor_alone_reads_is_refused() -> None:
    class Mine(torch.optim.Adagrad):
        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            return super().step(closure)

    model, optimizer, arguments = problem(Mine)
    with pytest.raises(NotImplementedError, match=r"Mine has no update rule here.*constructor"):
        hypergrad.hypergradient(model, optimizer, wrt=("lr", "initial_accumulator_value"), **arguments)


def test_a_momentum_that_begins_at_zero_is_refused() -> None:
    class Buffered(Broken):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    d = p.grad
                    if group["momentum"] != 0:
                        d = self.state[p]["b"] = group["momentum"] * self.state[p].get("b", 0) + p.grad
                    p.sub_(d, alpha=group["lr"])

    model, optimizer, arguments = problem(lambda p: Buffered(p, "", momentum=0.0))
    with pytest.raises(NotImplementedError, match=r"whether a hyperparameter is 0.*start it at a value above 0"):
        hypergrad.hypergradient(model, optimizer, wrt=("lr", "momentum"), **arguments)
    assert hypergrad.check(model, optimizer, wrt=("lr",), **arguments)


# ---- beside other things


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("first", [False, True])
def test_beside_an_optimizer_with_a_rule(first: bool) -> None:
    """Two optimizers, one with a rule: the result is that of the two rules."""

    def both(cls: Any, **kw: Any) -> Any:
        def make(params: Any) -> list[torch.optim.Optimizer]:
            params = list(params)
            one = [torch.optim.AdamW(params[:2], lr=0.01, eps=1e-2)]
            other = [cls(params[2:], lr=0.1, momentum=0.9, weight_decay=0.1, **kw)]
            return other + one if first else one + other

        return make

    class Mine(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            return super().step(closure)

    for mode in ("forward", "unrolled"):
        results = []
        for cls in (Mine, torch.optim.SGD):
            model, optimizer, arguments = problem(both(cls))
            wrt = ("lr", "weight_decay", "betas", "momentum")
            results.append(hypergrad.hypergradient(model, optimizer, wrt=wrt, mode=mode, clip_norm=0.5, **arguments))
        assert_same(*results)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("first", [False, True])
def test_beside_rules_whose_slots_have_shapes_of_their_own(first: bool) -> None:
    """One optimizer takes its own step and keeps a tensor of a name that the rule of the other one has too."""

    class Mine(torch.optim.Adamax):
        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            return super().step(closure)

    def beside(cls: Any, other: Any) -> Any:
        def make(params: Any) -> list[torch.optim.Optimizer]:
            params = list(params)
            mine = cls(params[1:3], lr=0.01, eps=1e-2, weight_decay=0.1)
            return [mine, other([params[0], params[3]])] if first else [other([params[0], params[3]]), mine]

        return make

    others = (lambda p: torch.optim.NAdam(p, lr=0.01, eps=1e-2), lambda p: torch.optim.Adafactor(p, lr=0.05))
    for other in others:
        for mode in ("forward", "unrolled"):
            results = []
            for cls in (Mine, torch.optim.Adamax):
                model, optimizer, arguments = problem(beside(cls, other))
                wrt = ("lr", "weight_decay")
                results.append(hypergrad.hypergradient(model, optimizer, wrt=wrt, mode=mode, **arguments))
            assert_same(*results)


class Own(torch.optim.AdamW):
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return super().step(closure)


def online(cls: Any, **kw: Any) -> tuple[nn.Module, hypergrad.Tuner]:
    model, optimizer, arguments = problem(lambda p: cls(p, lr=0.01, weight_decay=0.1))
    tuner = hypergrad.Tuner(model, optimizer, arguments["val_loss"], every=4, warm_start=False, average=False, **kw)
    for _ in range(3):
        for batch in arguments["batches"]:
            loss = arguments["loss"](model, batch)
            optimizer.zero_grad()
            tuner.backward(loss)
            optimizer.step()
    return model, tuner


@pytest.mark.usefixtures("double")
def test_a_tuner_rides_on_it() -> None:
    """The same values as on the optimizer with a rule."""
    model, tuner = online(Own)
    same, with_rule = online(torch.optim.AdamW)
    assert tuner.stats["hyper_steps"] == 3
    assert not torch.equal(tuner.values["lr"], torch.tensor([0.01]))
    for name, x in tuner.values.items():
        torch.testing.assert_close(x, with_rule.values[name], rtol=1e-9, atol=0)
        torch.testing.assert_close(tuner.hypergradients[name], with_rule.hypergradients[name], rtol=1e-9, atol=0)
    for p, q in zip(model.parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_a_frozen_tuner_trains_as_the_loop_without_it() -> None:
    model, optimizer, arguments = problem(lambda p: Own(p, lr=0.01))
    twin, stock, _ = problem(lambda p: Own(p, lr=0.01))
    tuner = hypergrad.Tuner(model, optimizer, arguments["val_loss"], tune=("lr",), every=2)
    tuner.freeze()
    for batch in arguments["batches"]:
        for m, opt, backward in ((model, optimizer, tuner.backward), (twin, stock, Tensor.backward)):
            loss = arguments["loss"](m, batch)
            opt.zero_grad()
            backward(loss)
            opt.step()
    assert_unchanged(everything(twin, stock), everything(model, optimizer))


def test_rows_are_not_named_as_rows_of_the_case_table() -> None:
    assert len([row for row in THIRD_PARTY.values() if row.package == "pytorch_optimizer"]) >= 12
    assert all(isinstance(row, Foreign) for row in THIRD_PARTY.values())
    assert not THIRD_PARTY.keys() & OPTIMIZERS.keys()
