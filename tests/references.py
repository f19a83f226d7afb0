"""Optimizers of other packages, written out plainly, so that their rules are tested where the packages are not installed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hypergrad.optimizers.registry import RULES
from hypergrad.optimizers.rules.lamb import Lamb as LambRule
from hypergrad.optimizers.rules.lion import Lion as LionRule

_NUMBERS = {"weight_decay": 0.0, "weight_decouple": True, "fixed_decay": False}


class _Counting(torch.optim.Optimizer):
    """A step of one parameter at a time; steps are counted by group, as in pytorch_optimizer."""

    defaults_of: dict[str, Any]

    def __init__(self, params: Any, maximize: bool = False, **numbers: Any):
        self.maximize = maximize
        super().__init__(params, _NUMBERS | self.defaults_of | numbers)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                if p.grad is not None:
                    g = -p.grad if self.maximize else p.grad
                    p.copy_(self.update(p, g, self.state[p], group))

    def update(self, p: Tensor, g: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        raise NotImplementedError


def _decayed(p: Tensor, group: dict[str, Any]) -> Tensor:
    if not group["weight_decouple"]:
        return p
    return p - p * group["weight_decay"] * (1 if group["fixed_decay"] else group["lr"])


class Lion(_Counting):
    """arXiv 2302.06675, algorithm 2."""

    defaults_of = {"lr": 1e-4, "betas": (0.9, 0.99)}  # noqa: RUF012

    def update(self, p: Tensor, g: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        m, (b1, b2) = state.setdefault("exp_avg", torch.zeros_like(p)), group["betas"]
        if not group["weight_decouple"]:
            g = g + group["weight_decay"] * p
        sign = torch.sign(b1 * m + (1 - b1) * g)
        state["exp_avg"] = b2 * m + (1 - b2) * g
        return _decayed(p, group) - group["lr"] * sign


class Lamb(_Counting):
    """arXiv 1904.00962, algorithm 2, with the bias correction of the first moment alone."""

    defaults_of = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-6, "grad_averaging": True, "adam": False}  # noqa: RUF012

    def update(self, p: Tensor, g: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        (b1, b2), eps = group["betas"], group["eps"]
        m, v = (state.setdefault(name, torch.zeros_like(p)) for name in ("exp_avg", "exp_avg_sq"))
        state["exp_avg"] = m = b1 * m + (1 - b1 if group["grad_averaging"] else 1) * g
        state["exp_avg_sq"] = v = b2 * v + (1 - b2) * g**2
        q, u = _decayed(p, group), m / (v**0.5 + eps)
        if not group["weight_decouple"]:
            u = u + group["weight_decay"] * q
        a, b = min(float(q.norm()), 10.0), float(u.norm())
        trust = 1.0 if group["adam"] or a == 0 or b == 0 else a / (b + eps)
        correction = 1.0 if group.get("adam_debias") else 1 - b1 ** group["step"]
        return q - group["lr"] / correction * trust * u


class ScheduleFree(torch.optim.Optimizer):
    """Schedule-free SGD (Defazio et al. 2024, arXiv 2405.15682): parameters hold y, where gradients are taken; in eval mode x.

        z ← z − lr g,   x ← (1 − 1/t) x + z/t,   y = (1 − β) z + β x

    silently: write by way of `.data`, which autograd does not count.
    """

    def __init__(self, params: Any, lr: float, beta: float = 0.9, silently: bool = False):
        self.silently = silently
        super().__init__(params, {"lr": lr, "beta": beta, "train_mode": True})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta, lr = group["beta"], group["lr"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["t"], state["z"] = torch.tensor(0.0), p.clone()
                state["t"] += 1
                x = (p - (1 - beta) * state["z"]) / beta
                state["z"].sub_(lr * p.grad)
                x = x + (state["z"] - x) / state["t"]
                p.copy_((1 - beta) * state["z"] + beta * x)

    @torch.no_grad()
    def _move(self, train: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] != train:
                weight = 1 - group["beta"] if train else 1 - 1 / group["beta"]
                for p in group["params"]:
                    if "z" in self.state[p]:
                        (p.data if self.silently else p).lerp_(self.state[p]["z"], weight)
                group["train_mode"] = train

    def eval(self) -> None:
        self._move(False)

    def train(self) -> None:
        self._move(True)


def third_party(name: str) -> type[torch.optim.Optimizer]:
    """A class of another package by its dotted name; the test is skipped where the package is not installed."""
    module, _, cls = name.rpartition(".")
    return getattr(pytest.importorskip(module, reason=f"pip install {module.replace('_', '-')} to test its {cls}"), cls)


RULES |= {Lion: LionRule, Lamb: LambRule}
