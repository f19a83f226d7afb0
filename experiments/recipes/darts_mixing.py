"""A mixture of operations, as in DARTS (Liu et al. 2019): alpha is tuned on validation data while the weights train.

python -m experiments.recipes.darts_mixing
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import hypergrad

NAMES = ("linear", "tanh", "sine")


class Mixed(nn.Module):
    """Three operations of one input, mixed by the softmax of alpha. The data has a sine."""

    def __init__(self, alpha: Tensor):
        super().__init__()
        self.alpha = alpha  # no parameter: the optimizer leaves it alone
        self.linear = nn.Linear(1, 1)
        self.tanh = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
        self.inner, self.outer = nn.Linear(1, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        mix = self.alpha.softmax(0)
        return mix[0] * self.linear(x) + mix[1] * self.tanh(x) + mix[2] * self.outer(torch.sin(self.inner(x)))


def main(steps: int = 400) -> dict[str, float]:
    torch.manual_seed(0)
    x = torch.rand(300, 1) * 12 - 6
    y = torch.sin(1.5 * x) + 0.3 * torch.randn(300, 1)
    x_val, y_val, x, y = x[150:], y[150:], x[:150], y[:150]
    alpha = torch.zeros(3)
    model = Mixed(alpha)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)

    def val_loss() -> Tensor:
        return mse_loss(model(x_val), y_val)

    tuner = hypergrad.Tuner(model, optimizer, val_loss, tune=(), hypers={"alpha": alpha})
    for _ in range(steps):
        rows = torch.randint(150, (50,))
        optimizer.zero_grad()
        tuner.backward(mse_loss(model(x[rows]), y[rows]))
        optimizer.step()
    tuner.close()
    shares = dict(zip(NAMES, alpha.detach().softmax(0).tolist(), strict=True))
    return {"validation loss": val_loss().item()} | shares


if __name__ == "__main__":
    print(main())
