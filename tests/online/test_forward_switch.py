"""Compiled models and fused attention have no second derivative: the plain form runs where a product is due."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

import hypergrad
from hypergrad.core.survey import nodes_of
from tests.online.live_loops import FD_RTOL, as_given, float64, slope
from tests.tiers import slow_but

__all__ = ["float64"]  # the fixture
STEPS = 5
BACKEND = "aot_eager"  # compiles as inductor does, without a C++ compiler


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside, self.out = nn.Linear(4, 12), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inside(x).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])).mean((1, 2))


class Child(nn.Module):
    """A net whose first layers are compiled."""

    def __init__(self, compiled: bool) -> None:
        super().__init__()
        body = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
        self.body: Any = torch.compile(body, backend=BACKEND) if compiled else body
        self.out = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(x)).mean(1)


def encoder(_: bool = False) -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    return nn.Sequential(layer, nn.Linear(4, 1), nn.Flatten())


class Net(nn.Sequential):
    """`nn.Sequential(…).compile()` compiles nothing up to torch 2.11, which passes over forward passes of torch's own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def own(compiled: bool) -> nn.Module:
    net = Net(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1), nn.Flatten())
    if compiled:
        net.compile(backend=BACKEND)
    return net


def wrapped(compiled: bool) -> Any:
    return torch.compile(own(False), backend=BACKEND) if compiled else own(False)


# name -> makes the net; its argument says whether to compile it
NETS: dict[str, Callable[[bool], Any]] = {
    "scaled_dot_product_attention": lambda compiled: Attention(),
    "TransformerEncoderLayer": encoder,
    "torch.compile(model)": wrapped,
    "model.compile()": own,
    "a compiled layer": Child,
    "attention, compiled": lambda compiled: torch.compile(Attention(), backend=BACKEND) if compiled else Attention(),
}
COMPILED = [name for name in NETS if "compile" in name]
FEW = slow_but(NETS, "scaled_dot_product_attention", "TransformerEncoderLayer", "a compiled layer")


def data() -> tuple[list[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    make = lambda n: (torch.randn(n, 3, 4, generator=g), torch.randn(n, 1, generator=g))  # noqa: E731
    return [make(6) for _ in range(STEPS)], make(9)


def mse(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return ((model(batch[0]) - batch[1]) ** 2).mean()


def made(name: str, compiled: bool, lr: float = 0.05) -> tuple[Any, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = NETS[name](compiled)
    return model, torch.optim.SGD(model.parameters(), lr=lr, momentum=0.8, weight_decay=0.01)


def train(model: Any, opt: Any, backward: Callable[[Tensor], None]) -> None:
    for batch in data()[0]:
        opt.zero_grad()
        backward(mse(model, batch))
        opt.step()


@pytest.mark.parametrize("name", FEW)
def test_hypergradients_are_those_of_the_stock_loop(name: str) -> None:
    def ends_at(x: float) -> float:
        model, opt = made(name, False, 0.05 + x)
        train(model, opt, Tensor.backward)
        return mse(model, data()[1]).item()

    torch._dynamo.reset()
    model, opt = made(name, True)
    tuner = as_given(model, opt, lambda: mse(model, data()[1]), tune="lr", every=STEPS, average=False)
    train(model, opt, tuner.backward)
    assert tuner.stats["hessian_products"] == STEPS - 1
    assert tuner.hypergradients["lr"].item() == pytest.approx(slope(ends_at), rel=FD_RTOL)


CONTAINERS: dict[str, Callable[[nn.Module, nn.Module], nn.Module]] = {
    "ModuleList": lambda one, other: nn.ModuleList([one, other]),
    "ModuleDict": lambda one, other: nn.ModuleDict({"one": one, "other": other}),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_modules_given_in_a_container_that_is_never_called(name: str) -> None:
    def both(lr: float) -> tuple[nn.Sequential, torch.optim.Optimizer]:
        torch.manual_seed(0)
        net: Any = encoder()
        return net, torch.optim.SGD(net.parameters(), lr=lr, momentum=0.8)

    def loss(net: nn.Sequential, batch: tuple[Tensor, Tensor]) -> Tensor:
        return ((net[1](net[0](batch[0])).flatten(1) - batch[1]) ** 2).mean()

    def trained(net: nn.Sequential, opt: torch.optim.Optimizer, backward: Callable[[Tensor], None]) -> float:
        for batch in data()[0]:
            opt.zero_grad()
            backward(loss(net, batch))
            opt.step()
        return loss(net, data()[1]).item()

    def ends_at(x: float) -> float:
        return trained(*both(0.05 + x), Tensor.backward)

    net, opt = both(0.05)
    held = CONTAINERS[name](net[0], net[1])
    tuner = as_given(held, opt, lambda: loss(net, data()[1]), tune="lr", every=STEPS, average=False)
    trained(net, opt, tuner.backward)
    assert tuner.stats["hessian_products"] == STEPS - 1
    assert tuner.hypergradients["lr"].item() == pytest.approx(slope(ends_at), rel=FD_RTOL)


@pytest.mark.parametrize("name", NETS)
def test_whole_runs_and_replayed_windows_too(name: str) -> None:
    def ends_at(x: float) -> float:
        model, opt = made(name, False, 0.05 + x)
        train(model, opt, Tensor.backward)
        return mse(model, data()[1]).item()

    torch._dynamo.reset()
    want = slope(ends_at)
    model, opt = made(name, True)
    result = hypergrad.hypergradient(model, opt, mse, data()[0], lambda: mse(model, data()[1]), wrt=("lr",))
    assert result.gradients["lr"].item() == pytest.approx(want, rel=FD_RTOL)
    tuner = as_given(
        model, opt, lambda: mse(model, data()[1]), tune="lr", loss=mse, mode="unrolled", horizon=STEPS, every=STEPS
    )
    for batch in data()[0]:
        tuner.step(batch)
    assert tuner.hypergradients["lr"].item() == pytest.approx(want, rel=FD_RTOL)


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.slow
def test_the_compiled_form_runs_where_no_product_is_due_and_is_compiled_once(name: str) -> None:
    torch._dynamo.reset()
    counters.clear()
    model, opt = made(name, True)
    tuner = as_given(
        model,
        opt,
        lambda: mse(model, data()[1]),
        tune={"lr": None},
        every=2,
        total_steps=40,
        average=False,
        keep_best=False,
    )
    graphs, ran_compiled, formed = [], [], []
    for t in range(40):
        opt.zero_grad()
        loss = mse(model, data()[0][t % STEPS])
        ran_compiled.append(any(node.name() == "CompiledFunctionBackward" for node in nodes_of(loss.grad_fn)))
        before = tuner.stats["hessian_products"]
        tuner.backward(loss)
        opt.step()
        formed.append(tuner.stats["hessian_products"] > before)
        graphs.append(counters["stats"]["unique_graphs"])
    assert ran_compiled == [not product for product in formed]
    assert sum(formed) > 10 and not any(formed[-4:])  # from 90 % on nothing is tuned
    assert graphs[-1] - graphs[2] <= 1  # the validation batch, of another shape, where it is read without a product


@pytest.mark.parametrize("name", NETS)
@pytest.mark.slow
def test_close_leaves_the_model_as_it_was(name: str) -> None:
    torch._dynamo.reset()
    model, opt = made(name, True)
    call = getattr(model, "_compiled_call_impl", None)
    tuner = as_given(model, opt, lambda: mse(model, data()[1]), tune="lr", every=STEPS)
    train(model, opt, tuner.backward)
    tuner.close()
    assert not model._forward_pre_hooks and not model._forward_hooks
    assert getattr(model, "_compiled_call_impl", None) is call


@pytest.mark.parametrize("name", ["scaled_dot_product_attention", "TransformerEncoderLayer"])
def test_copies_and_pickles_of_the_model_have_nothing_of_the_tuner(name: str) -> None:
    model, opt = made(name, False)
    tuner = as_given(model, opt, lambda: mse(model, data()[1]), tune="lr", every=STEPS)
    train(model, opt, tuner.backward)
    file = io.BytesIO()
    torch.save(model, file)
    size = len(file.getvalue())
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        kernels = [node.name() for node in nodes_of(mse(twin, data()[0][0]).grad_fn)]
        assert any("ScaledDotProduct" in kernel for kernel in kernels)  # the user's own form
        assert mse(twin, data()[1]).item() == pytest.approx(mse(model, data()[1]).item(), rel=1e-12)
    tuner.close()
    file = io.BytesIO()
    torch.save(model, file)
    assert size < len(file.getvalue()) + 2000  # hooks, no tuner


@pytest.mark.parametrize("name", slow_but(["torch.compile(model)", "model.compile()"], "torch.compile(model)"))
def test_a_layer_of_a_compiled_model_is_frozen_in_mid_run(name: str) -> None:
    def frozen_for_a_while(model: Any, opt: torch.optim.Optimizer, backward: Callable[[Tensor], None]) -> None:
        first = getattr(model, "_orig_mod", model)[0]
        for t, batch in enumerate(data()[0]):
            if t in (2, 4):
                first.requires_grad_(t == 4)
            opt.zero_grad()
            backward(mse(model, batch))
            opt.step()

    def ends_at(x: float) -> float:
        model, opt = made(name, False, 0.05 + x)
        frozen_for_a_while(model, opt, Tensor.backward)
        return mse(model, data()[1]).item()

    torch._dynamo.reset()
    model, opt = made(name, True)
    tuner = as_given(model, opt, lambda: mse(model, data()[1]), tune="lr", every=STEPS, average=False)
    frozen_for_a_while(model, opt, tuner.backward)
    assert tuner.hypergradients["lr"].item() == pytest.approx(slope(ends_at), rel=FD_RTOL)


def test_a_forward_pass_that_raises_leaves_no_setting_behind() -> None:
    model, opt = made("scaled_dot_product_attention", False)
    tuner = as_given(model, opt, lambda: mse(model, data()[1]), tune="lr", every=STEPS)
    train(model, opt, tuner.backward)
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 3, 5))
    q = torch.randn(1, 1, 2, 4, requires_grad=True)
    assert "Flash" in F.scaled_dot_product_attention(q, q, q).grad_fn.name()


class Parts(nn.Module):
    """A model whose parts the loop calls, as a LightningModule's training_step does; it is never called itself."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"net": nn.Sequential(nn.Identity(), net) if type(net) is Child else net})

    def predict(self, x: Tensor) -> Tensor:
        return self.parts["net"](x)


@pytest.mark.parametrize("name", FEW)
def test_parts_that_the_loop_calls_beside_the_model(name: str) -> None:
    def ends_at(x: float) -> float:
        model, opt = parts(False, 0.05 + x)
        train(model.predict, opt, Tensor.backward)
        return mse(model.predict, data()[1]).item()

    def parts(compiled: bool, lr: float) -> tuple[Parts, torch.optim.Optimizer]:
        net, opt = made(name, compiled, lr)
        return Parts(net), opt

    torch._dynamo.reset()
    model, opt = parts(True, 0.05)
    call = getattr(model.parts["net"], "_compiled_call_impl", None)
    tuner = as_given(model, opt, lambda: mse(model.predict, data()[1]), tune="lr", every=STEPS, average=False)
    train(model.predict, opt, tuner.backward)
    assert tuner.stats["hessian_products"] == STEPS - 1
    assert tuner.hypergradients["lr"].item() == pytest.approx(slope(ends_at), rel=FD_RTOL)
    tuner.close()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert getattr(model.parts["net"], "_compiled_call_impl", None) is call


def test_a_call_after_which_torch_did_not_run_our_hook_does_not_hold_up_the_next_ones() -> None:
    model, opt = made("scaled_dot_product_attention", False)
    tuner = as_given(model, opt, lambda: mse(model, data()[1]), tune="lr", every=STEPS)
    for t, batch in enumerate(data()[0]):
        opt.zero_grad()
        loss = mse(model, batch)
        if t in (1, 3):
            tuner._loop.tangents.forward.enter()
        tuner.backward(loss)
        q = torch.randn(1, 1, 2, 4, requires_grad=True)
        assert "Flash" in F.scaled_dot_product_attention(q, q, q).grad_fn.name()
        opt.step()
    assert tuner.stats["hessian_products"] == STEPS - 1


def test_attention_in_the_loop_itself_is_refused_with_the_way_out() -> None:
    """There is no call that could be seen."""
    torch.manual_seed(0)
    model = Attention()
    opt = torch.optim.SGD(model.parameters(), lr=0.05)

    def by_hand(x: Tensor) -> Tensor:
        q, k, v = model.inside(x).chunk(3, -1)
        return model.out(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])).mean((1, 2))

    tuner = as_given(model, opt, lambda: mse(by_hand, data()[1]), tune="lr", every=STEPS)
    tuner.backward(mse(by_hand, data()[0][0]))
    opt.step()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(
        NotImplementedError, match=r"call the model.*sdpa_kernel\(SDPBackend.MATH\).*eager.*set_fused_attn"
    ):
        tuner.backward(mse(by_hand, data()[0][1]))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


STEPPED: dict[str, Callable[[Any], Callable[[], Any]]] = {
    "compiled method": lambda opt: torch.compile(opt.step, backend="eager"),
    "compiled function": lambda opt: torch.compile(lambda: opt.step(), backend="eager"),
}


@pytest.mark.parametrize("how", STEPPED)
@pytest.mark.slow
def test_a_compiled_step_is_not_compiled_again_and_gives_the_same(how: str) -> None:
    weights: list[list[Tensor]] = []
    for compiled in (False, True):
        torch._dynamo.reset()
        counters.clear()
        model, opt = made("model.compile()", False)
        tuner = as_given(model, opt, lambda model=model: mse(model, data()[1]), every=2)
        step, graphs = (STEPPED[how](opt) if compiled else opt.step), []
        for t in range(20):
            opt.zero_grad()
            tuner.backward(mse(model, data()[0][t % STEPS]))
            step()
            graphs.append(counters["stats"]["unique_graphs"])
        weights.append([p.detach() for p in model.parameters()])
        assert tuner.stats["hyper_steps"] == 10 and graphs[-1] == graphs[3]
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(*weights, strict=True))
