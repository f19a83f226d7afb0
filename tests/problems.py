"""Training problems of the case table. A problem is a function that builds a fresh `Setup`, always the same one.

Everything is in float64 and smooth enough for finite differences (`tests/oracle.py` refuses to answer otherwise).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, mse_loss, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

DEVICE = os.environ.get("HYPERGRAD_DEVICE", "cpu")
STEPS = 6


@dataclass
class Setup:
    """What a user has before a trajectory of training."""

    model: nn.Module
    groups: list[list[Tensor]]
    loss: Callable[..., Tensor]
    batches: list[Any]
    val_loss: Callable[..., Tensor]
    hypers: dict[str, Tensor] | None = None
    warm_up: int = 0  # steps of the stock loop done before the trajectory begins
    optimizer: torch.optim.Optimizer = field(init=False)


def _seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build().double().to(DEVICE)


def randn(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE)


def randint(high: int, *shape: int, seed: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def ce(model: nn.Module, batch: Any) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def supervised(model: nn.Module, groups: list[list[Tensor]], inputs: Callable[[int], Tensor], classes: int) -> Setup:
    """A classifier on a batch of its own per step, validated on one more."""

    def batch(i: int) -> tuple[Tensor, Tensor]:
        x = inputs(i)
        return x, randint(classes, x.shape[0], seed=1000 + i)

    val = batch(99)
    return Setup(model, groups, ce, [batch(i) for i in range(STEPS)], lambda: ce(model, val))


class Vector(nn.Module):
    """A bare parameter vector in two pieces."""

    def __init__(self, n: int = 4):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(n)), nn.Parameter(torch.randn(n))

    def forward(self) -> Tensor:
        return torch.cat([self.a, self.b])


def quadratic() -> Setup:
    model = _seeded(Vector)
    factor, c = randn(8, 8, seed=1) / 3, randn(8, seed=2)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        r = factor @ model() - batch
        return r @ r / 2

    batches = [c + 0.1 * randn(8, seed=10 + i) for i in range(STEPS)]
    return Setup(model, [[model.a], [model.b]], loss, batches, lambda: ((model() - 1) ** 2).sum() / 2)


def ridge() -> Setup:
    model = _seeded(lambda: nn.Linear(4, 2))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return mse_loss(model(batch[0]), batch[1])

    data = [(randn(12, 4, seed=i), randn(12, 2, seed=100 + i)) for i in range(STEPS + 1)]
    return Setup(model, [[model.weight], [model.bias]], loss, data[1:], lambda: loss(model, data[0]))


def dead_relu_mlp() -> nn.Sequential:
    """Hidden units 0 and 1 never fire, so their weights' gradients are exactly 0."""
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        model[0].bias[:2] = -20.0
    return model


def mlp() -> Setup:
    model = _seeded(dead_relu_mlp)
    groups = [list(model[0].parameters()), list(model[2].parameters())]
    return supervised(model, groups, lambda i: randn(12, 5, seed=i), 3)


def matrices() -> Setup:
    """Weights alone: torch.optim.Muon takes nothing else. Wide and tall ones."""
    model = _seeded(lambda: nn.Sequential(nn.Linear(5, 6, bias=False), nn.Tanh(), nn.Linear(6, 3, bias=False)))
    return supervised(model, [[model[0].weight], [model[2].weight]], lambda i: randn(12, 5, seed=i), 3)


def matrices_live() -> Setup:
    setup = matrices()
    setup.warm_up = 3
    return setup


def mlp_live() -> Setup:
    """The optimizer has state already: the trajectory is the middle of a run."""
    setup = mlp()
    setup.warm_up = 3
    return setup


def cnn_batchnorm() -> Setup:
    """BatchNorm in training mode, also while validating."""
    model = _seeded(
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.SiLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 3)
        )
    )
    groups = [list(model[:2].parameters()), list(model[5].parameters())]
    return supervised(model, groups, lambda i: randn(6, 1, 6, 6, seed=i), 3)


def deep_batchnorm() -> Setup:
    """BatchNorm on BatchNorm, and two forward passes a step: each updates the running statistics."""
    model = _seeded(
        lambda: nn.Sequential(
            nn.Linear(5, 4),
            nn.BatchNorm1d(4),
            nn.Tanh(),
            nn.Linear(4, 4),
            nn.BatchNorm1d(4, affine=False),
            nn.Linear(4, 3),
        )
    )
    groups = [list(model[:2].parameters()), list(model[3:].parameters())]
    setup = supervised(model, groups, lambda i: randn(12, 5, seed=i), 3)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        return ce(model, (x[:5], y[:5])) + ce(model, (x[5:], y[5:]))

    setup.loss = loss
    return setup


def embedding() -> Setup:
    """Rows 0 … 7 are used, rows 8 … 11 never, and most are not used at every step."""
    model = _seeded(lambda: nn.Sequential(nn.Embedding(12, 3), nn.Flatten(), nn.Tanh(), nn.Linear(9, 3)))
    groups = [list(model[0].parameters()), list(model[3].parameters())]
    return supervised(model, groups, lambda i: randint(8, 5, 3, seed=i), 3)


def dropout() -> Setup:
    model = _seeded(lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)))
    setup = supervised(
        model, [list(model[0].parameters()), list(model[3].parameters())], lambda i: randn(12, 5, seed=i), 3
    )
    x, y = randn(12, 5, seed=98), randint(3, 12, seed=97)
    setup.val_loss = lambda: cross_entropy(model[3](torch.tanh(model[0](x))), y)  # deterministic
    return setup


class Normalised(nn.Module):
    """Layers whose derivatives torch gets wrong in reverse-over-forward mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.instance = nn.Conv1d(2, 4, 3), nn.InstanceNorm1d(4, affine=True)
        self.group, self.layer, self.out = nn.GroupNorm(2, 4), nn.LayerNorm([4, 4]), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.instance(self.conv(x)))
        return self.out(torch.tanh(self.layer(torch.tanh(self.group(x)))).flatten(1))


def normalised() -> Setup:
    model = _seeded(Normalised)
    out = list(model.out.parameters())
    inner = [p for name, p in model.named_parameters() if not name.startswith("out")]
    return supervised(model, [inner, out], lambda i: randn(6, 2, 6, seed=i), 3)


class Checkpointed(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


def checkpointed() -> Setup:
    model = _seeded(lambda: Checkpointed(nn.Linear(5, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3)))
    groups = [list(model[0].parameters()), list(model[3].parameters())]
    setup = supervised(model, groups, lambda i: randn(12, 5, seed=i), 3)
    x, y = randn(12, 5, seed=98), randint(3, 12, seed=97)
    setup.val_loss = lambda: cross_entropy(model[3](torch.tanh(model[0](x))), y)
    return setup


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(x.shape[0], 1, x.shape[1], 12).chunk(3, dim=-1)
        return self.out(scaled_dot_product_attention(q, k, v).mean((1, 2)))


def attention() -> Setup:
    """Attention in the one form that has a second derivative."""
    model = _seeded(Attention)
    groups = [list(model.qkv.parameters()), list(model.out.parameters())]
    setup = supervised(model, groups, lambda i: randn(6, 3, 4, seed=i), 3)
    loss, val_loss = setup.loss, setup.val_loss

    def under_math(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapped(*args: Any) -> Tensor:
            with sdpa_kernel(SDPBackend.MATH):
                return f(*args)

        return wrapped

    # *args would read as a required argument
    math_val = under_math(val_loss)
    setup.loss, setup.val_loss = under_math(loss), lambda: math_val()
    return setup


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.backends.cudnn.flags(enabled=False):
            return self.out(self.lstm(x)[0][:, -1])


def recurrent() -> Setup:
    model = _seeded(Recurrent)
    groups = [list(model.lstm.parameters()), list(model.out.parameters())]
    return supervised(model, groups, lambda i: randn(6, 3, 3, seed=i), 3)


class Tied(nn.Module):
    """`encode` is used twice, by two names; `frozen` never moves; `unused` is held by the optimizer and never used."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.frozen, self.out = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.again = self.encode
        self.unused = nn.Parameter(torch.randn(3))
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.again(torch.tanh(self.frozen(torch.tanh(self.encode(x)))))))


def tied_frozen() -> Setup:
    model = _seeded(Tied)
    groups = [[*model.frozen.parameters(), *model.encode.parameters()], [model.unused, *model.out.parameters()]]
    return supervised(model, groups, lambda i: randn(12, 5, seed=i), 3)


def loss_hypers() -> Setup:
    """Hyperparameters in the loss: a weight for each example, label smoothing, the strength of a penalty."""
    model = _seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))

    def loss(model: nn.Module, batch: Any, hypers: dict[str, Tensor]) -> Tensor:
        x, y = batch
        logp = model(x).log_softmax(1)
        smooth = hypers["smoothing"]
        each = -(1 - smooth) * logp[torch.arange(len(y)), y] - smooth * logp.mean(1)
        penalty = sum((p**2).sum() for p in model.parameters())
        return (hypers["weights"] * each).sum() + hypers["penalty"] * penalty

    groups = [list(model[0].parameters()), list(model[2].parameters())]
    setup = supervised(model, groups, lambda i: randn(4, 4, seed=i), 3)
    setup.loss = loss
    setup.hypers = {
        "weights": torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64, device=DEVICE),
        "smoothing": torch.tensor(0.1, dtype=torch.float64, device=DEVICE),
        "penalty": torch.tensor(0.0, dtype=torch.float64, device=DEVICE),
    }
    return setup


_ALL = (quadratic, ridge, mlp, mlp_live, cnn_batchnorm, embedding, dropout, tied_frozen, loss_hypers)
_LAYERS = (matrices, matrices_live, normalised, checkpointed, attention, recurrent, deep_batchnorm)
PROBLEMS: dict[str, Callable[[], Setup]] = {f.__name__: f for f in (*_ALL, *_LAYERS)}
