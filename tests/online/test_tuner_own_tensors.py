"""Tensors and nets of the user's own that a tuner tunes: however losses read them, and what nothing reads.

Expected values: central differences of the same loop with torch alone, in which the user's own tensor is moved.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hypergrad
from hypergrad import Hyperparameter
from tests.online.live_loops import FD_RTOL, STEPS, as_given, data, float64, mse, sgd, slope, two_layers
from tests.tiers import slow_but

__all__ = ["float64"]  # the fixture

Held = Callable[[Tensor], Any]


class Mixed:
    """Two losses mixed by the user's own alpha [2], which the validation loss reads too; and a net that weighs examples."""

    def __init__(self, shift: float = 0.0, i: int = 0):
        self.model = two_layers()
        self.alpha = torch.tensor([0.3, -0.2])
        self.alpha[i] += shift
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(5, 1), nn.Sigmoid())
        self.opt = sgd(momentum=0.8)(self.model)

    def mixed(self, batch: tuple[Tensor, Tensor], alpha: Tensor) -> Tensor:
        x, y = batch
        out = self.model(x)
        each = torch.stack([(self.net(x) * (out - y) ** 2).mean(), (out - y).abs().pow(1.5).mean()])
        return alpha.softmax(0) @ each

    def val_loss(self) -> Tensor:
        torch.manual_seed(11)
        return self.mixed(data()[1], self.alpha)

    def run(self, backward: Callable[[Tensor], None], alpha: Callable[[], Tensor]) -> None:
        torch.manual_seed(7)
        for batch in data()[0]:
            self.opt.zero_grad()
            backward(self.mixed(batch, alpha()))
            self.opt.step()


def stock(shift: float, i: int) -> float:
    loop = Mixed(shift, i)
    loop.run(Tensor.backward, lambda: loop.alpha)
    return loop.val_loss().item()


@cache
def want(i: int) -> float:
    return slope(lambda x: stock(x, i))


HELD: dict[str, Held] = {
    "a tensor": lambda x: x,
    "a parameter": nn.Parameter,
    "a Hyperparameter": Hyperparameter,
    "one with bounds": lambda x: Hyperparameter(x, bounds=(-5.0, 5.0)),
}


@pytest.mark.parametrize("read", ["closure", "tuner.hypers"])
@pytest.mark.parametrize("held", HELD)
def test_backward(held: str, read: str) -> None:
    loop = Mixed()
    given = HELD[held](loop.alpha)
    loop.alpha = given.start if isinstance(given, Hyperparameter) else given
    before, flag = loop.alpha.detach().clone(), loop.alpha.requires_grad
    tuner = as_given(loop.model, loop.opt, loop.val_loss, tune=(), hypers={"alpha": given}, every=STEPS, average=False)
    loop.run(tuner.backward, (lambda: loop.alpha) if read == "closure" else (lambda: tuner.hypers["alpha"]))
    for i, got in enumerate(tuner.hypergradients["alpha"].tolist()):
        assert got == pytest.approx(want(i), rel=FD_RTOL)
    assert not torch.equal(loop.alpha.detach(), before)  # it is the one that moves
    assert torch.equal(tuner.values["alpha"], loop.alpha.detach())
    tuner.close()
    assert loop.alpha.requires_grad == flag
    assert loop.alpha.grad is None


@pytest.mark.parametrize("read", ["closure", "argument"])
@pytest.mark.parametrize("mode", ["unrolled", "forward"])
def test_step(mode: str, read: str) -> None:
    """A window of `horizon` steps is the whole run here."""
    loop = Mixed()
    by: dict[str, Callable[..., Tensor]] = {
        "closure": lambda model, batch: loop.mixed(batch, loop.alpha),
        "argument": lambda model, batch, hypers: loop.mixed(batch, hypers["alpha"]),
    }
    tuner = as_given(
        loop.model, loop.opt, loop.val_loss, tune=(), hypers={"alpha": loop.alpha}, loss=by[read], mode=mode,
        horizon=STEPS, every=STEPS, average=False,
    )  # fmt: skip
    torch.manual_seed(7)
    for batch in data()[0]:
        tuner.step(batch)
    for i, got in enumerate(tuner.hypergradients["alpha"].tolist()):
        assert got == pytest.approx(want(i), rel=FD_RTOL)


def test_series_has_the_direct_term() -> None:
    """mode="implicit": the direct term alone differs where val_loss cuts it."""
    found = []
    for cut in (False, True):
        loop = Mixed()
        model = loop.model

        def val_loss(loop: Mixed = loop, cut: bool = cut) -> Tensor:
            torch.manual_seed(11)
            return loop.mixed(data()[1], loop.alpha.detach() if cut else loop.alpha)

        tuner = as_given(
            model, loop.opt, val_loss, tune=(), hypers={"alpha": loop.alpha}, mode="implicit", horizon=3, every=4,
            loss=lambda model, batch, loop=loop: loop.mixed(batch, loop.alpha), hyper_lr=1e-9,
        )  # fmt: skip
        torch.manual_seed(7)
        for batch in data()[0][:5]:
            tuner.step(batch)
        found.append(tuner.hypergradients["alpha"])
    assert not torch.allclose(found[0], found[1], rtol=0.05)


def test_a_val_loss_that_reads_the_tuner() -> None:
    loop = Mixed()

    def val_loss() -> Tensor:
        torch.manual_seed(11)
        return loop.mixed(data()[1], tuner.hypers["alpha"])

    tuner = as_given(
        loop.model, loop.opt, val_loss, tune=(), hypers={"alpha": torch.tensor([0.3, -0.2])}, every=STEPS, average=False
    )
    loop.run(tuner.backward, lambda: tuner.hypers["alpha"])
    for i, got in enumerate(tuner.hypergradients["alpha"].tolist()):
        assert got == pytest.approx(want(i), rel=FD_RTOL)


@pytest.mark.parametrize("given", ["the net", "its parameters by name"])
@pytest.mark.parametrize("by", ["backward", "step"])
def test_a_net_that_the_loss_calls(by: str, given: str) -> None:
    def stock_net(x: float, name: str, j: int) -> float:
        loop = Mixed()
        with torch.no_grad():
            dict(loop.net.named_parameters())[name].view(-1)[j] += x
        loop.run(Tensor.backward, lambda: loop.alpha)
        return loop.val_loss().item()

    loop = Mixed()
    names = dict(loop.net.named_parameters())
    hypers, prefix = ({"net": loop.net}, "net.") if given == "the net" else (names, "")
    mode = {"mode": "unrolled", "horizon": STEPS} if by == "step" else {"every": STEPS}
    tuner = as_given(
        loop.model, loop.opt, loop.val_loss, tune=(), hypers=hypers, average=False,
        loss=lambda model, batch: loop.mixed(batch, loop.alpha), **mode,
    )  # fmt: skip
    before = [p.detach().clone() for p in loop.net.parameters()]
    if by == "backward":
        loop.run(tuner.backward, lambda: loop.alpha)
    else:
        torch.manual_seed(7)
        for batch in data()[0]:
            tuner.step(batch)
    for name, p in names.items():
        for j in range(p.numel()):
            wanted = slope(lambda x, name=name, j=j: stock_net(x, name, j))
            assert float(tuner.hypergradients[prefix + name].view(-1)[j]) == pytest.approx(
                wanted, rel=FD_RTOL, abs=1e-10
            )
    assert all(not torch.equal(a, b) for a, b in zip(before, loop.net.parameters(), strict=True))


# ---- what nothing reads


def unread(name: str, loop: Mixed) -> dict[str, Any]:
    return {
        "copies of a net's parameters": {k: p.detach().clone() for k, p in loop.net.named_parameters()},
        "a number": {"c": 0.1},
        "a copy of a tensor, beside one that is read": {"alpha": loop.alpha, "other": loop.alpha.clone()},
    }[name]


@pytest.mark.parametrize("by", ["backward", "unrolled", "implicit", "forward"])
@pytest.mark.parametrize(
    "name", ["copies of a net's parameters", "a number", "a copy of a tensor, beside one that is read"]
)
def test_what_nothing_reads_is_an_error_at_the_first_step(name: str, by: str) -> None:
    loop = Mixed()
    tuner = as_given(
        loop.model, loop.opt, loop.val_loss, tune=("lr",), hypers=unread(name, loop),
        loss=lambda model, batch: loop.mixed(batch, loop.alpha), mode=None if by == "backward" else by,
    )  # fmt: skip
    before = [p.detach().clone() for p in loop.model.parameters()]
    run = {"backward": lambda: loop.run(tuner.backward, lambda: loop.alpha)}.get(by, lambda: tuner.step(data()[0][0]))
    with pytest.raises(ValueError, match=r"nothing reads hypers.*the very tensor that was passed"):
        run()
    assert all(torch.equal(a, b) for a, b in zip(before, loop.model.parameters(), strict=True))
    assert tuner.stats["hessian_products"] <= 2


def test_one_that_val_loss_alone_reads_is_tuned() -> None:
    """As is a temperature of the validation loss: dL/dT is its direct term."""
    loop, temperature = Mixed(), torch.tensor(1.5)
    tuner = as_given(
        loop.model, loop.opt, lambda: mse(loop.model, data()[1]) * temperature, tune=(), hypers={"temperature": temperature},
        every=STEPS, average=False,
    )  # fmt: skip
    loop.run(tuner.backward, lambda: loop.alpha)
    assert float(tuner.hypergradients["temperature"]) == pytest.approx(tuner.val_loss / 1.5, rel=1e-9)


def test_two_optimizers_one_of_whose_losses_reads_it() -> None:
    loop = Mixed()
    other = nn.Linear(5, 1)
    opts = [loop.opt, torch.optim.SGD(other.parameters(), lr=0.01)]
    both = nn.ModuleList([loop.model, other])
    policies = hypergrad.policies.without(hypergrad.policies.DEFAULT, hypergrad.policies.DivergenceGuard)
    tuner = as_given(both, opts, loop.val_loss, tune=(), hypers={"alpha": loop.alpha}, every=STEPS, policies=policies)
    torch.manual_seed(7)
    for batch in data()[0]:
        opts[1].zero_grad()
        tuner.backward(mse(other, batch))
        opts[1].step()
        opts[0].zero_grad()
        tuner.backward(loop.mixed(batch, loop.alpha))
        opts[0].step()
    assert tuner.stats["hyper_steps"] == 1


# ---- kinds and ranges


FREE = {"alpha": sgd(), "eps": sgd(), "rho": sgd(), "d": sgd(), "betas": sgd(), "lr_decay": sgd(), "beta2_decay": sgd(),
        "momentum": lambda model: torch.optim.Adagrad(model.parameters(), lr=0.05, weight_decay=0.01)}  # fmt: skip


@pytest.mark.parametrize("total", [None, STEPS])
@pytest.mark.parametrize("name", slow_but(FREE, "alpha", "betas", "momentum"))
def test_a_tensor_of_the_loss_is_free_whatever_its_name(name: str, total: int | None) -> None:
    """It moves as one called otherwise, below 0 and above 1 too, at the same steps, from the same weights."""
    paths = []
    for called in (name, "something else"):
        loop = Mixed()
        loop.opt = FREE[name](loop.model)
        assert called not in loop.opt.param_groups[0]
        tuner = as_given(
            loop.model, loop.opt, loop.val_loss, tune=("weight_decay",), hypers={called: loop.alpha}, every=2, hyper_lr=0.5,
            total_steps=total,
        )  # fmt: skip
        path: list[list[float]] = []

        def backward(loss: Tensor, loop: Mixed = loop, path: Any = path, tuner: Any = tuner) -> None:
            tuner.backward(loss)
            path.append(loop.alpha.tolist())

        loop.run(backward, lambda loop=loop: loop.alpha)
        assert [kind.kind for kind in tuner._vector.kinds[-2:]] == ["free", "free"]
        paths.append(path)
    assert paths[0] == paths[1]
    assert paths[0][0] != paths[0][-1]


def test_kind_and_bounds_that_are_told() -> None:
    loop, eps = Mixed(), torch.tensor(0.1)
    tuner = as_given(
        loop.model, loop.opt, loop.val_loss, tune=("lr",), hypers={"eps": Hyperparameter(eps, (1e-3, 1.0), "positive")}
    )
    assert tuner._vector.kinds[-1].kind == "positive"


# ---- many numbers


def many(**options: Any) -> hypergrad.Tuner:
    """One number more than forward mode takes unasked."""
    loop = Mixed()
    return as_given(loop.model, loop.opt, loop.val_loss, hypers={"w": torch.zeros(15)}, tune=("lr",), **options)


def test_many_numbers_in_forward_mode_unasked() -> None:
    with pytest.raises(ValueError, match=r"17 numbers.*mode='unrolled'.*tuner\.step.*mode='forward'"):
        many()
    assert len(many(mode="forward")._vector) == 17
    assert len(many(mode="unrolled", loss=mse)._vector) == 17
    model = nn.ModuleList([nn.Linear(1, 1) for _ in range(9)])
    groups = [{"params": list(m.parameters()), "weight_decay": 0.1} for m in model]
    with pytest.raises(ValueError, match="18 numbers"):
        hypergrad.Tuner(model, torch.optim.SGD(groups, lr=0.1), lambda: sum(m(torch.ones(1)).sum() for m in model))
    loop = Mixed()
    assert len(as_given(loop.model, loop.opt, loop.val_loss, hypers={"w": torch.zeros(14)}, tune=("lr",))._vector) == 16


def test_a_tensor_is_as_it_was_after_an_error() -> None:
    loop, w = Mixed(), torch.zeros(20)
    with pytest.raises(ValueError, match="22 numbers"):
        as_given(loop.model, loop.opt, loop.val_loss, hypers={"w": w}, tune=("lr",))
    assert not w.requires_grad
    assert not loop.opt._optimizer_step_pre_hooks


def test_a_run_that_goes_on_from_a_state() -> None:
    """The state is written into the user's own tensor, and the run goes on bit for bit."""

    def part(loop: Mixed, tuner: hypergrad.Tuner, batches: slice) -> None:
        for batch in data()[0][batches]:
            loop.opt.zero_grad()
            tuner.backward(loop.mixed(batch, loop.alpha))
            loop.opt.step()

    def made() -> tuple[Mixed, hypergrad.Tuner]:
        loop = Mixed()
        loop.model.eval()
        return loop, as_given(loop.model, loop.opt, loop.val_loss, tune=("lr",), hypers={"alpha": loop.alpha}, every=2)

    whole, first = made()
    part(whole, first, slice(0, 6))
    state = copy.deepcopy([whole.model.state_dict(), whole.opt.state_dict(), first.state_dict()])
    again, second = made()
    again.model.load_state_dict(state[0])
    again.opt.load_state_dict(state[1])
    second.load_state_dict(state[2])
    assert torch.equal(again.alpha, whole.alpha)
    part(whole, first, slice(6, 12))
    part(again, second, slice(6, 12))
    assert torch.equal(again.alpha, whole.alpha)
    assert torch.equal(again.model[0].weight, whole.model[0].weight)


def test_a_part_of_the_model_that_the_optimizer_does_not_train() -> None:
    """A head as hyperparameters of the rest: it moves, and its running statistics are the model's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    opt = torch.optim.SGD(model[0].parameters(), lr=0.05)
    head = nn.Sequential(model[1], model[2])
    tuner = as_given(
        model, opt, lambda: mse(model, data()[1]), tune=(), hypers={"head": head}, loss=mse, mode="unrolled", horizon=4
    )
    before = model[2].weight.detach().clone()
    for batch in data()[0]:
        tuner.step(batch)
    assert tuner.stats["hyper_steps"] == 3
    assert not torch.equal(model[2].weight.detach(), before)
