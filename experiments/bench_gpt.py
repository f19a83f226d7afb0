"""The benchmark's GPT: GPT-2's shape, 124 million parameters, attention written out so that it is differentiable twice.

`FULL` is for a GPU; `TINY` is the same code at a size for tests and for the check in float64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class Size(NamedTuple):
    layers: int
    width: int
    heads: int
    context: int
    vocabulary: int
    batch: int
    fused: bool = False  # attention by torch's own kernels, which have no second derivative


FULL = Size(layers=12, width=768, heads=12, context=1024, vocabulary=50_257, batch=4)
TINY = Size(layers=2, width=16, heads=2, context=8, vocabulary=50, batch=3)


class Block(nn.Module):
    """One layer of a pre-norm transformer: causal self-attention, then an MLP of four times the width."""

    def __init__(self, size: Size):
        super().__init__()
        width, self.heads, self.fused = size.width, size.heads, size.fused
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        future = torch.ones(size.context, size.context, dtype=torch.bool).triu(1)
        self.register_buffer("future", future, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.before_attention(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.fused:
            mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(self.future, -math.inf)
            mixed = scores.softmax(-1) @ v
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.before_mlp(x))


class GPT(nn.Module):
    """Codes [batch, context] → logits [batch · context, vocabulary]; the output layer is the table of the tokens."""

    def __init__(self, size: Size):
        super().__init__()
        self.token, self.place = nn.Embedding(size.vocabulary, size.width), nn.Embedding(size.context, size.width)
        self.blocks = nn.Sequential(*(Block(size) for _ in range(size.layers)))
        self.norm, self.head = nn.LayerNorm(size.width), nn.Linear(size.width, size.vocabulary, bias=False)
        self.head.weight = self.token.weight
        for table in (self.token, self.place):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, codes: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.token(codes) + self.place.weight))).flatten(0, 1)


def data(size: Size) -> tuple[Tensor, Tensor]:
    """Random codes, and as many random targets."""
    x = torch.randint(size.vocabulary, (size.batch, size.context))
    return x, torch.randint(size.vocabulary, (x.numel(),))
