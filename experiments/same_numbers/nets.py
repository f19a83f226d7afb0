"""Small nets, data and optimizers that the cases are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
INPUTS, WIDTH, CLASSES, ROWS = 10, 16, 3, 64


def rows(seed: int = 0, dtype: torch.dtype = torch.float32) -> Batch:
    """Normal inputs, labels at random."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, INPUTS, generator=random)
    return x.to(dtype), torch.randint(CLASSES, (ROWS,), generator=random)


def net(batch_norm: bool = False, bias: bool = True) -> nn.Sequential:
    """The same at every call; torch's random numbers go on from there."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(INPUTS, WIDTH, bias),
        *([nn.BatchNorm1d(WIDTH)] if batch_norm else []),
        nn.ReLU(),
        nn.Linear(WIDTH, WIDTH, bias),
        nn.Tanh(),
        nn.Linear(WIDTH, CLASSES, bias),
    )


def linear() -> nn.Linear:
    """A model whose loss is convex."""
    torch.manual_seed(1)
    return nn.Linear(INPUTS, CLASSES)


class SignedMean(torch.optim.Optimizer):
    """An optimizer that hypergrad has no update rule for: p ← p (1 − η w) − η m/(|m| + ε), m the mean of gradients."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, weight_decay: float = 0.0, beta: float = 0.9):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "beta": beta})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["mean"] = torch.zeros_like(p)
                mean = state["mean"]
                mean.mul_(group["beta"]).add_(p.grad, alpha=1 - group["beta"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.addcdiv_(mean, mean.abs().add(0.1), value=-group["lr"])


def sgd(params: Iterable[Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=1e-4, momentum=0.9, weight_decay=1e-4)


def plain_sgd(params: Iterable[Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=1e-3, momentum=0.5)


def adamw(params: Iterable[Any]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-4)


def adam(params: Iterable[Any]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=1e-4, weight_decay=1e-4)


def own(params: Iterable[Any]) -> torch.optim.Optimizer:
    return SignedMean(params, lr=1e-4, weight_decay=1e-4)


OPTIMIZERS: dict[str, Callable[[Iterable[Any]], torch.optim.Optimizer]] = {
    "sgd": sgd,
    "adamw": adamw,
    "adam": adam,
    "own": own,
}
