"""Online tuner: what went wrong once in a user's loop, by name."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import hypergrad
from tests.online.live_loops import (
    STEPS,
    Backward,
    Loop,
    as_given,
    attach,
    data,
    float64,
    matches_differences,
    mse,
    ordinary,
    sgd,
    two_layers,
    validation,
)

__all__ = ["float64"]  # the fixture


# ---- validation's random numbers


def test_validation_batches_drawn_by_a_loader_differ_and_leave_trainings_stream_alone() -> None:
    _, (x, y) = data()
    results, seen = [], []  # type: list[Any], list[float]
    for tuned in (False, True):
        model = two_layers()
        opt, loader = sgd()(model), DataLoader(TensorDataset(x, y), batch_size=3, shuffle=True)

        def val_loss(model: nn.Module = model, loader: Any = loader) -> Tensor:
            batch = next(iter(loader))
            seen.append(float(batch[0].sum()))
            return mse(model, batch)

        tuner = as_given(model, opt, val_loss, every=2)
        tuner.freeze() if tuned else tuner.close()
        torch.manual_seed(7)
        ordinary(model, opt, tuner.backward)
        results.append([*model.parameters(), torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert len(set(seen[-STEPS // 2 :])) == STEPS // 2


@pytest.mark.parametrize("mode", ["forward", "unrolled", "implicit"])
def test_validation_batches_differ_where_training_draws_nothing(mode: str) -> None:
    _, (x, y) = data()
    model, seen = nn.Linear(5, 1), []

    def val_loss() -> Tensor:
        rows = torch.randperm(9)[:3]
        seen.append(tuple(rows.tolist()))
        return mse(model, (x[rows], y[rows]))

    opt = torch.optim.SGD(model.parameters(), lr=0.01)
    decay = {
        "weight_decay": hypergrad.Hyperparameter(start=0.01)
    }  # beside lr a rise is read again with the same batches
    tuner = as_given(model, opt, val_loss, tune=decay, loss=mse, mode=mode, every=3, horizon=3)
    rng = torch.get_rng_state()
    seen.clear()
    for batch in data()[0]:
        tuner.step(batch)
    assert len(set(seen)) == len(seen) >= 3
    assert torch.equal(rng, torch.get_rng_state())


# ---- what happens to gradients between backward and step


@pytest.mark.parametrize("accumulate", [1, 2])
def test_clipping_that_was_not_declared_so_is_counted_and_said(accumulate: int) -> None:
    extra = nn.Parameter(torch.ones(3))
    clips: dict[str, Callable[[nn.Module], Any]] = {
        "another threshold": lambda m: nn.utils.clip_grad_norm_(m.parameters(), 0.3),
        "over others too": lambda m: nn.utils.clip_grad_norm_([*m.parameters(), extra], 0.5),
        "over some": lambda m: nn.utils.clip_grad_norm_(m[3].parameters(), 0.1),
        "by value": lambda m: nn.utils.clip_grad_value_(m.parameters(), 0.01),
        "infinity norm": lambda m: nn.utils.clip_grad_norm_(m.parameters(), 0.1, norm_type=float("inf")),
    }
    for name, clip in clips.items():
        model = two_layers()
        opt = sgd()(model)
        tuner, _ = attach(Loop(sgd()), model, opt, clip_norm=0.5)
        with pytest.warns(UserWarning, match="in a way hypergrad does not know"):
            for x, y in data()[0]:
                opt.zero_grad()
                extra.grad = torch.full((3,), 5.0)
                for rows in torch.arange(6).chunk(accumulate):
                    tuner.backward(mse(model, (x[rows], y[rows])))
                clip(model)
                opt.step()
        assert tuner.stats["changed_gradients"] >= STEPS - 2, name


def test_clipping_between_accumulated_backwards_is_counted_and_said() -> None:
    model = two_layers()
    opt = sgd()(model)
    tuner, _ = attach(Loop(sgd()), model, opt, clip_norm=0.2)
    with pytest.warns(UserWarning, match="in a way hypergrad does not know"):
        for x, y in data()[0]:
            opt.zero_grad()
            for rows in torch.arange(6).chunk(2):
                tuner.backward(mse(model, (x[rows], y[rows])))
                nn.utils.clip_grad_norm_(model.parameters(), 0.2)
            opt.step()
    assert tuner.stats["changed_gradients"] > 0


HOOKS: dict[str, dict[int, Callable[[Tensor], Tensor]]] = {
    "one": {3: lambda g: 2 * g},
    "all": {0: lambda g: 2 * g, 3: lambda g: 2 * g},
    "curved": {0: lambda g: g.tanh(), 3: lambda g: g * g.norm()},
}


@pytest.mark.parametrize("name", HOOKS)
def test_hook_on_a_parameter_is_differentiated(name: str) -> None:
    def make() -> Any:
        model = two_layers()
        for i, hook in HOOKS[name].items():
            model[i].weight.register_hook(hook)
        return model, sgd(momentum=0.8)(model)

    live = matches_differences(make, ordinary).hypergradients
    for mode in ("forward", "unrolled"):
        model, opt = make()
        validate = validation(model)

        def val_loss(validate: Any = validate) -> Tensor:
            torch.manual_seed(11)
            return validate()

        torch.manual_seed(7)
        found = hypergrad.hypergradient(model, opt, mse, data()[0], val_loss, mode=mode).gradients
        for hyper in live:
            torch.testing.assert_close(found[hyper], live[hyper], rtol=1e-9, atol=0)


@pytest.mark.parametrize("inexact", [False, True])
def test_hooks_on_parameters_run_once_a_backward(inexact: bool) -> None:
    model = two_layers()
    if inexact:
        model[1] = nn.SiLU()
    opt, calls = sgd()(model), []
    model[3].weight.register_post_accumulate_grad_hook(lambda p: calls.append(p.grad is not None))
    tuner = as_given(model, opt, validation(model), every=1000)
    ordinary(model, opt, tuner.backward)
    assert calls == [True] * STEPS


def test_full_backward_hook_is_refused() -> None:
    model = two_layers()
    opt = sgd()(model)
    tuner = as_given(model, opt, validation(model))
    model[0].register_full_backward_hook(lambda *_: None)
    with pytest.raises(NotImplementedError, match="full backward hook"):
        ordinary(model, opt, tuner.backward)
    assert tuner.stats["steps"] == 0


def test_momentum_written_from_0_during_the_run() -> None:
    def train(model: Any, opt: Any, backward: Backward) -> None:
        for t, batch in enumerate(data()[0]):
            if t == 4:
                for group in opt.param_groups:
                    group["momentum"] = 0.9
            opt.zero_grad()
            backward(mse(model, batch))
            opt.step()

    matches_differences(lambda: (model := two_layers(), sgd()(model)), train)


# ---- the tuner's own life


@pytest.mark.parametrize("mode", ["forward", "unrolled", "implicit"])
def test_tuner_is_freed_by_reference_count_and_takes_its_hooks_along(mode: str, tmp_path: Any) -> None:
    model = two_layers()
    opt = sgd()(model)
    tuner = as_given(
        model,
        opt,
        validation(model),
        loss=mse,
        mode=mode,
        every=3,
        horizon=4,
        log_dir=tmp_path if mode == "forward" else None,
    )
    gc.collect()
    gc.disable()
    try:
        for batch in data()[0][:7]:
            tuner.step(batch)
        alive = weakref.ref(tuner)
        del tuner
        assert alive() is None
    finally:
        gc.enable()
    assert not opt._optimizer_step_pre_hooks and not opt._optimizer_step_post_hooks
    as_given(model, opt, validation(model))  # the optimizer is free again


def test_second_tuner_of_an_optimizer_is_refused_until_the_first_is_closed() -> None:
    model = two_layers()
    opt = sgd()(model)
    first = as_given(model, opt, validation(model))
    with pytest.raises(ValueError, match="close"):
        as_given(model, opt, validation(model))
    with pytest.raises(ValueError, match="close"):
        as_given(model, [torch.optim.SGD([nn.Parameter(torch.ones(1))]), opt], validation(model))
    first.close()
    second = as_given(model, opt, validation(model))
    first.close()  # once more: it leaves the second alone
    with pytest.raises(ValueError, match="close"):
        as_given(model, opt, validation(model))
    ordinary(model, opt, second.backward)
    assert second.stats["steps"] == STEPS and second.stats["plain_steps"] == 0
