"""Live loops that a tuner is attached to, and central differences of the same loops with torch alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hypergrad
from tests import references

as_given = partial(hypergrad.Tuner, warm_start=False)  # lr starts from the optimizer's own


STEPS = 12


FD_RTOL = 1e-6  # central differences in float64, Richardson-extrapolated


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def two_layers(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1))
    model[0].bias.requires_grad_(False)
    return model


def groups(model: nn.Sequential) -> list[dict[str, Any]]:
    return [{"params": list(model[0].parameters())}, {"params": list(model[3].parameters()), "lr": 0.03}]


def data() -> tuple[list[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    make = lambda n: (torch.randn(n, 5, generator=g), torch.randn(n, 1, generator=g))  # noqa: E731
    return [make(6) for _ in range(STEPS)], make(9)


def mse(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return ((model(batch[0]) - batch[1]) ** 2).mean()


@dataclass
class Loop:
    """A user's loop: how its optimizer is made and what one step of it does with a `backward`."""

    optimizer: Callable[[nn.Sequential], torch.optim.Optimizer]
    wrt: tuple[str, ...] = ("lr", "weight_decay")
    clip_norm: float | None = None
    accumulate: int = 1
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None
    scaler: bool = False
    set_to_none: bool = True
    tuner: dict[str, Any] = field(default_factory=dict)

    def run(self, model: nn.Sequential, opt: Any, backward: Callable[[Tensor], None], scaler: Any = None) -> None:
        batches, _ = data()
        scheduler = self.scheduler(opt) if self.scheduler else None
        torch.manual_seed(7)
        for batch in batches:
            opt.zero_grad(set_to_none=self.set_to_none)
            for part in range(self.accumulate):
                rows = slice(part * 6 // self.accumulate, (part + 1) * 6 // self.accumulate)
                loss = mse(model, (batch[0][rows], batch[1][rows])) / self.accumulate
                backward(loss if scaler is None else scaler.scale(loss))
            if self.clip_norm is not None:
                if scaler is not None:
                    scaler.unscale_(opt)
                nn.utils.clip_grad_norm_(model.parameters(), self.clip_norm)
            opt.step() if scaler is None else scaler.step(opt)
            if scaler is not None:
                scaler.update()
            if scheduler is not None:
                scheduler.step()


def validation(model: nn.Module) -> Callable[[], Tensor]:
    _, batch = data()
    return lambda: mse(model, batch)


def plain_run(loop: Loop, name: str, group: int, part: int | None, delta: float) -> float:
    """The validation loss after the user's loop with one number changed by `delta`."""
    model = two_layers()
    opt = loop.optimizer(model)
    value = opt.param_groups[group][name]
    changed = value + delta if part is None else tuple(v + delta * (i == part) for i, v in enumerate(value))
    opt.param_groups[group][name] = changed
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0) if loop.scaler else None
    loop.run(model, opt, lambda loss: loss.backward(), scaler)
    torch.manual_seed(11)
    return validation(model)().item()


def difference(loop: Loop, name: str, group: int, part: int | None) -> float:
    def central(h: float) -> float:
        return (plain_run(loop, name, group, part, h) - plain_run(loop, name, group, part, -h)) / (2 * h)

    h = 2e-5
    return (4 * central(h / 2) - central(h)) / 3


def sgd(**kw: Any) -> Callable[[nn.Sequential], torch.optim.Optimizer]:
    return lambda model: torch.optim.SGD(groups(model), **{"lr": 0.05, "weight_decay": 0.01, **kw})


def cosine(opt: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=2 * STEPS)


LOOPS = {
    "sgd": Loop(sgd()),
    "momentum": Loop(sgd(momentum=0.9, nesterov=True), wrt=("lr", "weight_decay", "momentum")),
    "adamw": Loop(
        lambda m: torch.optim.AdamW(groups(m), lr=0.01, eps=1e-4, weight_decay=0.1), wrt=("lr", "weight_decay", "betas")
    ),
    "rmsprop": Loop(lambda m: torch.optim.RMSprop(groups(m), lr=0.01, eps=1e-2, weight_decay=0.1)),
    "adagrad": Loop(
        lambda m: torch.optim.Adagrad(groups(m), lr=0.05, weight_decay=0.1), wrt=("lr", "weight_decay", "eps")
    ),
    "adamax": Loop(
        lambda m: torch.optim.Adamax(groups(m), lr=0.02, weight_decay=0.1), wrt=("lr", "weight_decay", "betas")
    ),
    "nadam": Loop(
        lambda m: torch.optim.NAdam(groups(m), lr=0.01, eps=1e-4, weight_decay=0.1),
        wrt=("lr", "betas", "momentum_decay"),
    ),
    "radam": Loop(
        lambda m: torch.optim.RAdam(groups(m), lr=0.01, eps=1e-4, weight_decay=0.1, decoupled_weight_decay=True),
        wrt=("lr", "weight_decay", "betas"),
    ),
    "adadelta": Loop(
        lambda m: torch.optim.Adadelta(groups(m), lr=0.5, weight_decay=0.1), wrt=("lr", "weight_decay", "rho")
    ),
    "adafactor": Loop(
        lambda m: torch.optim.Adafactor(groups(m), lr=0.05, weight_decay=0.1), wrt=("lr", "weight_decay", "beta2_decay")
    ),
    "lion": Loop(lambda m: references.Lion(groups(m), lr=0.01, weight_decay=0.1)),
    "lamb": Loop(lambda m: references.Lamb(groups(m), lr=0.01, weight_decay=0.1), wrt=("lr", "weight_decay", "betas")),
    "clipped": Loop(sgd(momentum=0.8), clip_norm=0.5),
    "clipped now and then": Loop(sgd(), clip_norm=1.5),
    "accumulated": Loop(sgd(momentum=0.8), accumulate=3),
    "accumulated, zeros": Loop(sgd(momentum=0.8), accumulate=2, set_to_none=False),
    "scaled": Loop(sgd(momentum=0.8), scaler=True),
    "scaled, fused": Loop(
        lambda m: torch.optim.AdamW(groups(m), lr=0.01, eps=1e-4, weight_decay=0.1, fused=True), scaler=True
    ),
    "scaled and clipped": Loop(sgd(momentum=0.8), scaler=True, clip_norm=0.5),
}


def attach(loop: Loop, model: nn.Sequential, opt: Any, **kw: Any) -> tuple[hypergrad.Tuner, Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0) if loop.scaler else None
    validate = validation(model)

    def val_loss() -> Tensor:
        torch.manual_seed(11)
        return validate()

    options = {"every": STEPS, "average": False, "clip_norm": loop.clip_norm, "scaler": scaler, **loop.tuner, **kw}
    return as_given(model, opt, val_loss, tune=loop.wrt, **options), scaler


def slope(f: Callable[[float], float], h: float = 2e-5) -> float:
    """df/dx at 0: central differences, extrapolated."""
    a, b = [(f(x) - f(-x)) / (2 * x) for x in (h, h / 2)]
    return (4 * b - a) / 3


Backward = Callable[[Tensor], None]
Train = Callable[[nn.Module, Any, Backward], None]


def matches_differences(
    make: Callable[[], tuple[Any, Any]], train: Train, wrt: tuple[str, ...] = ("lr", "weight_decay"), **options: Any
) -> hypergrad.Tuner:
    """Assert that every hypergradient of a loop is the finite difference of that loop without a tuner."""

    def ends_at(change: Callable[[Any], None]) -> float:
        model, opt = make()
        change(opt)
        torch.manual_seed(7)
        train(model, opt, Tensor.backward)
        torch.manual_seed(11)
        return validation(model)().item()

    model, opt = make()
    validate = validation(model)

    def val_loss() -> Tensor:
        torch.manual_seed(11)
        return validate()

    tuner = as_given(model, opt, val_loss, tune=wrt, **{"every": STEPS, "average": False, **options})
    torch.manual_seed(7)
    train(model, opt, tuner.backward)
    assert tuner.stats["plain_steps"] == tuner.stats["changed_gradients"] == tuner.stats["capped"] == 0
    for name, gradient in tuner.hypergradients.items():
        for i, got in enumerate(gradient.tolist()):

            def at(x: float, name: str = name, i: int = i) -> float:
                return ends_at(lambda opt: opt.param_groups[i].update({name: opt.param_groups[i][name] + x}))

            assert got == pytest.approx(slope(at), rel=FD_RTOL), (name, i)
    return tuner


def ordinary(model: nn.Module, opt: Any, backward: Backward, set_to_none: bool = True) -> None:
    for batch in data()[0]:
        opt.zero_grad(set_to_none=set_to_none)
        backward(mse(model, batch))
        opt.step()


CURVATURES = torch.tensor([1.0, 0.3, 0.1])


class Bowl(nn.Module):
    """½ Σ h θ²: every batch is the same, so that the best lr along the steps is known."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.ones(3))

    def forward(self) -> Tensor:
        return 0.5 * (CURVATURES * self.theta**2).sum()
