"""Small nets around one layer, their inputs and losses: what the rows of `tests/layers.py` are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from tests.problems import randint, randn

Loss = Callable[[nn.Module, Any], Tensor]


def features(*layers: nn.Module, out: int = 6) -> nn.Module:
    """The layer sees [8, 6]."""
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), *layers, nn.Linear(out, 3))


def images(*layers: nn.Module, out: int = 64) -> nn.Module:
    """The layer sees [6, 4, 4, 4]."""
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), *layers, nn.Flatten(), nn.Linear(out, 3))


def signals(*layers: nn.Module, out: int = 24) -> nn.Module:
    """The layer sees [6, 4, 6]."""
    return nn.Sequential(nn.Conv1d(2, 4, 3), nn.Tanh(), *layers, nn.Flatten(), nn.Linear(out, 3))


def sequences(*layers: nn.Module, out: int = 4) -> nn.Module:
    """The layer sees [4, 5, 4], batch first."""
    return nn.Sequential(nn.Linear(4, 4), *layers, nn.Flatten(), nn.Linear(5 * out, 3))


def embedded(layer: nn.Module) -> nn.Module:
    """The layer sees indices [8, 3]."""
    return nn.Sequential(layer, nn.Flatten(), nn.Tanh(), nn.Linear(12, 3))


def of_features(i: int) -> Tensor:
    return randn(8, 5, seed=i)


def of_images(i: int) -> Tensor:
    return randn(6, 2, 6, 6, seed=i)


def of_signals(i: int) -> Tensor:
    return randn(6, 2, 8, seed=i)


def of_sequences(i: int) -> Tensor:
    return randn(4, 5, 4, seed=i)


def of_indices(i: int) -> Tensor:
    return randint(9, 8, 3, seed=i)


class First(nn.Module):
    """The first output of a recurrent layer; cuDNN has no second derivative."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        with torch.backends.cudnn.flags(enabled=False):
            return self.layer(x)[0]


class SelfAttention(nn.Module):
    def __init__(self, **options: Any):
        super().__init__()
        self.attention, self.options = nn.MultiheadAttention(4, 2, batch_first=True), options

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, **self.options)[0]


class Sdpa(nn.Module):
    def __init__(self, **options: Any):
        super().__init__()
        self.qkv, self.options = nn.Linear(4, 12), options

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(len(x), 1, -1, 12).chunk(3, dim=-1)
        return F.scaled_dot_product_attention(q, k, v, **self.options)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(4, 2, 8, 0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x.flip(1))


class Math(nn.Module):
    """A layer with attention in the form that has a second derivative."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return self.layer(x)


class Checkpointed(nn.Module):
    def __init__(self, layer: nn.Module, use_reentrant: bool):
        super().__init__()
        self.layer, self.use_reentrant = layer, use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layer, x, use_reentrant=self.use_reentrant)


class Autocast(nn.Module):
    """bfloat16 where the weights are float32; the net in float64 is the one without it."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.dtype == torch.float32):
            return self.layer(x)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * grad


class OnceDifferentiable(Cube):
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * grad


class Applied(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Compiled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = features(nn.Tanh())
        self.compiled = torch.compile(self.net, backend="aot_eager")

    def forward(self, x: Tensor) -> Tensor:
        return self.compiled(x)


# ---- losses: of three outputs


def weighted(model: nn.Module, batch: Any) -> Tensor:
    weight = torch.tensor([0.2, 1.0, 2.0]).to(batch[0])
    return F.cross_entropy(model(batch[0]), batch[1], weight, label_smoothing=0.1)


def against_one_hot(loss: Callable[..., Tensor], of: Callable[[Tensor], Tensor] = lambda x: x) -> Loss:
    return lambda model, batch: loss(of(model(batch[0])), F.one_hot(batch[1], 3).to(batch[0]))


def nll(model: nn.Module, batch: Any) -> Tensor:
    return F.nll_loss(model(batch[0]).log_softmax(1), batch[1])


def with_logits(model: nn.Module, batch: Any) -> Tensor:
    want = F.one_hot(batch[1], 3).to(batch[0])
    return F.binary_cross_entropy_with_logits(model(batch[0]), want, pos_weight=want.new_tensor([1.0, 2.0, 3.0]))


def kl(model: nn.Module, batch: Any) -> Tensor:
    want = (2.0 * F.one_hot(batch[1], 3).to(batch[0])).softmax(1)
    return F.kl_div(model(batch[0]).log_softmax(1), want, reduction="batchmean")


def triplet(model: nn.Module, batch: Any) -> Tensor:
    y = model(batch[0])
    return F.triplet_margin_loss(y, y.flip(0), y.roll(1, 0))


def multi_margin(model: nn.Module, batch: Any) -> Tensor:
    return F.multi_margin_loss(model(batch[0]), batch[1])


def in_float32(model: nn.Module, batch: Any) -> Tensor:
    """The loss of outputs in bfloat16, in the precision of the inputs."""
    return F.cross_entropy(model(batch[0]).to(batch[0]), batch[1])


def ctc(model: nn.Module, batch: Any) -> Tensor:
    """Sequences of 5 outputs, targets of two symbols."""
    logp = model(batch[0]).log_softmax(2).transpose(0, 1)
    targets = 1 + torch.stack([batch[1] % 2, (batch[1] + 1) % 2], 1)
    lengths = torch.full((len(targets),), 5), torch.full((len(targets),), 2)
    return F.ctc_loss(logp, targets, *lengths)


def uncompiled(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model.compiled._orig_mod(batch[0]), batch[1])  # type: ignore[union-attr]
