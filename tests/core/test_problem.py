"""The gradient stage: what it leaves as it was, its gradients, and what the losses are called with."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hypergrad.core.loss_tensors import LossTensors
from hypergrad.core.problem import Problem
from hypergrad.core.survey import survey
from tests.cases import Case
from tests.problems import DEVICE, randn


def make(problem: str = "cnn_batchnorm") -> tuple[Problem, Any]:
    setup = Case(problem, "momentum").build()
    return Problem(setup.model, list(setup.model.parameters()), setup.loss), setup


def test_untouched() -> None:
    problem, setup = make()
    before = [x.clone() for x in setup.model.state_dict().values()]
    rng = torch.get_rng_state()
    with contextlib.suppress(KeyboardInterrupt), problem.untouched():
        problem.training_loss(setup.batches[0])
        torch.rand(3)
        with torch.no_grad():
            for p in problem.params:
                p.zero_()
        raise KeyboardInterrupt
    assert all(torch.equal(a, b) for a, b in zip(before, setup.model.state_dict().values(), strict=True))
    assert torch.equal(rng, torch.get_rng_state())


def test_validation_leaves_buffers_and_random_numbers() -> None:
    problem, setup = make()
    before, rng = problem.read_buffers(), torch.get_rng_state()

    def val_loss() -> Tensor:
        return setup.val_loss() + 0 * torch.rand((), device=DEVICE)

    for seed in (None, 3):
        problem.validate(val_loss, 0, seed)
        for (tensor, value), now in zip(before, problem.buffers, strict=True):
            assert now is tensor and torch.equal(now, value)
        assert torch.equal(rng, torch.get_rng_state())


@pytest.mark.parametrize("read", ["validate", "evaluate"])
def test_validation_leaves_the_mode_of_every_module(read: str) -> None:
    problem, setup = make()
    modules = list(setup.model.modules())
    modules[-1].eval()
    before = [m.training for m in modules]
    assert before.count(True) == len(before) - 1

    def val_loss(error: bool = False) -> Tensor:
        setup.model.eval()
        if error:
            raise KeyboardInterrupt
        return setup.val_loss()

    getattr(problem, read)(val_loss, 0, 3)
    assert [m.training for m in modules] == before
    with contextlib.suppress(KeyboardInterrupt):
        getattr(problem, read)(lambda: val_loss(error=True), 0, 3)
    assert [m.training for m in modules] == before


def test_training_moves_buffers_once() -> None:
    """BatchNorm's running statistics move as in one stock step, whatever is differentiated."""
    problem, setup = make()
    other, stock = make()
    problem.linearize(setup.batches[0]).product([torch.ones_like(p) for p in problem.params], retain=False)
    stock.loss(stock.model, stock.batches[0]).backward()
    assert all(torch.equal(a, b) for a, b in zip(problem.buffers, other.buffers, strict=True))


INEXACT = ("cnn_batchnorm", "normalised")  # SiLU, GroupNorm: torch computes another last bit where a graph is kept


@pytest.mark.parametrize("name", ["mlp", "deep_batchnorm", "dropout", "embedding", "recurrent", "attention", *INEXACT])
def test_gradients_are_those_of_backward_to_the_last_bit_where_the_survey_says_so(name: str) -> None:
    problem, setup = make(name)
    exact = survey(problem.training_loss(setup.batches[0])).exact
    assert exact == (name not in INEXACT)
    problem, setup = make(name)
    lin = problem.linearize(setup.batches[0])
    _, stock = make(name)
    stock.loss(stock.model, stock.batches[0]).backward()
    for got, p in zip(lin.grads, stock.model.parameters(), strict=True):
        assert got is not None
        assert torch.equal(got, p.grad) if exact else torch.allclose(got, p.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("hypers", [None, {"c": 2.0}])
def test_what_the_loss_is_called_with(hypers: dict[str, float] | None) -> None:
    seen: list[Any] = []
    model = nn.Linear(2, 1).double().to(DEVICE)
    tensors = {name: torch.tensor(x).double().to(DEVICE) for name, x in (hypers or {}).items()}

    def loss(*arguments: Any) -> Tensor:
        seen.append(arguments)
        return model(arguments[1]).sum()

    x = randn(3, 2, seed=0)
    given = LossTensors(tensors)
    with given.differentiable():
        Problem(model, list(model.parameters()), loss, given).linearize(x)
    assert len(seen) == 1
    assert seen[0][:2] == (model, x)
    assert seen[0][2:] == ((tensors,) if hypers else ())


def test_an_error_in_the_loss_says_where() -> None:
    problem, _ = make("mlp")
    with pytest.raises(ValueError, match="batch of type str") as caught:
        problem.linearize("not a batch")
    assert caught.value.__cause__ is not None
