"""Loops that differ in the module that is trained."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from tests.online.live_loops import Backward
from tests.online.loop_rows import REFUSED, SAID, Live, N, Row
from tests.online.loops_losses import of
from tests.online.loops_steps import ce, net

CHARACTERS, LENGTH = 7, 6


# ---- sequences


class Block(nn.Module):
    """Of a GPT-2."""

    def __init__(self, width: int, checkpointed: bool):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU("tanh"), nn.Linear(2 * width, width), nn.Dropout(0.1)
        )
        self.checkpointed = checkpointed

    def body(self, x: Tensor) -> Tensor:
        b, t, w = x.shape
        q, k, v = (z.view(b, t, 2, w // 2).transpose(1, 2) for z in self.qkv(self.norms[0](x)).split(w, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, w))
        return x + self.mlp(self.norms[1](x))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=False) if self.checkpointed else self.body(x)  # type: ignore[return-value]


class TinyGPT(nn.Module):
    """GPT-2 with its head tied to the embedding of characters."""

    def __init__(self, checkpointed: bool = False):
        super().__init__()
        self.characters, self.places = nn.Embedding(CHARACTERS, 8), nn.Embedding(LENGTH, 8)
        self.blocks = nn.ModuleList(Block(8, checkpointed) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, CHARACTERS, bias=False)
        self.head.weight = self.characters.weight

    def forward(self, x: Tensor) -> Tensor:
        z = self.characters(x) + self.places(torch.arange(x.shape[1]))
        for block in self.blocks:
            z = block(z)
        return self.head(self.norm(z))


class Recurrent(nn.Module):
    def __init__(self, cell: Any):
        super().__init__()
        self.characters, self.cell, self.head = (
            nn.Embedding(CHARACTERS, 6),
            cell(6, 8, batch_first=True),
            nn.Linear(8, CHARACTERS),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(self.characters(x))[0])


def decayed_matrices(model: nn.Module, **kw: Any) -> torch.optim.AdamW:
    """Weight decay on matrices only, as nanoGPT has it."""
    split = [[p for p in model.parameters() if (p.dim() >= 2) == matrix] for matrix in (True, False)]
    parts = [{"params": split[0], "weight_decay": 0.1}, {"params": split[1], "weight_decay": 0.0}]
    return torch.optim.AdamW(parts, lr=0.01, eps=1e-3, **kw)


def of_characters(make_model: Callable[[], nn.Module], clip: float | None = None) -> Callable[[], Live]:
    def build() -> Live:
        torch.manual_seed(0)
        model = make_model()
        opt = decayed_matrices(model)
        text = torch.randint(CHARACTERS, (N + 1, 3, LENGTH + 1), generator=torch.Generator().manual_seed(2))

        def loss(chunk: Tensor) -> Tensor:
            return F.cross_entropy(model(chunk[:, :-1]).flatten(0, 1), chunk[:, 1:].flatten())

        def train(backward: Backward) -> None:
            for chunk in text[:-1]:
                opt.zero_grad()
                backward(loss(chunk))
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                opt.step()

        return Live(model, [opt], train, lambda: loss(text[-1]))

    return build


# ---- images


class Residual(nn.Module):
    """A timm-like block: depthwise convolution, BatchNorm, squeeze and excitation, stochastic depth."""

    def __init__(self, width: int):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False), nn.BatchNorm2d(width)
        self.gate, self.point = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.norm(self.conv(x)))
        y = self.point(y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True))))
        if self.training:
            y = y * (torch.rand(len(x), 1, 1, 1) < 0.8) / 0.8
        return x + y


def images() -> Live:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), Residual(4), Residual(4), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    )
    opt = decayed_matrices(model)
    x, y = torch.randn(N + 1, 5, 1, 5, 5), torch.randint(3, (N + 1, 5))

    def train(backward: Backward) -> None:
        for batch in zip(x[:-1], y[:-1]):
            opt.zero_grad()
            backward(ce(model, batch))
            opt.step()

    return Live(model, [opt], train, lambda: ce(model, (x[-1], y[-1])))


# ---- parts of a net


class LoRA(nn.Module):
    """A frozen layer, and a low-rank one beside it."""

    def __init__(self, base: nn.Linear, rank: int = 2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, base.in_features) / 4)
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


def adapted() -> nn.Module:
    model = net()
    model[0], model[3] = LoRA(model[0]), LoRA(model[3])  # type: ignore[arg-type]
    return model


def trainable(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, eps=1e-3, weight_decay=0.1)


def parametrized(by: Callable[[nn.Linear], Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = net()
        by(model[0])  # type: ignore[arg-type]
        return model

    return make


def pruned(layer: nn.Linear) -> None:
    prune.random_unstructured(layer, "weight", 0.4)


class Tied(nn.Module):
    """An autoencoder's weight, used both ways, with a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.head = nn.Parameter(torch.randn(8, 5) / 2), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x @ self.weight.T).tanh() @ self.weight)


class Softsign(torch.autograd.Function):
    """x/(1 + |x|), with a backward pass in differentiable operations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x / (1 + x.abs())

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return g / (1 + x.abs()) ** 2


class Applied(nn.Module):
    def __init__(self, f: Callable[[Tensor], Tensor]):
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


def through(f: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = net()
        model[1] = Applied(f)
        return model

    return make


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        return torch.jit.script(net())


def bag(sparse: bool) -> nn.Module:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.words, self.head = nn.Embedding(9, 4, sparse=sparse), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.words((4 + x).long().clamp(0, 8)).mean(1))

    return Bag()


def parallel() -> nn.Module:
    of_module = sys.modules["torch.nn.parallel.data_parallel"]  # torch.nn.parallel has a function of this name
    with patch.object(of_module, "_get_available_device_type", return_value=None):  # without an accelerator
        return nn.DataParallel(net())


MODULES: dict[str, Row] = {
    "GPT-2, tied head, clipped": Row(
        of_characters(TinyGPT, 0.5), how="`clip_norm=`", options={"clip_norm": 0.5}
    ),
    "activation checkpointing": Row(of_characters(lambda: TinyGPT(True)), how="`use_reentrant=False`"),
    "LSTM": Row(of_characters(lambda: Recurrent(nn.LSTM))),
    "GRU": Row(of_characters(lambda: Recurrent(nn.GRU))),
    "timm-like net: BatchNorm, squeeze and excitation, stochastic depth": Row(images),
    "LoRA: frozen base, adapters": Row(of(ce, adapted, trainable)),
    "tied weights": Row(of(ce, Tied)),
    "parametrizations.orthogonal": Row(of(ce, parametrized(parametrizations.orthogonal))),
    "parametrizations.spectral_norm": Row(
        of(ce, parametrized(parametrizations.spectral_norm)), SAID, "the path through u and v is left out",
        "training changes .*_u, .*_v",
    ),
    "parametrizations.weight_norm": Row(
        of(ce, parametrized(parametrizations.weight_norm)), REFUSED, "write v · (g/‖v‖)", "weight_norm"
    ),
    "pruning masks (torch.nn.utils.prune)": Row(of(ce, parametrized(pruned))),
    "custom autograd function": Row(of(ce, through(Softsign.apply))),
    "torch.jit.script": Row(of(ce, scripted)),
    "nn.DataParallel on a CPU": Row(of(ce, parallel)),
    "embedding": Row(of(ce, lambda: bag(False))),
    "embedding, sparse": Row(of(ce, lambda: bag(True)), REFUSED, "`sparse=False`", "sparse=False", wrt=("lr",)),
}  # fmt: skip
