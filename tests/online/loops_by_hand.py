"""Loops that write to weights or gradients by hand, between what autograd and the optimizer do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.online.live_loops import Backward
from tests.online.loop_rows import SAID, Row
from tests.online.loops_steps import Step, ce, each, plain_step, sgd

Batch = tuple[Tensor, Tensor]


def then(change: Callable[[nn.Module, int], None], make: Callable[[nn.Module], Any] = sgd) -> Any:
    """A step, and what is done to the weights after it."""

    def step(model: nn.Module, opt: Any, backward: Backward, t: int, batch: Batch) -> None:
        plain_step(model, opt, backward, t, batch)
        change(model, t)

    return each(step, make)


def gradients_changed(change: Callable[[nn.Module, int], None]) -> Any:
    def step(model: nn.Module, opt: Any, backward: Backward, t: int, batch: Batch) -> None:
        opt.zero_grad()
        backward(ce(model, batch))
        change(model, t)
        opt.step()

    return each(step)


@torch.no_grad()
def normalised(model: nn.Module, t: int) -> None:
    """Max-norm: rows of every weight come back to norm 1."""
    for p in model.parameters():
        if p.dim() == 2:
            p.div_(p.norm(dim=1, keepdim=True))


def clamped(model: nn.Module, t: int) -> None:
    """WGAN's."""
    for p in model.parameters():
        p.data.clamp_(-0.3, 0.3)


@torch.no_grad()
def noise_on_gradients(model: nn.Module, t: int) -> None:
    for p in model.parameters():
        p.grad.add_(0.01 * torch.randn_like(p))  # type: ignore[union-attr]


@torch.no_grad()
def centralised(model: nn.Module, t: int) -> None:
    for p in model.parameters():
        if p.dim() == 2:
            p.grad.sub_(p.grad.mean(1, keepdim=True))  # type: ignore[union-attr]


@torch.no_grad()
def scaled_by_hand(model: nn.Module, t: int) -> None:
    for p in model.parameters():
        p.grad.mul_(0.5)  # type: ignore[union-attr]


def replaced(model: nn.Module, t: int) -> None:
    """p.grad = another tensor."""
    for p in model.parameters():
        p.grad = p.grad * 0.5 + 0.1 * p.detach()  # type: ignore[operator]


def reset_at_3(model: nn.Module, t: int) -> None:
    if t == 3:
        torch.manual_seed(5)
        model[3].reset_parameters()  # type: ignore[index]


def loaded_at_3() -> Callable[[nn.Module, int], None]:
    kept: list[Any] = []

    def change(model: nn.Module, t: int) -> None:
        if t == 1:
            kept[:] = [copy.deepcopy(model.state_dict())]
        if t == 3:
            model.load_state_dict(kept[0])

    return change




BY_HAND = {
    "weights normalised after every step": Row(then(normalised)),
    "weights clamped after every step (WGAN)": Row(then(clamped)),
    "noise on gradients": Row(gradients_changed(noise_on_gradients), SAID),
    "gradients centralised": Row(gradients_changed(centralised), SAID),
    "gradients multiplied": Row(gradients_changed(scaled_by_hand), SAID),
    "p.grad = other": Row(gradients_changed(replaced), SAID),
    "a layer reset in mid-run": Row(then(reset_at_3)),
    "weights loaded in mid-run": Row(then(loaded_at_3())),
}
