"""Cases as data: a problem (tests/problems.py) with an optimizer. A new optimizer or problem is one row.

An optimizer row makes a fresh `torch.optim` instance of two param groups whose hyperparameters differ.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hypergrad.checks.precision import Promote
from tests import references
from tests.problems import PROBLEMS, STEPS, Setup


@dataclass(frozen=True)
class Row:
    """An optimizer, the numbers of its two param groups, and what it is differentiated in."""

    cls: type[torch.optim.Optimizer] | str  # the dotted name of a class of another package
    first: dict[str, Any]
    second: dict[str, Any]
    wrt: tuple[str, ...]

    def make(self, groups: list[list[Tensor]]) -> torch.optim.Optimizer:
        numbers: list[dict[str, Any]] = [{}, self.second]
        cls = references.third_party(self.cls) if isinstance(self.cls, str) else self.cls
        return cls([{"params": g, **n} for g, n in zip(groups, numbers, strict=True)], **self.first)


SGD, ADAM, ADAMW, RMSPROP = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop
ADAGRAD, ADAMAX, ADADELTA = torch.optim.Adagrad, torch.optim.Adamax, torch.optim.Adadelta
NADAM, RADAM, ADAFACTOR, MUON = torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adafactor, torch.optim.Muon
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
_ADAGRAD = {"lr": 0.1, "weight_decay": 0.02, "lr_decay": 0.1, "eps": 1e-2, "initial_accumulator_value": 0.05}
_ADAGRAD2 = {"lr": 0.05, "weight_decay": 0.05, "lr_decay": 0.2}
_ADADELTA = {"lr": 0.5, "weight_decay": 0.02, "rho": 0.8, "eps": 1e-2}
_ADADELTA2 = {"lr": 1.0, "weight_decay": 0.05, "rho": 0.9}
_NADAM = {**_ADAM, "momentum_decay": 0.1}
_NADAM2 = {**_ADAM2, "momentum_decay": 0.3}
_DECOUPLED = {"decoupled_weight_decay": True}
_LION = {"lr": 0.02, "weight_decay": 0.1, "betas": (0.8, 0.9)}
_LION2 = {"lr": 0.01, "weight_decay": 0.3, "betas": (0.7, 0.95)}
_FACTOR = {"lr": 0.05, "weight_decay": 0.1, "beta2_decay": -0.8, "d": 1.2}
_FACTOR2 = {"lr": 0.1, "weight_decay": 0.2, "beta2_decay": -0.6}
_MUON = {"lr": 0.05, "weight_decay": 0.1, "momentum": 0.8}
_MUON2 = {"lr": 0.02, "weight_decay": 0.2, "momentum": 0.9}
_OF_FACTOR = ("lr", "weight_decay", "beta2_decay", "d")
_OF_MUON = ("lr", "weight_decay", "momentum", "ns_coefficients")
_OF_LION = ("lr", "weight_decay", "betas")
_OF_ADAGRAD = ("lr", "weight_decay", "lr_decay", "eps", "initial_accumulator_value")
_OF_ADADELTA = ("lr", "weight_decay", "rho", "eps")
_OF_NADAM = (*_OF_ADAM, "momentum_decay")

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
    "adagrad": Row(ADAGRAD, _ADAGRAD, _ADAGRAD2, _OF_ADAGRAD),
    "adagrad_at_zero": Row(ADAGRAD, _ADAGRAD | _NO_DECAY | {"lr_decay": 0.0}, _ADAGRAD2 | _NO_DECAY, _OF_ADAGRAD),
    "adagrad_maximize": Row(ADAGRAD, _ADAGRAD | {"maximize": True}, _ADAGRAD2, _OF_ADAGRAD),
    "adamax": Row(ADAMAX, _ADAM | {"lr": 0.025}, _ADAM2, _OF_ADAM),
    "adamax_at_zero": Row(ADAMAX, _ADAM | _NO_DECAY, _ADAM2 | _NO_DECAY, _OF_ADAM),
    "adamax_maximize": Row(ADAMAX, _ADAM | {"maximize": True}, _ADAM2, _OF_ADAM),
    "nadam": Row(NADAM, _NADAM, _NADAM2, _OF_NADAM),
    "nadam_at_zero": Row(NADAM, _NADAM | _NO_DECAY | {"momentum_decay": 0.0}, _ADAM2 | _NO_DECAY, _OF_NADAM),
    "nadam_decoupled": Row(NADAM, _NADAM | _DECOUPLED, _NADAM2, _OF_NADAM),
    "nadam_maximize": Row(NADAM, _NADAM | {"maximize": True}, _NADAM2, _OF_NADAM),
    "radam": Row(RADAM, _ADAM, _ADAM2, _OF_ADAM),  # rectified from step 6 on
    "radam_at_zero": Row(RADAM, _ADAM | _NO_DECAY, _ADAM2 | _NO_DECAY, _OF_ADAM),
    "radam_decoupled": Row(RADAM, _ADAM | _DECOUPLED, _ADAM2, _OF_ADAM),
    "radam_maximize": Row(RADAM, _ADAM | {"maximize": True}, _ADAM2, _OF_ADAM),
    "adadelta": Row(ADADELTA, _ADADELTA, _ADADELTA2, _OF_ADADELTA),
    "adadelta_at_zero": Row(ADADELTA, _ADADELTA | _NO_DECAY, _ADADELTA2 | _NO_DECAY, _OF_ADADELTA),
    "adafactor": Row(ADAFACTOR, _FACTOR, _FACTOR2, _OF_FACTOR),
    "adafactor_at_zero": Row(ADAFACTOR, _FACTOR | _NO_DECAY, _FACTOR2 | _NO_DECAY, _OF_FACTOR),
    "adafactor_floors": Row(
        ADAFACTOR, _FACTOR | {"eps": (0.02, 0.3), "lr": 0.45}, _FACTOR2, _OF_FACTOR
    ),  # lr > 1/√t later
    "adafactor_maximize": Row(ADAFACTOR, _FACTOR | {"maximize": True, "lr": 0.03}, _FACTOR2, _OF_FACTOR),
    "muon": Row(MUON, _MUON, _MUON2, _OF_MUON),
    "muon_at_zero": Row(MUON, _MUON | _NO_DECAY, _MUON2 | _NO_DECAY | {"momentum": 0.0}, _OF_MUON),
    "muon_plain": Row(MUON, _MUON | {"nesterov": False, "adjust_lr_fn": "match_rms_adamw"}, _MUON2, _OF_MUON),
    "lion": Row(references.Lion, _LION, _LION2, _OF_LION),  # betas: 0
    "lion_at_zero": Row(references.Lion, _LION | _NO_DECAY, _LION2 | _NO_DECAY, _OF_LION),
    "lion_fixed": Row(references.Lion, _LION | {"fixed_decay": True}, _LION2, _OF_LION),
    "lion_coupled": Row(references.Lion, _LION | {"weight_decouple": False}, _LION2, _OF_LION),
    "lion_maximize": Row(references.Lion, _LION | {"maximize": True}, _LION2, _OF_LION),
    "lion_pytorch_optimizer": Row("pytorch_optimizer.Lion", _LION, _LION2, _OF_LION),
    "lion_pytorch": Row("lion_pytorch.Lion", _LION | _DECOUPLED, _LION2, _OF_LION),
    "lamb": Row(references.Lamb, _ADAM, _ADAM2, _OF_ADAM),
    "lamb_at_zero": Row(references.Lamb, _ADAM | _NO_DECAY, _ADAM2 | _NO_DECAY, _OF_ADAM),
    "lamb_fixed": Row(references.Lamb, _ADAM | {"fixed_decay": True}, _ADAM2, _OF_ADAM),
    "lamb_coupled": Row(references.Lamb, _ADAM | {"weight_decouple": False}, _ADAM2, _OF_ADAM),
    "lamb_adam": Row(references.Lamb, _ADAM | {"adam": True, "grad_averaging": False}, _ADAM2, _OF_ADAM),
    "lamb_pytorch_optimizer": Row("pytorch_optimizer.Lamb", _ADAM, _ADAM2, _OF_ADAM),
    "adadelta_maximize": Row(ADADELTA, _ADADELTA | {"maximize": True}, _ADADELTA2, _OF_ADADELTA),
}
# Not in the case table: torch's default eps, for the traps around gradients that are exactly 0.
AT_DEFAULT_EPS: dict[str, Row] = {
    "adam_default_eps": Row(ADAM, _ADAM | {"eps": 1e-8}, _ADAM2, ("lr", "weight_decay", "betas")),
    "adamw_default_eps": Row(ADAMW, _ADAM | _NO_DECAY | {"eps": 1e-8}, _ADAM2, ("lr", "weight_decay", "betas")),
    "rmsprop_default_eps": Row(RMSPROP, _RMS | {"eps": 1e-8}, _RMS2, ("lr", "weight_decay", "alpha")),
    "adam_at_zero_default_eps": Row(ADAM, _ADAM | _NO_DECAY | {"eps": 1e-8}, _ADAM2 | _NO_DECAY, ("lr", "betas")),
    "adam_at_zero_small_eps": Row(ADAM, _ADAM | _NO_DECAY | {"eps": 1e-3}, _ADAM2 | _NO_DECAY, ("weight_decay",)),
    "adagrad_default_eps": Row(
        ADAGRAD, {"lr": 0.02, "weight_decay": 0.02}, {"lr": 0.01}, ("lr", "weight_decay", "lr_decay")
    ),
    "adamax_default_eps": Row(ADAMAX, _ADAM | {"eps": 1e-8}, _ADAM2, ("lr", "weight_decay", "betas")),
    "nadam_default_eps": Row(NADAM, _NADAM | {"eps": 1e-8}, _NADAM2, ("lr", "weight_decay", "betas")),
    "radam_default_eps": Row(RADAM, _ADAM | {"eps": 1e-8}, _ADAM2, ("lr", "weight_decay", "betas")),
    "adagrad_at_zero_small_eps": Row(ADAGRAD, {"lr": 0.02, "eps": 1e-3}, {"lr": 0.01}, ("weight_decay",)),
    "nadam_at_zero_small_eps": Row(NADAM, _ADAM | _NO_DECAY | {"eps": 1e-3}, _ADAM2 | _NO_DECAY, ("weight_decay",)),
    "rmsprop_at_zero_small_eps": Row(RMSPROP, _RMS | _NO_DECAY | {"eps": 1e-3}, _RMS2 | _NO_DECAY, ("weight_decay",)),
}
EVERY_PROBLEM_WITH = ("momentum", "adamw", "adam", "rmsprop_momentum")
# in the middle of a run, with parameters that have no gradient and with rows whose gradients are 0
RESUMED_WITH = ("adagrad", "adamax", "nadam", "nadam_decoupled", "radam", "radam_decoupled", "adadelta")
RESUMED_WITH += ("adafactor", "lion", "lamb")


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

    def arithmetic(self) -> AbstractContextManager[Any]:
        """Where the case is computed: Muon's bfloat16 is float64, which is what is differentiated."""
        return Promote() if self.row.cls is MUON else nullcontext()

    @property
    def clip(self) -> dict[str, float]:
        both = {"clip_norm": self.clip_norm, "clip_value": self.clip_value}
        return {name: m for name, m in both.items() if m is not None}

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.row.wrt, *self.clip) if self.wrt is None else self.wrt

    def build(self) -> Setup:
        """A fresh model and optimizer, always the same, at the start of the trajectory."""
        torch.set_default_dtype(torch.float32)  # in which the problems draw their weights
        setup = PROBLEMS[self.problem]()
        torch.set_default_dtype(torch.float64)  # of NAdam's mu_product, in torch; conftest.py puts it back
        with self.arithmetic():
            self._start(setup)
        return setup

    def _start(self, setup: Setup) -> None:
        """Make the optimizer and take the steps before the trajectory."""
        setup.optimizer = self.row.make(setup.groups)
        for i in range(setup.warm_up):
            setup.optimizer.zero_grad()
            setup.loss(setup.model, setup.batches[-1 - i]).backward()
            setup.optimizer.step()
        torch.manual_seed(7)  # what dropout draws from

    def __str__(self) -> str:
        extras = [*self.clip, *(["per_step"] if self.per_step else []), *(["val_steps"] if self.val_steps else [])]
        return "-".join([self.problem, self.optimizer, *extras])


def case_of(optimizer: str) -> Case:
    """An optimizer on a small problem that it can train."""
    return Case("matrices" if optimizer.startswith("muon") else "mlp", optimizer)


MODES: dict[str, dict[str, Any]] = {
    "forward": {"mode": "forward"},
    "graphs kept": {"mode": "unrolled"},
    "every second step": {"mode": "unrolled", "every": 2},
    "one checkpoint": {"mode": "unrolled", "every": STEPS + 4},
}
