"""A GAN on a ring of eight points: two optimizers, two losses, one tuner; the energy distance to held-out points validates.

python -m experiments.recipes.gan_ring
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

import hypergrad


def ring(n: int) -> Tensor:
    """n points around eight centres [n, 2]."""
    angle = torch.randint(8, (n,)) * (math.pi / 4)
    return torch.stack([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(n, 2)


def energy_distance(x: Tensor, y: Tensor) -> Tensor:
    """0 where two sets of points are alike; about 0.7 for an untrained generator."""
    return 2 * torch.cdist(x, y).mean() - torch.pdist(x).mean() - torch.pdist(y).mean()


def train(steps: int, tuned: bool, lr: float = 1e-4) -> tuple[float, list[float]]:
    """The distance at the end, and lr of discriminator and generator."""
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    discriminator = nn.Sequential(
        nn.Linear(2, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1)
    )
    both = nn.ModuleList([generator, discriminator])
    optimizers = [torch.optim.Adam(net.parameters(), lr=lr, betas=(0.5, 0.999)) for net in (discriminator, generator)]
    held_out = ring(512)

    def val_loss() -> Tensor:
        return energy_distance(generator(torch.randn(512, 2)), held_out)

    backward = Tensor.backward
    if tuned:  # total_steps: of each optimizer, and it matters here, as lr then decays
        tuner = hypergrad.Tuner(both, optimizers, val_loss, tune=("lr",), total_steps=steps)
        backward = tuner.backward
    for _ in range(steps):
        fake = generator(torch.randn(128, 2)).detach()
        optimizers[0].zero_grad()
        backward(softplus(-discriminator(ring(128))).mean() + softplus(discriminator(fake)).mean())
        optimizers[0].step()
        optimizers[1].zero_grad()
        backward(softplus(-discriminator(generator(torch.randn(128, 2)))).mean())
        optimizers[1].step()
    with torch.no_grad():
        distance = energy_distance(generator(torch.randn(2000, 2)), ring(2000)).item()
    return distance, tuner.values["lr"].tolist() if tuned else [lr, lr]


def main(steps: int = 400) -> dict[str, float]:
    (plain, _), (tuned, lrs) = train(steps, tuned=False), train(steps, tuned=True)
    return {"distance at lr 1e-4": plain, "tuned": tuned, "lr, discriminator": lrs[0], "lr, generator": lrs[1]}


if __name__ == "__main__":
    print(main())
