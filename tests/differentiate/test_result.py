"""What a result holds: shapes, one gradient per step, validation at several steps, hyperparameters in the loss."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import hypergrad
from tests.cases import MODES, Case, Row
from tests.oracle import AGREE, MODES_AGREE, assert_matches, assert_same, derivative, finite_difference, hypergradient
from tests.problems import STEPS

LOSS_HYPERS = ("weights", "smoothing", "penalty")
PER_STEP = [
    Case("mlp", "momentum", per_step=True),
    Case("mlp", "rmsprop_momentum", per_step=True, wrt=("lr", "weight_decay", "alpha")),
    Case("mlp", "adamw", clip_norm=0.245, per_step=True),
    Case("dropout", "adam", per_step=True, wrt=("lr", "betas")),
    Case("loss_hypers", "momentum", per_step=True, wrt=("lr", *LOSS_HYPERS)),
]
VAL_STEPS = [
    Case("mlp", "adamw", val_steps=(0, 2, STEPS)),
    Case("mlp", "momentum", val_steps=(3,)),
    Case("mlp", "momentum", val_steps=(1, 1, 5)),
    Case("mlp", "adam", val_steps=(2, 4), per_step=True, wrt=("lr",)),
    Case("cnn_batchnorm", "momentum", val_steps=(1, 2, STEPS)),
    Case("dropout", "momentum", val_steps=(1, 2, STEPS)),
]
IN_THE_LOSS = [Case("loss_hypers", o, wrt=LOSS_HYPERS) for o in ("sgd", "momentum", "adamw", "rmsprop_momentum")] + [
    Case("loss_hypers", "adam", clip_value=0.08, wrt=("lr", "betas", "clip_value", *LOSS_HYPERS)),
    Case("loss_hypers", "adam", clip_norm=0.3, wrt=("clip_norm", "penalty")),
]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["forward", "graphs kept", "every second step"])
@pytest.mark.parametrize("case", PER_STEP + VAL_STEPS + IN_THE_LOSS, ids=str)
def test_matches_finite_differences(case: Case, mode: str) -> None:
    result = hypergradient(case, **MODES[mode])
    if case.val_steps is None:
        assert_matches(result, case)
        return
    for name, array in result.gradients.items():
        for index in map(tuple, array.cpu().isfinite().nonzero().tolist()):
            want = finite_difference(case, name, index)
            assert float(array[index]) == pytest.approx(want, rel=AGREE, abs=1e-10)


@pytest.mark.parametrize("case", PER_STEP, ids=str)
@pytest.mark.parametrize("mode", ["forward", "graphs kept"])
def test_steps_sum_to_the_shared_gradient(case: Case, mode: str) -> None:
    shared = hypergradient(Case(case.problem, case.optimizer, case.clip_norm, wrt=case.names), **MODES[mode])
    steps = hypergradient(case, **MODES[mode])
    summed = hypergrad.Result(steps.value, {name: x.sum(0) for name, x in steps.gradients.items()})
    assert_same(summed, shared)


@pytest.mark.parametrize("case", PER_STEP + VAL_STEPS + IN_THE_LOSS, ids=str)
def test_mode_against_mode(case: Case) -> None:
    assert_same(hypergradient(case, mode="forward"), hypergradient(case, mode="unrolled"), MODES_AGREE)


@pytest.mark.parametrize("mode", ["forward", "graphs kept"])
@pytest.mark.parametrize("per_step", [False, True])
def test_shapes(mode: str, per_step: bool) -> None:
    lead = (STEPS,) if per_step else ()
    case = Case("loss_hypers", "adam", clip_norm=1.0, per_step=per_step, wrt=("lr", "betas", "clip_norm", *LOSS_HYPERS))
    result = hypergradient(case, **MODES[mode])
    shapes = {"lr": (2,), "betas": (2, 2), "clip_norm": (), "weights": (4,), "smoothing": (), "penalty": ()}
    assert {name: tuple(x.shape) for name, x in result.gradients.items()} == {n: lead + s for n, s in shapes.items()}
    assert result.value.shape == ()
    assert not result.value.requires_grad
    assert all(not x.requires_grad for x in result.gradients.values())


@pytest.mark.parametrize("mode", ["forward", "unrolled", "implicit"])
def test_stats(mode: str) -> None:
    stats = hypergradient(Case("ridge", "momentum", wrt=("weight_decay",)), mode=mode).stats
    names = {"steps", "seconds", "peak_bytes", "gradient_evaluations", "hessian_products", "growth_rate", "warnings"}
    assert names <= stats.keys()
    assert stats["steps"] == STEPS
    assert stats["gradient_evaluations"] >= STEPS
    assert stats["hessian_products"] > 0
    assert ("solver_residual" in stats) == (mode == "implicit")


def test_the_mean_over_validation_steps() -> None:
    each = [hypergradient(Case("mlp", "momentum", val_steps=(t,))) for t in (2, 4)]
    both = hypergradient(Case("mlp", "momentum", val_steps=(2, 4)))
    assert float(both.value) == pytest.approx(sum(float(r.value) for r in each) / 2, rel=MODES_AGREE)
    mean = {name: sum(r.gradients[name] for r in each) / 2 for name in both.gradients}
    assert_same(both, hypergrad.Result(both.value, mean))


@pytest.mark.parametrize("mode", ["forward", "unrolled"])
def test_val_loss_is_told_the_step(mode: str) -> None:
    setup, seen = Case("mlp", "momentum").build(), []

    def val_loss(t: int) -> Tensor:
        seen.append(t)
        return setup.loss(setup.model, setup.batches[t % STEPS]) * (t + 1)

    hypergrad.hypergradient(
        setup.model, setup.optimizer, setup.loss, setup.batches, val_loss, wrt="lr", mode=mode, val_steps=(1, 4, STEPS)
    )
    assert sorted(seen) == [1, 4, STEPS]


@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("mode", ["forward", "unrolled"])
def test_val_loss_may_read_the_loss_hypers(mode: str, per_step: bool) -> None:
    """dL/dh has a direct term where the validation loss reads the tensors that the training loss was given."""
    x, c = torch.randn(3).double(), torch.tensor(0.3).double()

    def run(strength: Tensor, differentiate: bool) -> hypergrad.Result | float:
        model = torch.nn.Linear(3, 1, bias=False).double()
        torch.nn.init.constant_(model.weight, 0.5)
        sgd, given = torch.optim.SGD(model.parameters(), lr=0.1), {}

        def loss(model: torch.nn.Module, batch: Tensor, hypers: dict[str, Tensor]) -> Tensor:
            given.update(hypers)
            return (model(batch) - 1).square().sum() + hypers["c"] * model.weight.square().sum()

        def val_loss() -> Tensor:
            return model(x).square().sum() + 3 * given["c"].square()

        if differentiate:
            return hypergrad.hypergradient(
                model, sgd, loss, [x, -x], val_loss, wrt="c", mode=mode, hypers={"c": strength}, per_step=per_step
            )
        for batch in (x, -x):
            sgd.zero_grad()
            loss(model, batch, {"c": strength}).backward()
            sgd.step()
        return float(val_loss().detach())

    result = run(c, differentiate=True)
    assert isinstance(result, hypergrad.Result)
    want = derivative(lambda d: run(c + d, differentiate=False), 1e-2)  # type: ignore[arg-type, return-value]
    assert float(result.gradients["c"].sum()) == pytest.approx(want, rel=AGREE)


def test_groups_without_the_hyperparameter_have_gradient_zero() -> None:
    """Two optimizers of different kinds; groups are numbered through."""
    setup = Case("mlp", "momentum").build()
    first = Row(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, {}, ()).make([setup.groups[0], []])
    second = torch.optim.Adam(setup.groups[1], lr=0.01)
    results = [
        hypergrad.hypergradient(
            setup.model,
            [first, second],
            setup.loss,
            setup.batches,
            setup.val_loss,
            wrt=("lr", "momentum", "betas"),
            mode=mode,
        )
        for mode in ("forward", "unrolled")
    ]
    assert_same(*results)
    gradients = results[0].gradients
    assert gradients["lr"].shape == (3,)
    assert gradients["lr"][[0, 2]].all()
    assert not gradients["lr"][1]
    assert gradients["momentum"][0]
    assert not gradients["momentum"][1:].any()
    assert not gradients["betas"][:2].any()
    assert gradients["betas"][2].all()


def test_what_is_printed_has_the_numbers_and_not_every_weight() -> None:
    model = torch.nn.Linear(100, 1, bias=False).double()
    torch.nn.init.constant_(model.weight, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss(model: torch.nn.Module, batch: Tensor) -> Tensor:
        return (model.weight**2).sum() / 2

    result = hypergrad.hypergradient(model, optimizer, loss, [0], lambda: loss(model, torch.empty(0)), wrt="lr")
    # w' = (1 - lr) w, loss 100 w'^2 / 2; d loss / d lr = -100 (1 - lr) w^2; d loss / d w = (1 - lr)^2 w, of 100 elements
    assert "value=10.125, gradients={'lr': [-22.5]}" in repr(result)
    assert "initial=[<(1, 100), norm 4.05>]" in repr(result)
    assert len(repr(result)) < 500


@pytest.mark.parametrize("mode", ["unrolled", "forward"])
def test_lr_of_0_is_said(mode: str) -> None:
    """Weights do not move, so weight decay does nothing: a derivative of 0 that is right, and not what was meant."""
    model = torch.nn.Linear(3, 1)
    x, y = torch.randn(8, 3), torch.randn(8, 1)
    groups = [{"params": [model.weight]}, {"params": [model.bias]}]

    def loss(*_: Any) -> torch.Tensor:
        return ((model(x) - y) ** 2).mean()

    def stats(lr: float, wrt: tuple[str, ...], **options: Any) -> list[str]:
        opt = torch.optim.SGD(groups, lr=0.0, weight_decay=0.1)
        opt.param_groups[1]["lr"] = lr
        found = hypergrad.hypergradient(model, opt, loss, [0] * 2, loss, wrt=wrt, mode=mode, **options)
        return found.stats["warnings"]

    with pytest.warns(UserWarning, match="lr is 0 in every param group"):
        (said,) = stats(0.0, ("lr", "weight_decay"))
    assert "weight_decay" in said
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not stats(0.1, ("weight_decay",)) and not stats(0.0, ("lr",))
        assert not stats(0.0, ("weight_decay",), schedules={"lr": lambda t, h: 0.1})
