"""ResNet-18 on Fashion-MNIST or CIFAR-10: tuned runs beside the best of a grid and torch's default, on a GPU.

    python -m experiments.resnet [--minutes 5] [--data cifar10] [--data-dir DIR] [--device cpu] [--quick]

Fashion-MNIST as `datasets.fashion_mnist` finds it, CIFAR-10 by torchvision's own download, or from where that put it before
(`--data-dir`). Images are shifted and mirrored at random, batches and weights are channels_last, the optimizer is SGD with
momentum 0.9, and readings of val_loss have BatchNorm in the mode that it trains in. Which runs, and what their rows have:
real_runs.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from experiments import datasets, real_runs
from experiments.arguments import arg, parse
from experiments.datasets import Data, Split
from experiments.gpu_check.models import resnet18
from experiments.real_runs import Batch, Common, Row, Training
from experiments.workloads.realistic import shifted

SHIFT = {"fashion": 2, "cifar10": 4}  # pixels
CHUNK = 1000  # images of a forward pass of evaluate()


@dataclass
class Args(Common):
    """Train a ResNet-18 tuned, by a tuned run's recipe, by torch's default and over a grid. Finished runs are kept."""

    data: str = arg("fashion", "fashion or cifar10")
    data_dir: str = arg(None, "folder of the set (default: a cache, Debian's package, torchvision's download)")
    width: int = arg(64, "channels of the first layer; 64 has 11 million weights", quick=2)
    batch: int = arg(512, "images of a training batch", quick=8)
    train: int = arg(0, "training images; 0: all", quick=64)
    held_out: int = arg(0, "validation images, and as many for the test; 0: all", quick=32)
    grid_lr: tuple = arg(
        (0.1, 0.3, 0.03, 1.0, 0.01), "learning rates of the grid, in their order; 0: none", quick=(0.1,)
    )
    grid_wd: tuple = arg((5e-4, 5e-3, 5e-5), "weight decays of the grid, in their order", quick=(5e-4, 5e-5))
    out: str = arg("runs/resnet", "folder of finished runs, result and logs", quick="runs/resnet_quick")


@cache
def images(data: str, data_dir: str | None, device: str, train: int, held_out: int) -> Data:
    """The set as images [n, c, h, w] on the device."""
    if data == "cifar10":
        whole = datasets.cifar10(data_dir)
    else:
        whole = Data(*(Split(x.view(-1, 1, 28, 28), y) for x, y in datasets.fashion_mnist(data_dir)))
    sizes = (train or None, held_out or None, held_out or None)
    few = Data(*(Split(x[:n].clone(), y[:n].clone()) for (x, y), n in zip(whole, sizes, strict=True)))
    return few.to(device)


def build(args: Args) -> Training:
    data = images(args.data, args.data_dir, args.device, args.train, args.held_out)
    torch.manual_seed(args.seed)
    model = resnet18(args.width, channels=data.train.x.shape[1]).to(args.device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def loss(batch: Batch) -> Tensor:
        x, y = batch
        with real_runs.autocast(args):
            return cross_entropy(model(x.contiguous(memory_format=torch.channels_last)), y)

    def batches() -> Iterator[Batch]:
        draws, (x, y) = torch.Generator().manual_seed(args.seed), data.train
        size = min(args.batch, len(y))
        per_epoch, order = len(y) // size, torch.empty(0)
        for step in range(args.steps):
            at = step % per_epoch * size
            if at == 0:
                order = torch.randperm(len(y), generator=draws).to(args.device)
            picked = order[at : at + size]
            yield shifted(x[picked], draws, SHIFT[args.data]), y[picked]

    def val_loss() -> Tensor:
        x, y = data.val
        size = args.val_batch or args.batch
        if len(y) <= 2 * size:
            return loss((x, y))
        picked = torch.randint(len(y), (size,), device=args.device)
        return loss((x[picked], y[picked]))

    def chunks(split: str) -> Iterator[Batch]:
        x, y = getattr(data, split)
        yield from zip(x.split(CHUNK), y.split(CHUNK), strict=True)

    summed = partial(cross_entropy, reduction="sum")
    evaluate = real_runs.evaluator(model, chunks, summed, args)
    optimizer = partial(torch.optim.SGD, momentum=0.9)
    return Training(model, optimizer, batches(), loss, val_loss, evaluate)


def main(args: Args) -> list[Row]:
    if args.data not in SHIFT:
        raise SystemExit(f"--data: unknown {args.data}; choose from {', '.join(SHIFT)}")
    real_runs.check(args)
    return real_runs.main(args, "resnet", args.data, build)


if __name__ == "__main__":
    main(parse(Args))
