"""The third family: two nets of about half a million weights, whose steps take long enough that Python does not count.

A plain run takes two to five minutes on one thread.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from experiments.gpu_check.models import resnet18
from experiments.workloads import data, models
from experiments.workloads.task import Workload

SHIFT = 2  # pixels


@cache
def _images(full: bool) -> data.Data:
    """Fashion-MNIST as images [n, 1, 28, 28]."""
    splits = data.fashion(full)
    return data.Data(*(data.Split(x.view(-1, 1, 28, 28), y) for x, y in splits))


def shifted(x: Tensor, draws: torch.Generator, by: int = SHIFT) -> Tensor:
    """Images [n, c, h, h], each shifted by up to `by` pixels in either direction, and mirrored in one case of two.

    draws: of the CPU, so that the images are the same on every device.
    """
    n, c, size = x.shape[:3]
    wide = pad(x, (by,) * 4)
    down, right = torch.randint(2 * by + 1, (2, n, 1), generator=draws)
    rows, columns = down + torch.arange(size), right + torch.arange(size)
    columns = torch.where(torch.rand(n, 1, generator=draws) < 0.5, columns, columns.flip(1))
    image, channel = torch.arange(n)[:, None, None, None], torch.arange(c)[:, None, None]
    at = [i.to(x.device) for i in (image, channel, rows[:, None, :, None], columns[:, None, None, :])]
    return wide[at[0], at[1], at[2], at[3]]


REALISTIC = (
    Workload(
        name="resnet_fashion",
        title="ResNet-18 of 0.5 M weights, BatchNorm, shifted and mirrored Fashion-MNIST",
        optimizer="SGD",
        data=_images,
        model=lambda data, full: resnet18(28 if full else 14, channels=1),
        loss=cross_entropy,
        steps=1500,
        full_steps=6000,
        batch=64,
        augment=shifted,
        family="realistic",
    ),
    Workload(
        name="gpt_text",
        title="GPT of 0.5 M weights over characters",
        optimizer="AdamW",
        data=data.characters,
        model=lambda data, full: models.GPT(192, 6, 6) if full else models.GPT(96, 4, 4),
        loss=models.next_character,
        steps=1500,
        full_steps=6000,
        batch=16,
        family="realistic",
    ),
)
