"""Third-party optimizers for test_fallback.py: one row each. Those whose package is absent are skipped."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor


@dataclass(frozen=True)
class Foreign:
    """An optimizer by name, its numbers and what it is differentiated in. A second group has another lr.

    Args:
        one_group: the optimizer wants one lr for all parameters.
        trains: it has to be told that it trains (schedulefree).
    """

    package: str
    name: str
    first: dict[str, Any]
    wrt: tuple[str, ...]
    one_group: bool = False
    trains: bool = False
    problem: str = "mlp"  # with dead units, whose gradients are exactly 0
    second: dict[str, Any] = field(default_factory=lambda: {"lr": 0.03})

    def skip_if_absent(self) -> None:
        pytest.importorskip(self.package, reason=f"{self.package} is not installed: pip install -e '.[bench]'")

    def make(self, groups: list[list[Tensor]]) -> torch.optim.Optimizer:
        cls = getattr(importlib.import_module(self.package), self.name)
        if self.one_group:
            return cls([p for group in groups for p in group], **self.first)
        optimizer = cls([{"params": groups[0]}, {"params": groups[1], **self.second}], **self.first)
        if self.trains:
            optimizer.train()
        return optimizer


_DECAY = {"lr": 0.02, "weight_decay": 0.02}
_ADAM = _DECAY | {"betas": (0.8, 0.9), "eps": 1e-2}  # eps: large enough for finite differences
_OF_DECAY = ("lr", "weight_decay")
_OF_ADAM = (*_OF_DECAY, "betas", "eps")


def _row(name: str, first: dict[str, Any], wrt: tuple[str, ...]) -> Foreign:
    return Foreign("pytorch_optimizer", name, first, wrt)


_PRODIGY = {"lr": 1.0, "weight_decay": 0.02, "betas": (0.8, 0.9), "d0": 1e-2}
THIRD_PARTY: dict[str, Foreign] = {
    "AdaBelief": _row("AdaBelief", _ADAM, _OF_ADAM),
    "AdamP": _row("AdamP", _ADAM, _OF_ADAM),
    "AdaPNM": _row("AdaPNM", _DECAY | {"eps": 1e-2}, (*_OF_DECAY, "eps")),
    "AdaBound": _row("AdaBound", _ADAM, (*_OF_ADAM, "final_lr", "gamma")),
    # 1e15 times gradients that are exactly 0: its derivative at a dead unit is ill-conditioned
    "AdaFactor": Foreign(
        "pytorch_optimizer", "AdaFactor", _DECAY | {"momentum_dtype": torch.float64}, _OF_DECAY, problem="ridge"
    ),
    "Adan": _row("Adan", _DECAY | {"eps": 1e-2}, (*_OF_DECAY, "eps")),
    "AdEMAMix": _row("AdEMAMix", _DECAY | {"eps": 1e-2}, (*_OF_DECAY, "eps")),
    "ADOPT": _row("ADOPT", _ADAM, _OF_ADAM),
    "CAME": _row("CAME", _DECAY, _OF_DECAY),
    "DiffGrad": _row("DiffGrad", _ADAM, _OF_ADAM),
    "Lamb": _row("Lamb", _ADAM, _OF_ADAM),
    "LARS": _row("LARS", _DECAY | {"momentum": 0.8}, (*_OF_DECAY, "momentum")),
    "Lion": _row("Lion", _DECAY | {"betas": (0.8, 0.9)}, (*_OF_DECAY, "betas")),
    "MADGRAD": _row("MADGRAD", _DECAY | {"eps": 1e-2}, (*_OF_DECAY, "eps", "momentum")),
    "NovoGrad": _row("NovoGrad", _ADAM, _OF_ADAM),
    "QHAdam": _row("QHAdam", _ADAM, (*_OF_DECAY, "eps")),  # it keeps sums of powers of betas in float32
    "StableAdamW": _row("StableAdamW", _ADAM, _OF_ADAM),
    "Tiger": _row("Tiger", _DECAY, _OF_DECAY),
    "Yogi": _row("Yogi", _ADAM | {"lr": 0.025}, _OF_ADAM),
    "schedulefree SGD": Foreign(
        "schedulefree", "SGDScheduleFree", {"lr": 0.2, "weight_decay": 0.02}, (*_OF_DECAY, "momentum"), trains=True
    ),
    "schedulefree AdamW": Foreign(
        "schedulefree", "AdamWScheduleFree", _ADAM | {"warmup_steps": 4, "r": 0.5}, (*_OF_ADAM, "r"), trains=True
    ),
    "schedulefree RAdam": Foreign("schedulefree", "RAdamScheduleFree", _ADAM, _OF_ADAM, trains=True),
    "Prodigy": Foreign("prodigyopt", "Prodigy", _PRODIGY, (*_OF_ADAM, "d0", "d_coef"), one_group=True),
    "Prodigy, all flags": Foreign(
        "prodigyopt",
        "Prodigy",
        _PRODIGY | {"eps": 1e-3, "use_bias_correction": True, "safeguard_warmup": True, "decouple": False},
        (*_OF_ADAM, "d_coef"),
        one_group=True,
    ),
}
