"""BatchNorm's running statistics as part of the differentiated state.

Training updates them by b' = d ∘ b + S(θ), d = 1 − momentum, S = momentum · (batch mean, unbiased variance); validation in
eval() mode reads them. Leaving out that path was measured to put a hypergradient off by 79 %.

The Hessian product that is formed anyway gives both derivatives of S: add ⟨S(θ), u⟩ to the training loss with a leaf
u = 0. Then the mixed derivative of ∇_θ(ℓ + ⟨S, u⟩) in u along z is J_S z, and ∂/∂u of the loss is S itself, whose product with
an adjoint joins that of the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm


def _channels(x: Tensor) -> list[int]:
    return [1, -1] + [1] * (x.dim() - 2)


class RunningStats:
    """The running means and variances of a model's BatchNorm layers, as one flat vector b [n_b]."""

    def __init__(self, model: torch.nn.Module):
        self.layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
        self.size = sum(2 * m.num_features for m in self.layers)

    def trained(self) -> bool:
        """Whether a layer is in train mode now: a forward pass would move its statistics."""
        return any(m.training for m in self.layers)

    def moved_by(self, forward: Callable[[], object]) -> bool:
        """Whether what runs here runs a layer in train mode."""
        with self.watch_training() as update:
            forward()
        return bool(update.added)

    @contextmanager
    def watch_training(self) -> Iterator[_Update]:
        """Collect S and d of the forward passes inside."""
        update = _Update(self.layers)
        handles = [m.register_forward_pre_hook(update.observe) for m in self.layers]
        try:
            yield update
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def as_leaves(self) -> Iterator[list[Tensor]]:
        """Let layers in eval mode read leaf copies of their statistics; yields the leaves: mean, variance, mean, …"""
        leaves: list[Tensor] = []
        handles = []
        for m in self.layers:
            assert m.running_mean is not None
            assert m.running_var is not None
            pair = [m.running_mean.detach().clone().requires_grad_(), m.running_var.detach().clone().requires_grad_()]
            leaves += pair
            handles.append(m.register_forward_hook(_normalised_by(*pair)))
        try:
            yield leaves
        finally:
            for handle in handles:
                handle.remove()

    def flat(self, grads: list[Tensor | None]) -> Tensor:
        """Gradients in the leaves as one vector [n_b]."""
        sizes = [m.num_features for m in self.layers for _ in range(2)]
        like = self.layers[0].running_mean
        assert like is not None
        pairs = zip(grads, sizes, strict=True)
        return torch.cat([like.new_zeros(n) if g is None else g for g, n in pairs])


def _normalised_by(mean: Tensor, var: Tensor) -> Any:
    def hook(module: _BatchNorm, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if module.training:
            return None
        x = inputs[0]
        shape = _channels(x)
        out = (x - mean.view(shape)) / (var.view(shape) + module.eps).sqrt()
        if module.affine:
            out = out * module.weight.view(shape) + module.bias.view(shape)
        return out

    return hook


class _Update:
    """d and S of one training forward pass; a layer that runs twice composes its two updates."""

    def __init__(self, layers: list[_BatchNorm]):
        self.layers = layers
        self.decay = dict.fromkeys(layers, 1.0)
        self.added: dict[_BatchNorm, tuple[Tensor, Tensor]] = {}

    def observe(self, module: _BatchNorm, inputs: tuple[Tensor, ...]) -> None:
        if not module.training:
            return
        x, m = inputs[0], module.momentum
        if m is None:
            assert module.num_batches_tracked is not None
            m = 1 / (float(module.num_batches_tracked) + 1)
        dims = [0, *range(2, x.dim())]
        mean, var = m * x.mean(dims), m * x.var(dims, unbiased=True)
        if module in self.added:
            mean, var = mean + (1 - m) * self.added[module][0], var + (1 - m) * self.added[module][1]
        self.added[module], self.decay[module] = (mean, var), self.decay[module] * (1 - m)

    def flat(self) -> tuple[Tensor, Tensor]:
        """d and S, [n_b] each."""
        decays, sums = [], []
        for m in self.layers:
            assert m.running_mean is not None
            zero = torch.zeros_like(m.running_mean)
            decays.append(torch.full_like(zero, self.decay[m]).repeat(2))
            sums += list(self.added.get(m, (zero, zero)))
        return torch.cat(decays), torch.cat(sums)
