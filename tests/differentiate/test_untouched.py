"""Everything is left as it was found, also where a loss raises in the middle; and no graph survives."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import hypergrad
from tests.cases import Case
from tests.problems import DEVICE, Setup

ALL_MODES = {
    "forward": {"mode": "forward"},
    "unrolled": {"mode": "unrolled"},
    "replayed": {"mode": "unrolled", "every": 2},
    "unrolled, one checkpoint": {"mode": "unrolled", "every": 50},
    "implicit": {"mode": "implicit", "wrt": "weight_decay", "solver": hypergrad.solvers.neumann},
    "look back": {"mode": "implicit", "look_back": 2},
}
PROBLEMS = ["mlp_live", "cnn_batchnorm", "dropout", "tied_frozen"]


def everything(setup: Setup) -> dict[str, Any]:
    """Copies of all that a call might disturb."""
    return {
        "tensors": copy.deepcopy(setup.model.state_dict()),
        "grads": [None if p.grad is None else p.grad.clone() for p in setup.model.parameters()],
        "grad objects": [id(p.grad) for p in setup.model.parameters()],
        "requires_grad": [p.requires_grad for p in setup.model.parameters()],
        "optimizer": copy.deepcopy(setup.optimizer.state_dict()),
        "training": [m.training for m in setup.model.modules()],
        "attributes": [sorted(vars(m)) for m in setup.model.modules()],
        "rng": torch.get_rng_state(),
        "rng of the GPU": torch.cuda.get_rng_state() if DEVICE.startswith("cuda") else None,
        "dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
    }


def assert_untouched(before: Any, after: Any, where: str = "") -> None:
    if isinstance(before, Tensor):
        assert torch.equal(before, after), where
    elif isinstance(before, dict):
        assert before.keys() == after.keys(), where
        for key in before:
            assert_untouched(before[key], after[key], f"{where}/{key}")
    elif isinstance(before, (list, tuple)):
        assert len(before) == len(after), where
        for i, (a, b) in enumerate(zip(before, after, strict=True)):
            assert_untouched(a, b, f"{where}/{i}")
    else:
        assert before == after, where


def run(setup: Setup, **options: Any) -> hypergrad.Result:
    return hypergrad.hypergradient(
        setup.model,
        setup.optimizer,
        options.pop("loss", setup.loss),
        setup.batches,
        options.pop("val_loss", setup.val_loss),
        **{"wrt": ("lr", "weight_decay"), **options},
    )


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("mode", ALL_MODES)
def test_everything_is_left_as_found(mode: str, problem: str) -> None:
    setup = Case(problem, "momentum").build()
    setup.loss(setup.model, setup.batches[0]).backward()  # gradients to be kept
    setup.model.get_submodule("1" if problem != "tied_frozen" else "out").eval()
    before = everything(setup)
    run(setup, **ALL_MODES[mode])
    assert_untouched(before, everything(setup))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("calls", [2, 8])  # 8: where steps are replayed
@pytest.mark.parametrize("mode", ["forward", "unrolled", "replayed", "implicit"])
def test_everything_is_left_as_found_when_the_loss_raises(mode: str, calls: int, error: type[BaseException]) -> None:
    setup = Case("cnn_batchnorm", "momentum").build()
    before, count = everything(setup), 0

    def loss(model: torch.nn.Module, batch: Any) -> Tensor:
        nonlocal count
        count += 1
        if count == min(calls, 6 if mode in ("forward", "unrolled") else calls):
            raise error("stop")
        return setup.loss(model, batch)

    with pytest.raises((error, ValueError)):
        run(setup, loss=loss, **ALL_MODES[mode])
    assert_untouched(before, everything(setup))


@pytest.mark.parametrize("mode", ["forward", "unrolled", "implicit"])
def test_everything_is_left_as_found_when_val_loss_raises(mode: str) -> None:
    setup = Case("cnn_batchnorm", "momentum").build()
    before = everything(setup)

    def val_loss() -> Tensor:
        setup.val_loss()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(setup, val_loss=val_loss, **ALL_MODES[mode])
    assert_untouched(before, everything(setup))


def test_the_loop_goes_on_as_without_the_call() -> None:
    """Ten more stock steps after a hypergradient end on the same bits as without it."""

    def ten_steps(look: bool) -> Tensor:
        setup = Case("dropout", "adamw").build()
        if look:
            run(setup)
        for batch in (*setup.batches, *setup.batches[:4]):
            setup.optimizer.zero_grad()
            setup.loss(setup.model, batch).backward()
            setup.optimizer.step()
        return torch.cat([p.detach().flatten() for p in setup.model.parameters()])

    assert torch.equal(ten_steps(look=True), ten_steps(look=False))


def test_under_no_grad() -> None:
    setup = Case("mlp", "momentum").build()
    want = run(setup).gradients["lr"]
    with torch.no_grad():
        got = run(setup).gradients["lr"]
        assert not torch.is_grad_enabled()
    assert torch.equal(got, want)


@pytest.fixture
def no_gc() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def watched(setup: Setup, alive: list[weakref.ref[Tensor]]) -> Callable[..., Tensor]:
    """The loss; `alive` gets every activation of module 1, which the next module saves for its backward pass."""

    def loss(model: torch.nn.Module, batch: Any) -> Tensor:
        handle = model[1].register_forward_hook(lambda _m, _i, out: alive.append(weakref.ref(out)))
        try:
            return setup.loss(model, batch)
        finally:
            handle.remove()

    return loss


@pytest.mark.slow
@pytest.mark.usefixtures("no_gc")
@pytest.mark.parametrize("problem", ["mlp", "cnn_batchnorm"])
@pytest.mark.parametrize("mode", ALL_MODES)
def test_no_graph_survives(mode: str, problem: str) -> None:
    setup, alive = Case(problem, "momentum").build(), []
    result = run(setup, loss=watched(setup, alive), **ALL_MODES[mode])
    assert len(alive) >= len(setup.batches)
    assert not any(ref() is not None for ref in alive)
    assert result.value is not None


@pytest.mark.usefixtures("no_gc")
@pytest.mark.parametrize("options", [{"mode": "forward"}, {"every": 1}, {"every": 3}, {"graph_memory": 0}], ids=str)
def test_one_graph_at_a_time(options: dict[str, Any]) -> None:
    """While a step is differentiated, no other step's activations are alive, unless graphs are kept."""
    setup, alive, most = Case("mlp", "momentum").build(), [], 0
    loss = watched(setup, alive)

    def counting(model: torch.nn.Module, batch: Any) -> Tensor:
        nonlocal most
        out = loss(model, batch)
        most = max(most, sum(ref() is not None for ref in alive))
        return out

    run(setup, loss=counting, **options)
    assert most == 1
