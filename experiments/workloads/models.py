"""The workloads' models. All are differentiable twice in torch: attention is written out as matrix products."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments.workloads.data import CHARACTERS, CONTEXT


def mlp(*widths: int, bias: bool = True) -> nn.Sequential:
    """Linear layers of these widths with ReLU between them."""
    layers: list[nn.Module] = []
    for wide, narrow in pairwise(widths):
        layers += [nn.Linear(wide, narrow, bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn(width: int, side: int) -> nn.Sequential:
    """Two convolutions of stride 2 with BatchNorm, then a linear layer on what they leave, `side` × `side`."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width * side * side, 10),
    )


def cnn1d(width: int) -> nn.Sequential:
    """Three convolutions of stride 2 along the signal, and a linear layer."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 40)),
        nn.Conv1d(1, width, 5, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv1d(width, width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv1d(width, width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(5 * width, 10),
    )


class GRU(nn.Module):
    """A GRU over a signal read `frame` samples at a time; its last state is classified."""

    def __init__(self, frame: int, width: int):
        super().__init__()
        self.frame = frame
        self.cell, self.head = nn.GRU(frame, width, batch_first=True), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.cell(x.unflatten(1, (-1, self.frame)))
        return self.head(states[:, -1])


class Block(nn.Module):
    """One layer of a pre-norm transformer: causal self-attention, then an MLP of four times the width."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.scale = heads, 1 / math.sqrt(width // heads)
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.mlp = mlp(width, 4 * width, width, bias=False)
        self.register_buffer("future", torch.ones(CONTEXT, CONTEXT, dtype=torch.bool).triu(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.before_attention(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2) * self.scale).masked_fill(self.future, -math.inf)  # [batch, head, to, from]
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.before_mlp(x))


class GPT(nn.Module):
    """A decoder-only transformer over characters: [batch, CONTEXT] codes → [batch, CONTEXT, CHARACTERS] logits."""

    def __init__(self, width: int, layers: int, heads: int):
        super().__init__()
        self.token, self.place = nn.Embedding(CHARACTERS, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CHARACTERS)
        for table in (self.token, self.place):
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, codes: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.token(codes) + self.place.weight)))


def next_character(logits: Tensor, codes: Tensor) -> Tensor:
    """GPT's loss: the mean cross-entropy of every character given those before it."""
    return cross_entropy(logits.flatten(0, 1), codes.flatten())


class Factors(nn.Module):
    """Matrix factorisation: b_u + c_i + ⟨p_u, q_i⟩ of pairs [batch, 2] of a user u and an item i; b, c are the first columns."""

    def __init__(self, users: int, items: int, rank: int):
        super().__init__()
        self.users, self.items = nn.Embedding(users, rank + 1), nn.Embedding(items, rank + 1)
        for table in (self.users, self.items):
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, pairs: Tensor) -> Tensor:
        u, i = self.users(pairs[:, 0]), self.items(pairs[:, 1])
        return u[:, 0] + i[:, 0] + (u[:, 1:] * i[:, 1:]).sum(1)
