"""The work of the benchmarks of modes: a model, an optimizer and batches of random data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments import bench_gpt

Answer = tuple[float, float]  # dL/dlr, dL/dwd
Call = Callable[[], Answer | None]
MOMENTUM, WEIGHT_DECAY, EPS = 0.9, 1e-3, 1e-8


class Case:
    """A model, an optimizer and K batches of random data; everything the same at every call."""

    def __init__(self, name: str, steps: int, device: str, dtype: torch.dtype = torch.float32):
        kind, self.rule = name.split("_")
        torch.manual_seed(0)
        self.model = MODELS[kind]().to(device, dtype)
        self.lr, self.steps = {"sgd": 0.02, "adam": 1e-3}[self.rule], steps
        x, y = DATA[kind]()
        distinct = [(x.roll(i, -1), y.roll(i)) for i in range(min(steps, 20))]
        move = lambda a: a.to(device, dtype) if a.is_floating_point() else a.to(device)  # noqa: E731
        self.batches = [tuple(move(a) for a in distinct[i % len(distinct)]) for i in range(steps)]
        self.held_out = tuple(move(a) for a in (x.flip(0), y))
        self.params = list(self.model.parameters())
        self.compile_seconds = 0.0  # by all calls so far

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(model(batch[0]), batch[1])

    def loss_at(self, theta: Sequence[Tensor], batch: Any) -> Tensor:
        """The loss as a function of the parameters, for methods that are functional."""
        named = dict(zip((name for name, _ in self.model.named_parameters()), theta, strict=True))
        return self.loss(lambda x: torch.func.functional_call(self.model, named, (x,)), batch)  # type: ignore[arg-type]

    def leaves(self) -> tuple[Tensor, Tensor]:
        """lr and weight decay as tensors to be differentiated in."""
        p = self.params[0]
        lr, wd = (torch.tensor(x, dtype=p.dtype, device=p.device, requires_grad=True) for x in (self.lr, WEIGHT_DECAY))
        return lr, wd

    def optimizer(self) -> torch.optim.Optimizer:
        if self.rule == "sgd":
            return torch.optim.SGD(self.params, lr=self.lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
        return torch.optim.Adam(self.params, lr=self.lr, weight_decay=WEIGHT_DECAY, eps=EPS)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def _cnn() -> nn.Module:
    layers = nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
    more = nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
    return nn.Sequential(*layers, *more, nn.Flatten(), nn.Linear(32 * 49, 10))


def _noise(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(*shape), torch.randint(0, 10, shape[:1])


def _deep() -> nn.Module:
    """Sixteen narrow layers: 32 small tensors."""
    layers = [layer for _ in range(15) for layer in (nn.Linear(64, 64), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(64, 10))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": _mlp,
    "cnn": _cnn,
    "deep": _deep,
    "gpt": lambda: bench_gpt.GPT(bench_gpt.FULL),
    "tinygpt": lambda: bench_gpt.GPT(bench_gpt.TINY),
}
DATA: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "mlp": lambda: _noise(128, 784),
    "cnn": lambda: _noise(64, 1, 28, 28),
    "deep": lambda: _noise(128, 64),
    "gpt": lambda: bench_gpt.data(bench_gpt.FULL),
    "tinygpt": lambda: bench_gpt.data(bench_gpt.TINY),
}
