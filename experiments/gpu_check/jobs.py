"""Small problems in float64, the same numbers on every device, and how their hypergradients are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hypergrad
from hypergrad.checks.precision import Promote

SAME = 1e-9  # relative, in float64: the same sums in another order, through some ten steps
STEPS = 8  # RAdam is rectified from step 6 on

Batch = tuple[Tensor, Tensor]


class Softsign(torch.optim.Optimizer):
    """Lion with m/(|m| + ε) for its sign, so that it has a derivative. hypergrad has no rule of it: it takes its own step."""

    def __init__(self, params: Iterable[Any], **numbers: float):
        super().__init__(params, {"lr": 1e-2, "weight_decay": 0.0, "beta": 0.9, "eps": 0.1} | numbers)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                    m.lerp_(p.grad, 1 - group["beta"])
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.addcdiv_(m, m.abs().add_(group["eps"]), value=-group["lr"])


class OwnNumber(Softsign):
    """The same with ε an average of |g|: a Python float that is the optimizer's state, as Prodigy's d is."""

    def __init__(self, params: Iterable[Any], **numbers: float):
        super().__init__(params, **({"d": 0.1} | numbers))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            sizes = [p.grad.abs().mean().item() for p in group["params"] if p.grad is not None]
            group["d"] = 0.9 * group["d"] + 0.1 * sum(sizes) / len(sizes)
            for p in group["params"]:
                if p.grad is not None:
                    p.addcdiv_(p.grad, p.grad.abs().add_(group["d"]), value=-group["lr"])


class Rule(NamedTuple):
    """An optimizer with its numbers; the second of its param groups has another lr."""

    cls: type[torch.optim.Optimizer]
    numbers: dict[str, Any]
    wrt: tuple[str, ...]

    def make(self, model: nn.Module) -> torch.optim.Optimizer:
        params = list(model.parameters())
        half = len(params) // 2
        groups = [{"params": params[:half]}, {"params": params[half:], "lr": self.numbers["lr"] / 2}]
        return self.cls(groups, **self.numbers)  # type: ignore[call-arg]


_MOMENTUM = {"lr": 0.1, "weight_decay": 0.02, "momentum": 0.8}
_ADAM = {"lr": 0.02, "weight_decay": 0.02, "betas": (0.8, 0.9), "eps": 1e-2}
_OF_ADAM = ("lr", "weight_decay", "betas", "eps")
RULES: dict[str, Rule] = {
    "SGD with momentum": Rule(torch.optim.SGD, _MOMENTUM, ("lr", "weight_decay", "momentum")),
    "AdamW": Rule(torch.optim.AdamW, _ADAM, _OF_ADAM),
    "Adam": Rule(torch.optim.Adam, _ADAM, _OF_ADAM),
    "SGD with Nesterov momentum": Rule(
        torch.optim.SGD, _MOMENTUM | {"nesterov": True}, ("lr", "weight_decay", "momentum")
    ),
    "Muon": Rule(torch.optim.Muon, _MOMENTUM, ("lr", "weight_decay", "momentum")),
    "an optimizer without a rule": Rule(Softsign, {"lr": 0.02, "weight_decay": 0.02}, ("lr", "weight_decay", "beta")),
    "one with a number of its own": Rule(OwnNumber, {"lr": 0.02}, ("lr",)),
    "RMSprop": Rule(
        torch.optim.RMSprop,
        {"lr": 0.02, "weight_decay": 0.02, "alpha": 0.8, "eps": 1e-2},
        ("lr", "weight_decay", "alpha"),
    ),
    "Adagrad": Rule(torch.optim.Adagrad, {"lr": 0.1, "weight_decay": 0.02, "eps": 1e-2}, ("lr", "weight_decay")),
    "NAdam": Rule(torch.optim.NAdam, _ADAM, _OF_ADAM),
    "RAdam": Rule(torch.optim.RAdam, _ADAM, _OF_ADAM),
}
MODES: dict[str, dict[str, Any]] = {
    "graphs kept": {},
    "forward": {"mode": "forward"},
    "every=2": {"every": 2},
    "graph_memory=0": {"graph_memory": 0},
}


class Job(NamedTuple):
    """What `hypergradient` takes."""

    model: nn.Module
    optimizer: Any
    loss: Callable[[nn.Module, Any], Tensor]
    batches: list[Any]
    val_loss: Callable[[], Tensor]
    wrt: tuple[str, ...]

    def hypergradient(self, **options: Any) -> hypergrad.Result:
        return hypergrad.hypergradient(*self[:5], wrt=self.wrt, **options)

    def step(self, batch: Any) -> None:
        """One plain training step, of every optimizer."""
        optimizers = self.optimizer if isinstance(self.optimizer, list) else [self.optimizer]
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.loss(self.model, batch).backward()
        for optimizer in optimizers:
            optimizer.step()


def ce(model: nn.Module, batch: Batch) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def classifier(
    build: Callable[[], nn.Module],
    optimizer: Callable[[nn.Module], Any],
    shape: tuple[int, ...],
    device: str,
    wrt: tuple[str, ...] = ("lr", "weight_decay"),
    steps: int = STEPS,
    dtype: torch.dtype = torch.float64,
) -> Job:
    """A net with three classes on made-up inputs of `shape`. Weights and data are drawn on the CPU."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    model = build().to(device=device, dtype=dtype)
    torch.set_default_dtype(dtype)  # in which NAdam keeps a number of its own
    random = torch.Generator().manual_seed(1)

    def batch() -> Batch:
        x = torch.randn(12, *shape, generator=random, dtype=torch.float64)
        return x.to(device=device, dtype=dtype), torch.randint(3, (12,), generator=random).to(device)

    val = batch()
    return Job(model, optimizer(model), ce, [batch() for _ in range(steps)], lambda: ce(model, val), wrt)


def two_layers(bias: bool = True) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6, bias=bias), nn.Tanh(), nn.Linear(6, 3, bias=bias))


def of_rule(name: str, device: str, **options: Any) -> hypergrad.Result:
    """The hypergradient of a stretch of training with a rule, from the middle of a run."""
    rule, muon = RULES[name], name == "Muon"  # which takes matrices alone, and rounds to bfloat16 in its step
    job = classifier(lambda: two_layers(bias=not muon), rule.make, (5,), device, rule.wrt)
    if not muon:
        job.step(job.batches[-1])
        return job.hypergradient(**options)
    with Promote():
        job.step(job.batches[-1])
        return job.hypergradient(**options)


@cache
def truth(name: str) -> hypergrad.Result:
    """`of_rule` on the CPU, graphs kept."""
    return of_rule(name, "cpu")


def difference(found: hypergrad.Result, true: hypergrad.Result) -> float:
    """The largest relative difference of value and gradients."""
    pairs = [(found.value, true.value), *((found.gradients[name], x) for name, x in true.gradients.items())]
    off = [float((a.cpu() - b.cpu()).abs().max() / b.abs().max()) for a, b in pairs]
    return max(off) if all(x == x for x in off) else float("nan")


def same(found: hypergrad.Result, true: hypergrad.Result, tolerance: float = SAME) -> float:
    """The difference, which is an error beyond the tolerance."""
    off = difference(found, true)
    if not off <= tolerance:
        raise AssertionError(f"differs by {off:.1e}, relative; {tolerance:.0e} is allowed")
    return off
