"""dL/dθ₀: the derivative in the weights before the first step."""

from __future__ import annotations

import pytest
import torch

import hypergrad
from tests.cases import Case
from tests.oracle import AGREE, ROUNDING, derivative
from tests.problems import Setup
from tests.stock import Run

RUNS: dict[str, Run] = {
    "momentum": Run(Case("mlp", "momentum"), ("lr",)),
    "AdamW, in the middle of a run": Run(Case("mlp_live", "adamw"), ("lr",)),
    "LAMB": Run(Case("mlp", "lamb"), ("lr",)),
    "Muon": Run(Case("matrices", "muon"), ("lr",)),
    "BatchNorm": Run(Case("cnn_batchnorm", "momentum", clip_norm=0.5), ("lr",)),
    "several validations": Run(Case("mlp", "adamw", val_steps=(0, 2, 5)), ("lr",)),
    "without a gradient": Run(Case("tied_frozen", "adamw"), ("lr",)),
    "an average of the weights": Run(Case("mlp", "adamw"), ("lr",), ema=0.7),
    "a schedule": Run(Case("mlp", "momentum"), ("a",), {"a": 0.8}, {"lr": lambda t, h: 0.2 * h["a"] ** t}),
}


class Moved(Case):
    """A case that starts elsewhere."""

    def from_(self, param: int, index: tuple[int, ...], delta: float) -> Moved:
        object.__setattr__(self, "where", (param, index, delta))
        return self

    def build(self) -> Setup:
        setup = super().build()
        param, index, delta = self.where  # type: ignore[attr-defined]
        with torch.no_grad():
            [p for group in setup.groups for p in group][param][index] += delta
        return setup


def moved(run: Run, param: int, index: tuple[int, ...], delta: float) -> float:
    case = run.case
    other = Moved(case.problem, case.optimizer, case.clip_norm, val_steps=case.val_steps).from_(param, index, delta)
    return Run(other, run.wrt, run.hypers, run.schedules, run.ema).stock()


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_matches_the_stock_loop_from_elsewhere(name: str) -> None:
    run = RUNS[name]
    result, params = run.hypergradient(), [p for group in run.case.build().groups for p in group]
    assert result.initial is not None
    assert [x is not None for x in result.initial] == [p.requires_grad for p in params]
    for i, got in enumerate(result.initial):
        if got is None:
            continue
        assert got.shape == params[i].shape
        index = tuple(int(j) for j in torch.unravel_index(got.abs().argmax(), got.shape))
        want = derivative(lambda d, i=i, index=index: moved(run, i, index, d), 1e-3, what=f"weight {i}{list(index)}")
        assert abs(float(got[index]) - want) <= AGREE * abs(want) + ROUNDING


@pytest.mark.parametrize("name", ["momentum", "BatchNorm", "several validations", "an average of the weights"])
def test_alone(name: str) -> None:
    """wrt=(): no hyperparameter, and the same numbers."""
    run = RUNS[name]
    alone, beside = Run(run.case, (), ema=run.ema).hypergradient(), run.hypergradient()
    assert alone.gradients == {}
    assert alone.initial is not None and beside.initial is not None
    for a, b in zip(alone.initial, beside.initial, strict=True):
        assert a is not None and b is not None
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", ["forward", "implicit"])
def test_other_modes_have_none(mode: str) -> None:
    setup = Case("ridge", "sgd").build()
    call = (setup.model, setup.optimizer, setup.loss, setup.batches, setup.val_loss, "weight_decay")
    assert hypergrad.hypergradient(*call, mode).initial is None


def test_maml_on_a_task_with_a_closed_form() -> None:
    """Inner loss ½‖θ − a‖², n steps of size η; query loss ½‖θ − b‖²: dL/dθ₀ = (1 − η)ⁿ (θ_n − b)."""
    a, b, eta, n = torch.tensor([[1.0, -2.0]]).double(), torch.tensor([[0.5, 0.3]]).double(), 0.3, 4
    model = torch.nn.Linear(2, 1, bias=False).double()
    start = model.weight.detach().clone()
    sgd = torch.optim.SGD(model.parameters(), lr=eta)

    def half_square(model: torch.nn.Module, target: torch.Tensor) -> torch.Tensor:
        return (model.weight - target).square().sum() / 2

    result = hypergrad.hypergradient(model, sgd, half_square, [a] * n, lambda: half_square(model, b), "lr")
    end = a + (1 - eta) ** n * (start - a)
    assert result.initial is not None and result.initial[0] is not None
    assert torch.allclose(result.initial[0], (1 - eta) ** n * (end - b), rtol=1e-12)
