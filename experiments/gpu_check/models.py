"""What `speed` trains: an MLP, a ResNet-18 for images of 32×32, a GPT; on made-up data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments import bench_gpt

Batch = tuple[Tensor, Tensor]


class Residual(nn.Module):
    """Two 3×3 convolutions beside the identity, or beside a 1×1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.beside: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.beside = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        inside = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return (inside + self.beside(x)).relu()


def resnet18(width: int = 64, classes: int = 10, channels: int = 3) -> nn.Module:
    """ResNet-18 as it is used on CIFAR (He et al. 2016): a first convolution of 3×3 at stride 1, and no pooling after it."""
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    inputs = width
    for i in range(4):
        outputs = width * 2**i
        layers += [Residual(inputs, outputs, 1 if i == 0 else 2), Residual(outputs, outputs, 1)]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


class Workload(NamedTuple):
    """A net, its data and its optimizer; `steps` is K of `hypergradient`, `run` the steps of a whole tuned run."""

    model: Callable[[bool], nn.Module]  # of whether it is to be tiny
    batch: Callable[[bool], Batch]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    steps: int
    block: int  # steps between two looks at the clock
    run: int
    bf16: bool = False
    channels_last: bool = False

    def build(self, device: str, quick: bool) -> tuple[nn.Module, Callable[[], Tensor], Callable[[], Tensor]]:
        """The net and its losses of a training batch and of a validation batch, on the device."""
        torch.manual_seed(0)
        with torch.device(device):
            model, train, val = self.model(quick), self.batch(quick), self.batch(quick)
        if self.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            train, val = ((x.to(memory_format=torch.channels_last), y) for x, y in (train, val))
        kind = torch.device(device).type

        def loss_of(x: Tensor, y: Tensor) -> Tensor:
            with torch.autocast(kind, torch.bfloat16, enabled=self.bf16):
                return cross_entropy(model(x), y)

        return model, lambda: loss_of(*train), lambda: loss_of(*val)


def _mlp(quick: bool) -> nn.Module:
    sizes = (8, 8, 8, 3) if quick else (784, 256, 256, 10)
    return nn.Sequential(
        nn.Linear(sizes[0], sizes[1]),
        nn.ReLU(),
        nn.Linear(sizes[1], sizes[2]),
        nn.ReLU(),
        nn.Linear(sizes[2], sizes[3]),
    )


def _vectors(quick: bool) -> Batch:
    return (torch.randn(4, 8), torch.randint(3, (4,))) if quick else (torch.randn(128, 784), torch.randint(10, (128,)))


def _images(quick: bool) -> Batch:
    n, size = (4, 16) if quick else (512, 32)
    return torch.randn(n, 3, size, size), torch.randint(10, (n,))


def _size(quick: bool) -> bench_gpt.Size:
    return bench_gpt.TINY if quick else bench_gpt.FULL


def _momentum(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.01, momentum=0.9, weight_decay=5e-4)


def _adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-4, weight_decay=0.01)


WORKLOADS: dict[str, Workload] = {
    "MLP, SGD with momentum": Workload(_mlp, _vectors, _momentum, steps=100, block=40, run=2000),
    "MLP, AdamW": Workload(_mlp, _vectors, _adamw, steps=100, block=40, run=2000),
    "ResNet-18, bf16": Workload(
        lambda quick: resnet18(4 if quick else 64), _images, _momentum, 5, 10, 400, bf16=True, channels_last=True
    ),
    "GPT of 124 M weights, bf16": Workload(
        lambda quick: bench_gpt.GPT(_size(quick)),
        lambda quick: bench_gpt.data(_size(quick)),
        _adamw,
        3,
        10,
        300,
        bf16=True,
    ),
}
