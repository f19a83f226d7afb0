"""Cases as data: a problem (tests/problems.py) with an optimizer. A new optimizer or problem is one row.

An optimizer row makes a fresh `torch.optim` instance of two param groups whose hyperparameters differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.problems import PROBLEMS, STEPS, Setup


@dataclass(frozen=True)
class Row:
    """An optimizer, the numbers of its two param groups, and what it is differentiated in."""

    cls: type[torch.optim.Optimizer]
    first: dict[str, Any]
    second: dict[str, Any]
    wrt: tuple[str, ...]

    def make(self, groups: list[list[Tensor]]) -> torch.optim.Optimizer:
        numbers = [self.first, self.first | self.second]
        return self.cls([{"params": g, **n} for g, n in zip(groups, numbers, strict=True)])


SGD, ADAM, ADAMW, RMSPROP = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop
_SGD = {"lr": 0.2, "weight_decay": 0.02, "momentum": 0.8}
_SGD2 = {"lr": 0.1, "weight_decay": 0.05, "momentum": 0.6}
_ADAM = {"lr": 0.02, "weight_decay": 0.02, "betas": (0.8, 0.9), "eps": 1e-2}
_ADAM2 = {"lr": 0.04, "weight_decay": 0.05, "betas": (0.7, 0.95)}
_RMS = {"lr": 0.02, "weight_decay": 0.02, "alpha": 0.8, "eps": 1e-2}
_RMS2 = {"lr": 0.01, "weight_decay": 0.05, "alpha": 0.9}
_OF_SGD = ("lr", "weight_decay", "momentum", "dampening")
_OF_ADAM = ("lr", "weight_decay", "betas", "eps")
_OF_RMS = ("lr", "weight_decay", "alpha", "eps")
_NO_DECAY = {"weight_decay": 0.0}  # torch's default; also the second group's

OPTIMIZERS: dict[str, Row] = {
    "sgd": Row(SGD, {"lr": 0.2, "weight_decay": 0.02}, {"lr": 0.1}, ("lr", "weight_decay")),
    "sgd_at_zero": Row(SGD, {"lr": 0.2}, {"lr": 0.1}, ("lr", "weight_decay", "momentum")),
    "momentum": Row(SGD, _SGD, _SGD2, _OF_SGD),  # dampening at 0
    "dampening": Row(SGD, _SGD | {"dampening": 0.3}, _SGD2, _OF_SGD),
    "nesterov": Row(SGD, _SGD | {"nesterov": True}, _SGD2, ("lr", "weight_decay", "momentum")),
    "sgd_maximize": Row(SGD, _SGD | {"lr": 0.02, "maximize": True}, {"lr": 0.01}, _OF_SGD),
    "adam": Row(ADAM, _ADAM, _ADAM2, _OF_ADAM),
    "adam_at_zero": Row(ADAM, _ADAM | _NO_DECAY, _ADAM2 | _NO_DECAY, _OF_ADAM),
    "adam_amsgrad": Row(ADAM, _ADAM | {"amsgrad": True}, _ADAM2, _OF_ADAM),
    "adam_maximize": Row(ADAM, _ADAM | {"maximize": True}, _ADAM2, _OF_ADAM),
    "adamw": Row(ADAMW, _ADAM, _ADAM2, _OF_ADAM),
    "adamw_at_zero": Row(ADAMW, _ADAM | _NO_DECAY, _ADAM2 | _NO_DECAY, _OF_ADAM),
    "adamw_amsgrad": Row(ADAMW, _ADAM | {"amsgrad": True}, _ADAM2, _OF_ADAM),
    "rmsprop": Row(RMSPROP, _RMS, _RMS2, _OF_RMS),
    "rmsprop_at_zero": Row(RMSPROP, _RMS | _NO_DECAY, _RMS2 | _NO_DECAY, (*_OF_RMS, "momentum")),
    "rmsprop_momentum": Row(RMSPROP, _RMS | {"momentum": 0.7}, _RMS2 | {"momentum": 0.5}, (*_OF_RMS, "momentum")),
    "centered": Row(RMSPROP, _RMS | {"centered": True}, _RMS2, _OF_RMS),
    "centered_momentum": Row(
        RMSPROP, _RMS | {"centered": True, "momentum": 0.7}, _RMS2 | {"momentum": 0.5}, (*_OF_RMS, "momentum")
    ),
    "rmsprop_maximize": Row(RMSPROP, _RMS | {"maximize": True}, _RMS2, _OF_RMS),
}
# Not in the case table: torch's default eps, for the traps around gradients that are exactly 0.
AT_DEFAULT_EPS: dict[str, Row] = {
    "adam_default_eps": Row(ADAM, _ADAM | {"eps": 1e-8}, _ADAM2, ("lr", "weight_decay", "betas")),
    "adamw_default_eps": Row(ADAMW, _ADAM | _NO_DECAY | {"eps": 1e-8}, _ADAM2, ("lr", "weight_decay", "betas")),
    "rmsprop_default_eps": Row(RMSPROP, _RMS | {"eps": 1e-8}, _RMS2, ("lr", "weight_decay", "alpha")),
    "adam_at_zero_default_eps": Row(ADAM, _ADAM | _NO_DECAY | {"eps": 1e-8}, _ADAM2 | _NO_DECAY, ("lr", "betas")),
    "adam_at_zero_small_eps": Row(ADAM, _ADAM | _NO_DECAY | {"eps": 1e-3}, _ADAM2 | _NO_DECAY, ("weight_decay",)),
    "rmsprop_at_zero_small_eps": Row(RMSPROP, _RMS | _NO_DECAY | {"eps": 1e-3}, _RMS2 | _NO_DECAY, ("weight_decay",)),
}
EVERY_PROBLEM_WITH = ("momentum", "adamw", "adam", "rmsprop_momentum")


@dataclass(frozen=True)
class Case:
    """A row of the case table."""

    problem: str
    optimizer: str
    clip_norm: float | None = None
    clip_value: float | None = None
    per_step: bool = False
    val_steps: tuple[int, ...] | None = None
    wrt: tuple[str, ...] | None = None  # None: all that the optimizer and the clipping have

    @property
    def row(self) -> Row:
        return (OPTIMIZERS | AT_DEFAULT_EPS)[self.optimizer]

    @property
    def clip(self) -> dict[str, float]:
        both = {"clip_norm": self.clip_norm, "clip_value": self.clip_value}
        return {name: m for name, m in both.items() if m is not None}

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.row.wrt, *self.clip) if self.wrt is None else self.wrt

    def build(self) -> Setup:
        """A fresh model and optimizer, always the same, at the start of the stretch."""
        setup = PROBLEMS[self.problem]()
        setup.optimizer = self.row.make(setup.groups)
        for i in range(setup.warm_up):
            setup.optimizer.zero_grad()
            setup.loss(setup.model, setup.batches[-1 - i]).backward()
            setup.optimizer.step()
        torch.manual_seed(7)  # what dropout draws from
        return setup

    def __str__(self) -> str:
        extras = [*self.clip, *(["per_step"] if self.per_step else []), *(["val_steps"] if self.val_steps else [])]
        return "-".join([self.problem, self.optimizer, *extras])


MODES: dict[str, dict[str, Any]] = {
    "forward": {"mode": "forward"},
    "every step": {"mode": "unrolled", "every": 1},
    "default": {"mode": "unrolled"},
    "one snapshot": {"mode": "unrolled", "every": STEPS + 4},
}
