"""Gradients and Hessian products against dense derivatives."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian

from hypergrad.core.graph import Linearization, check_scalar
from hypergrad.core.survey import survey
from tests.problems import DEVICE, randn

EXACT = 1e-12


def energy(a: Tensor, b: Tensor, h: Tensor) -> Tensor:
    """Smooth, and coupled in all three."""
    return torch.tanh(a @ b).square().sum() + (h * a.exp()).sum() + (b**3).sum() * h.sum()


def leaves() -> tuple[Tensor, Tensor, Tensor]:
    return tuple(randn(*shape, seed=i).requires_grad_() for i, shape in enumerate([(2, 3), (3, 2), (3,)]))  # type: ignore[return-value]


def dense() -> Tensor:
    """The Hessian in (a, b, h), 15 × 15."""
    blocks = hessian(energy, tuple(x.detach() for x in leaves()))
    sizes = [6, 6, 3]
    return torch.cat(
        [torch.cat([x.reshape(sizes[i], sizes[j]) for j, x in enumerate(row)], 1) for i, row in enumerate(blocks)]
    )


def test_gradients() -> None:
    a, b, h = leaves()
    lin = Linearization(energy(a, b, h), [a, b], [h])
    for got, want in zip([*lin.grads, *lin.extra_grads], torch.autograd.grad(energy(a, b, h), (a, b, h)), strict=True):
        torch.testing.assert_close(got, want, rtol=EXACT, atol=EXACT)
    assert not lin.loss.requires_grad


def test_products_are_rows_of_the_dense_hessian() -> None:
    a, b, h = leaves()
    lin, full = Linearization(energy(a, b, h), [a, b], [h]), dense()
    va, vb, vh = randn(2, 3, seed=5), randn(3, 2, seed=6), randn(3, seed=7)
    zero_a, zero_h = torch.zeros_like(va), torch.zeros_like(vh)
    for vectors, extra, v in [
        ([va, vb], None, (va, vb, zero_h)),
        ([None, vb], [vh], (zero_a, vb, vh)),
        ([va, vb], [None], (va, vb, zero_h)),
    ]:
        rows = lin.product(vectors, extra, into_extra=True)
        got = torch.cat([r.flatten() for r in rows if r is not None])
        torch.testing.assert_close(got, full @ torch.cat([x.flatten() for x in v]), rtol=EXACT, atol=EXACT)
    assert len(lin.product([va, vb])) == 2


def test_what_is_not_used_is_none() -> None:
    a, _, h = leaves()
    frozen, unused = torch.ones(2, 3, dtype=a.dtype, device=a.device), torch.ones(3, requires_grad=True)
    lin = Linearization((a * frozen).square().sum(), [a, frozen, unused], [h])
    assert lin.active == (True, False, False)
    assert lin.extra_grads == [None]
    rows = lin.product([torch.ones_like(a), torch.ones_like(frozen), None], [torch.ones_like(h)], into_extra=True)
    assert [r is not None for r in rows] == [True, False, False, False]


def test_a_linear_loss_has_no_hessian() -> None:
    a = torch.ones(3, requires_grad=True)
    assert Linearization(a.sum(), [a]).product([torch.ones(3)]) == [None]


@pytest.mark.parametrize("products", [True, False])
def test_the_graph_is_freed(products: bool) -> None:
    gc.disable()
    try:
        a = torch.ones(3, requires_grad=True)
        inner = a.exp()
        alive = weakref.ref(inner)
        lin = Linearization(inner.square().sum(), [a], products=products)
        del inner
        if products:
            lin.product([torch.ones(3)], retain=False)
            del lin
        assert alive() is None
    finally:
        gc.enable()


def test_survey_finds_the_leaves() -> None:
    a, b, h = leaves()
    assert {id(x) for x in survey(energy(a, b, h)).leaves} == {id(a), id(b), id(h)}


BAD = {
    "number": (lambda: 1.0, TypeError, "scalar tensor"),
    "vector": (lambda: torch.ones(3, requires_grad=True) * 1, ValueError, r"\.mean\(\)"),
    "no graph": (lambda: torch.tensor(1.0), ValueError, "no_grad"),
}


@pytest.mark.parametrize("name", BAD)
def test_check_scalar(name: str) -> None:
    value, error, match = BAD[name]
    with pytest.raises(error, match=match):
        check_scalar(value(), "the loss")


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(5, 2, sparse=True).to(DEVICE)
    loss = table(torch.tensor([1, 2], device=DEVICE)).square().sum()
    with pytest.raises(NotImplementedError, match="sparse=False"):
        Linearization(loss, [table.weight], products=False)
