"""The gradient of a loss with the graph kept, and products of its Hessian with vectors, by double backward.

Double backward is the one primitive of second order in this package. It has the widest coverage and the least cost in
eager mode. What torch cannot differentiate twice ends in an error that names the layer and what to do: from what torch raises
here, and from the graph where it raises nothing or too late (survey.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from hypergrad.core.second_order import twice_differentiable
from hypergrad.core.survey import saved_bytes

_COMPILED = (
    "a module under torch.compile",
    "give hypergrad the compiled module itself, whose uncompiled forward pass then runs where a product is due; a compiled loss "
    "function has to be called uncompiled",
)
# what torch says when a second derivative is missing -> the layer (None: the operation that torch names), and what to do
_REMEDIES: dict[str, tuple[str | None, str]] = {
    "scaled_dot_product": (
        "scaled_dot_product_attention (also inside nn.MultiheadAttention and nn.Transformer)",
        "call the model that hypergrad was given, or its parts, which then attend by matrix products where a product is due, or "
        "wrap the forward pass in `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`; in Transformers "
        "attn_implementation='eager', in timm `timm.layers.set_fused_attn(False)`",
    ),
    "aot_autograd": _COMPILED,
    "donated buffers": _COMPILED,
    "_embedding_bag": ("nn.EmbeddingBag", "replace it by nn.Embedding followed by a sum or mean"),
    "_ctc_loss": ("ctc_loss", "replace it by its recursion in torch.logsumexp, as docs/loops.md has it"),
    "cudnn_rnn": (
        "a cuDNN layer (nn.LSTM, nn.GRU, nn.RNN)",
        "run the forward pass under `torch.backends.cudnn.flags(enabled=False)`",
    ),
    "incompatible with .grad()": ("checkpoint with use_reentrant=True", "checkpoint with use_reentrant=False"),
    "is not implemented": (None, "replace that operation by one whose derivative torch can differentiate again"),
}


class Linearization:
    """A loss at one point: its value, its gradient, and products of its Hessian.

    Args:
        loss: a scalar with its graph.
        params: leaves; the rows and columns of the Hessian.
        extra: more leaves that count as columns (hyperparameters in the loss), or whose gradient is wanted.
        products: False where no product is needed; the graph is then freed at once.
        retain: keep it all the same.
        plain: the loss was computed under `twice_differentiable`, and so is what checkpointing computes of it again.
    """

    def __init__(
        self,
        loss: Tensor,
        params: Sequence[Tensor],
        extra: Sequence[Tensor] = (),
        products: bool = True,
        retain: bool = False,
        plain: bool = False,
    ):
        self.params, self.extra, self.plain = list(params), list(extra), plain
        check_scalar(loss, "the loss")
        inputs = [*self.params, *self.extra]
        with explained(plain):
            grads = grad_or_none([loss], inputs, create_graph=products, retain_graph=products or retain)
        self._whole = loss
        self.loss = loss.detach()
        self.decay: Tensor | None = None  # of running statistics, see problem.py
        self.exact = True  # the gradient is bit for bit that of a plain backward pass, see `survey`
        self.grads: list[Tensor | None] = list(grads[: len(self.params)])
        self.extra_grads: list[Tensor | None] = list(grads[len(self.params) :])
        self.active = tuple(g is not None for g in self.grads)
        if not any(self.active):
            raise ValueError("the loss does not depend on any parameter that the optimizer holds.")
        if any(g is not None and g.is_sparse for g in self.grads):
            raise NotImplementedError("an embedding with sparse=True has sparse gradients: build it with sparse=False.")

    def product(
        self,
        vectors: Sequence[Tensor | None],
        extra: Sequence[Tensor | None] | None = None,
        into_extra: bool = False,
        retain: bool = True,
    ) -> list[Tensor | None]:
        """Rows of the joint Hessian of (params, extra) times a vector.

        Args:
            vectors: one tensor a parameter; None is zero.
            extra: one tensor an extra leaf; None is zero.
            into_extra: also return the rows of the extra leaves, after those of the parameters.
            retain: False on the last product, to free the graph.
        """
        pairs = list(zip(self.grads, vectors, strict=True))
        if extra is not None:
            pairs += list(zip(self.extra_grads, extra, strict=True))
        used = [(g, v) for g, v in pairs if g is not None and g.requires_grad and v is not None]
        inputs = [*self.params, *(self.extra if into_extra else ())]
        if not used:
            return [None] * len(inputs)
        outputs, cotangents = zip(*used, strict=True)
        with explained(self.plain), without_hooks(inputs):
            return grad_or_none(outputs, inputs, cotangents, retain_graph=retain)

    # With hooks on parameters g = c(∇ℓ), and ∂g/∂θ = c' H is not symmetric: J z = ∂(Jᵀu)/∂uᵀ z.
    def jvp(
        self,
        vectors: Sequence[Tensor | None],
        extra: Sequence[Tensor | None] | None = None,
        into_extra: bool = False,
        retain: bool = True,
    ) -> list[Tensor | None]:
        """The tangent of the gradients along a vector: `product`, but right also where hooks on parameters change them."""
        if not any(getattr(x, "_backward_hooks", None) for x in self.params):
            return self.product(vectors, extra, into_extra, retain)
        rows = [*self.grads, *(self.extra_grads if into_extra else ())]
        outputs = [g for g in rows if g is not None and g.requires_grad]
        us = [torch.zeros_like(g, requires_grad=True) for g in outputs]
        inputs, tangents = [*self.params, *self.extra], [*vectors, *(extra or [None] * len(self.extra))]
        with explained(self.plain), without_hooks(inputs):
            vjp = grad_or_none(outputs, inputs, us, create_graph=True) if outputs else [None] * len(inputs)
            pairs = [(x, v) for x, v in zip(vjp, tangents, strict=True) if v is not None and x is not None]
            pairs = [(x, v) for x, v in pairs if x.requires_grad]
            found = grad_or_none([x for x, _ in pairs], us, [v for _, v in pairs]) if pairs else [None] * len(us)
            if not retain:
                self.free()
        each = iter(found)
        return [next(each) if g is not None and g.requires_grad else None for g in rows]

    def nbytes(self) -> int:
        """Bytes that the graph and the gradients take up, about."""
        grads = [g for g in (*self.grads, *self.extra_grads) if g is not None]
        return saved_bytes(self._whole, *grads) + sum(g.numel() * g.element_size() for g in grads)

    def free(self) -> None:
        """Free the graph where no product did: the gradient does not depend on the parameters."""
        with explained(self.plain):
            grad_or_none([self._whole], self.params)


@contextmanager
def explained(plain: bool = False) -> Iterator[None]:
    """Raise with the remedy where torch has no second derivative, or refuses the first. plain: under `twice_differentiable`."""
    try:
        with twice_differentiable() if plain else nullcontext():
            yield
    except (RuntimeError, NotImplementedError) as error:
        for symptom, (layer, remedy) in _REMEDIES.items():
            if symptom in str(error):
                named = re.search(r"aten::_?(\w+)|'_?(\w+)'", str(error))
                layer = layer or (str(named[1] or named[2]).removesuffix("_backward") if named else "an operation")
                raise NotImplementedError(f"{layer} has no second derivative in torch: {remedy}. ({error})") from error
        raise


@contextmanager
def without_hooks(leaves: Sequence[Tensor]) -> Iterator[None]:
    """Without the hooks on leaves: for products, as the graph of the gradient holds already what hooks did to it; for the
    gradient of a validation loss, which is not that of a step."""
    hooks = [h for x in leaves if x.is_leaf and (h := getattr(x, "_backward_hooks", None))]
    saved = [dict(h) for h in hooks]
    try:
        for h in hooks:
            h.clear()
        yield
    finally:
        for h, old in zip(hooks, saved, strict=True):
            h.update(old)


def grad_or_none(outputs: Sequence[Tensor], inputs: Sequence[Tensor], *args: Any, **kw: Any) -> list[Tensor | None]:
    """torch.autograd.grad with None for inputs that are frozen or not used."""
    live = [x for x in inputs if x.requires_grad]
    grads = iter(torch.autograd.grad(outputs, live, *args, allow_unused=True, **kw) if live else ())
    return [next(grads) if x.requires_grad else None for x in inputs]


def check_scalar(loss: Any, what: str, graph: bool = True) -> None:
    """graph: whether it has to depend on parameters that are trained now."""
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"{what} must be a scalar tensor, got {type(loss).__name__}: return the loss itself, without .item()."
        )
    if loss.numel() != 1:
        raise ValueError(
            f"{what} must be a scalar, got shape {tuple(loss.shape)}: reduce it, for example with .mean()."
        )
    if graph and not loss.requires_grad:
        raise ValueError(
            f"{what} does not depend on the parameters: it was made without a graph (no_grad, detach, .item(), gathered over "
            "processes), or of what has no derivative (argmax, an accuracy). Return a loss, with its graph."
        )
