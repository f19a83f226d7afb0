"""Traps without a right number: errors that name the layer and the way out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

import hypergrad
from tests.cases import Case
from tests.problems import DEVICE, STEPS, randint, randn

BOTH = ("forward", "unrolled")


def gradients(model: nn.Module, batches: list[Any], loss: Any = None, **options: Any) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    loss = loss or (lambda model, batch: model(batch).square().sum())
    wrt, mode = options.pop("wrt", ("lr", "weight_decay")), options.pop("mode", "unrolled")
    return hypergrad.hypergradient(
        model, optimizer, loss, batches, lambda: model(batches[0]).sum(), wrt, mode, **options
    ).gradients


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * grad


class Cube(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return OnceDifferentiable.apply(x)


class Sdpa(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(2, 1, -1, 48).chunk(3, dim=-1)
        return scaled_dot_product_attention(q, k, v)


def old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.Sequential(nn.Linear(4, 4), nn.utils.weight_norm(nn.Linear(4, 2)))


def new_weight_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 2)))


FLOATS, INDICES = "floats", "indices"
REFUSED: dict[str, tuple[Any, str, str]] = {
    "weight_norm": (old_weight_norm, FLOATS, r"weight_norm on 1: .*register"),
    "parametrized weight_norm": (new_weight_norm, FLOATS, r"weight_norm on 1: .*remove_parametrizations"),
    "once_differentiable": (
        lambda: nn.Sequential(nn.Linear(4, 4), Cube(), nn.Linear(4, 2)),
        FLOATS,
        r"OnceDifferentiable.*once_differentiable",
    ),
    "flash attention": (Sdpa, FLOATS, r"sdpa_kernel\(SDPBackend.MATH\)"),
    "EmbeddingBag": (
        lambda: nn.Sequential(nn.EmbeddingBag(9, 4), nn.Tanh(), nn.Linear(4, 2)),
        INDICES,
        r"nn.Embedding",
    ),
    "sparse embedding": (lambda: nn.Sequential(nn.Embedding(9, 4, sparse=True)), INDICES, r"sparse=False"),
}


@pytest.mark.parametrize("layer", REFUSED)
@pytest.mark.parametrize("mode", BOTH)
def test_trap_layer_without_a_right_second_derivative(mode: str, layer: str) -> None:
    build, kind, match = REFUSED[layer]
    model = build().to(DEVICE)
    batch = randint(9, 2, 4, seed=0) if kind == INDICES else randn(2, 4, seed=0).float()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(NotImplementedError, match=match):
        gradients(model, [batch] * 3, mode=mode)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # inside torch's compiler
@pytest.mark.parametrize("mode", BOTH)
def test_trap_compiled_module(mode: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).to(DEVICE)
    compiled = torch.compile(model, backend="aot_eager")
    with pytest.raises(NotImplementedError, match="_orig_mod"):
        gradients(compiled, [randn(2, 4, seed=0).float()] * 2, mode=mode)


@pytest.mark.parametrize("mode", BOTH)
def test_trap_layer_that_is_first_used_later(mode: str) -> None:
    """The graph of every step is looked at, not only that of the first."""
    model = nn.Linear(4, 4).double().to(DEVICE)

    def loss(model: nn.Module, batch: tuple[Tensor, bool]) -> Tensor:
        x, cubed = batch
        y = model(x)
        return (OnceDifferentiable.apply(y) if cubed else y).square().sum() / 100

    x = randn(3, 4, seed=0)
    with pytest.raises(NotImplementedError, match="OnceDifferentiable"):
        hypergrad.hypergradient(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            loss,
            [(x, t == STEPS // 2) for t in range(STEPS)],
            lambda: model(x).sum(),
            "lr",
            mode,
        )


@pytest.mark.parametrize("flags", [{"dampening": 0.1}, {"nesterov": True}], ids=str)
@pytest.mark.parametrize("mode", BOTH)
def test_trap_sgd_momentum_is_discontinuous_at_zero(mode: str, flags: dict[str, Any]) -> None:
    setup = Case("mlp", "momentum").build()
    optimizer = torch.optim.SGD(setup.model.parameters(), lr=0.1, momentum=0.5, **flags)
    optimizer.param_groups[0]["momentum"] = 0.0
    with pytest.raises(ValueError, match="discontinuous"):
        hypergrad.hypergradient(
            setup.model, optimizer, setup.loss, setup.batches, setup.val_loss, ("lr", "momentum"), mode
        )


@pytest.mark.parametrize("mode", BOTH)
def test_trap_dampening_at_momentum_zero(mode: str) -> None:
    """torch ignores dampening where momentum is 0: alone its derivative is 0 there, beside momentum's own it has none."""
    setup = Case("mlp", "sgd_at_zero").build()
    call = (setup.model, setup.optimizer, setup.loss, setup.batches, setup.val_loss)
    assert not hypergrad.hypergradient(*call, "dampening", mode).gradients["dampening"].any()
    with pytest.raises(ValueError, match="discontinuous"):
        hypergrad.hypergradient(*call, ("momentum", "dampening"), mode)
