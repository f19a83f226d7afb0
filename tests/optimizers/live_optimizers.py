"""Optimizers of every update rule on a few parameters, with each flag that changes what a step does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from hypergrad.optimizers.binding import State
from hypergrad.optimizers.transition import Transition
from tests.problems import DEVICE
from tests.references import third_party

STEPS = 100
ULPS = 8  # a step, on CUDA and in fused kernels, which order operations as they like: units in the last place

_decay = {"weight_decay": 0.1}
_momentum = {"momentum": 0.9}
_adam = {"lr": 0.01, "betas": (0.8, 0.95)}
_coupled = {"weight_decouple": False, **_decay}
_lamb = {**_adam, **_decay}
FLAGS: dict[str, tuple[type[torch.optim.Optimizer] | str, dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "sgd decay": (torch.optim.SGD, {"lr": 0.1, **_decay}),
    "sgd momentum": (torch.optim.SGD, {"lr": 0.1, **_momentum, **_decay}),
    "sgd dampening": (torch.optim.SGD, {"lr": 0.1, **_momentum, "dampening": 0.3}),
    "sgd nesterov": (torch.optim.SGD, {"lr": 0.1, **_momentum, **_decay, "nesterov": True}),
    "sgd maximize": (torch.optim.SGD, {"lr": 0.01, **_momentum, **_decay, "maximize": True}),
    **{
        f"{cls.__name__.lower()} {'amsgrad ' * amsgrad}{'maximize ' * maximize}{'decay' * bool(decay)}".strip(): (
            cls,
            {**_adam, "amsgrad": amsgrad, "maximize": maximize, "weight_decay": decay},
        )
        for cls, amsgrad, maximize, decay in product(
            (torch.optim.Adam, torch.optim.AdamW), (False, True), (False, True), (0.0, 0.1)
        )
    },
    **{
        f"rmsprop {'centered ' * centered}{'momentum ' * bool(momentum)}{'maximize' * maximize}".strip(): (
            torch.optim.RMSprop,
            {"lr": 0.01, "centered": centered, "momentum": momentum, "maximize": maximize, **_decay},
        )
        for centered, momentum, maximize in product((False, True), (0.0, 0.9), (False, True))
    },
    "adagrad": (torch.optim.Adagrad, {"lr": 0.1}),
    "adagrad lr_decay": (torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.3, **_decay}),
    "adagrad maximize": (torch.optim.Adagrad, {"lr": 0.1, "maximize": True, **_decay}),
    **{
        f"{cls.__name__.lower()} {'maximize ' * maximize}{'decay' * bool(decay)}".strip(): (
            cls,
            {"lr": 0.1, "maximize": maximize, "weight_decay": decay},
        )
        for cls, maximize, decay in product((torch.optim.Adamax, torch.optim.Adadelta), (False, True), (0.0, 0.1))
    },
    **{
        f"{cls.__name__.lower()} {'decoupled ' * decoupled}{'maximize ' * maximize}{'decay' * bool(decay)}".strip(): (
            cls,
            {**_adam, "decoupled_weight_decay": decoupled, "maximize": maximize, "weight_decay": decay},
        )
        for cls, decoupled, maximize, decay in product(
            (torch.optim.NAdam, torch.optim.RAdam), (False, True), (False, True), (0.0, 0.1)
        )
    },
    **{
        f"adafactor {'maximize ' * maximize}{'floors ' * (eps[1] > 0.01)}{'decay' * bool(decay)}".strip(): (
            torch.optim.Adafactor,
            {"lr": 0.2, "maximize": maximize, "weight_decay": decay, "eps": eps},
        )
        for maximize, decay, eps in product((False, True), (0.0, 0.1), ((None, 1e-3), (1e-2, 0.5)))
    },
    **{
        f"muon {'nesterov ' * nesterov}{'decay ' * bool(decay)}{adjust or ''}".strip(): (
            torch.optim.Muon,
            {"lr": 0.02, "nesterov": nesterov, "weight_decay": decay, "adjust_lr_fn": adjust},
        )
        for nesterov, decay, adjust in [
            (False, 0.1, None),
            (True, 0.0, "original"),
            (True, 0.1, "match_rms_adamw"),
            (False, 0.1, "spectral_unclamped"),
        ]
    },
    "lion": ("pytorch_optimizer.Lion", {"lr": 0.01, **_decay}),
    "lion fixed": ("pytorch_optimizer.Lion", {"lr": 0.01, "fixed_decay": True, **_decay}),
    "lion coupled": ("pytorch_optimizer.Lion", {"lr": 0.01, **_coupled}),
    "lion maximize": ("pytorch_optimizer.Lion", {"lr": 0.01, "maximize": True, **_decay}),
    "lion lion_pytorch": ("lion_pytorch.Lion", {"lr": 0.01, **_decay}),
    "lion lion_pytorch decoupled": ("lion_pytorch.Lion", {"lr": 0.01, "decoupled_weight_decay": True, **_decay}),
    "lamb": ("pytorch_optimizer.Lamb", _lamb),
    "lamb fixed": ("pytorch_optimizer.Lamb", {**_lamb, "fixed_decay": True}),
    "lamb coupled": ("pytorch_optimizer.Lamb", {**_adam, **_coupled}),
    "lamb maximize": ("pytorch_optimizer.Lamb", {**_adam, "maximize": True}),
    "lamb no averaging": ("pytorch_optimizer.Lamb", {**_lamb, "grad_averaging": False, "adam_debias": True}),
    "lamb adam": ("pytorch_optimizer.Lamb", {**_lamb, "adam": True}),
}


def parameters(dtype: torch.dtype, cls: Any = None) -> list[Tensor]:
    shapes = ((4, 3), (3, 5), (1, 4), (4, 4)) if cls is torch.optim.Muon else ((4, 3), (5,), (), (2, 2, 2))
    return [torch.randn(shape, dtype=dtype, device=DEVICE).requires_grad_() for shape in shapes]


def make(cls: Any, numbers: dict[str, Any], params: Sequence[Tensor]) -> torch.optim.Optimizer:
    """Two groups; the second with half the lr."""
    cls = third_party(cls) if isinstance(cls, str) else cls
    second = {"params": params[2:], "lr": numbers["lr"] / 2}
    try:
        return cls([{"params": params[:2]}, second], **numbers)
    except ValueError as error:
        if "spectral_unclamped is not supported" in str(error):
            pytest.skip(f"torch {torch.__version__} has no spectral_unclamped")
        raise


def always(t: int, i: int) -> bool:
    return True


def sometimes(t: int, i: int) -> bool:
    """Parameter 1 has a gradient from step 3 on, parameter 3 at every third step."""
    return not (i == 1 and t < 3) and not (i == 3 and t % 3)


def gradients(params: Sequence[Tensor], t: int, present: Callable[[int, int], bool]) -> list[Tensor | None]:
    return [torch.randn_like(p) if present(t, i) else None for i, p in enumerate(params)]


def step_both(optimizer: torch.optim.Optimizer, transition: Transition, state: State, grads: list[Any]) -> State:
    flat = transition.flatten(grads)  # a copy: pytorch_optimizer changes gradients in place
    for p, g in zip(transition.params, grads, strict=True):
        p.grad = g
    optimizer.step()
    return transition.step(state, flat, tuple(g is not None for g in grads), transition.values())


def assert_equal(got: Tensor, want: Tensor, bits: bool = DEVICE == "cpu") -> None:
    worst = (got - want).abs().max()
    assert torch.equal(got, want) if bits else worst <= ULPS * STEPS * torch.finfo(got.dtype).eps * want.abs().max()


def trained(
    flags: str, dtype: torch.dtype, steps: int, present: Callable[[int, int], bool]
) -> tuple[list[Tensor], torch.optim.Optimizer]:
    """Parameters, and their optimizer after so many steps."""
    params = parameters(dtype, FLAGS[flags][0])
    optimizer = make(*FLAGS[flags], params)
    for t in range(steps):
        for p, g in zip(params, gradients(params, t, present), strict=True):
            p.grad = g
        optimizer.step()
    return params, optimizer
