"""A user's float32 model, optimizer and code in float64 for the time of a call."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from hypergrad.core.loss_tensors import LossTensors
from hypergrad.core.restore import Buffers, Rng, all_params, swapped


def to_double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x


@contextmanager
def in_float64(
    model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer], hypers: LossTensors | None = None
) -> Iterator[None]:
    """Parameters, buffers, optimizer state and `hypers` in float64; the very same tensors are put back on the way out."""
    hypers = LossTensors() if hypers is None else hypers
    params, default = [*all_params(model, optimizers), *hypers.leaves.values()], torch.get_default_dtype()
    params = list({id(p): p for p in params}.values())
    data, grads = [p.data for p in params], [p.grad if p.is_leaf else None for p in params]
    buffers = Buffers(model, *hypers.nets)
    doubled = [b.double() if b.is_floating_point() else b.clone() for b in buffers.now()]
    states = [opt.state for opt in optimizers]
    rng = Rng(params[0].device)
    try:
        torch.set_default_dtype(torch.float64)
        for p in params:
            _set(p, p.data.double().clone(), None)
        for opt, state in zip(optimizers, states, strict=True):
            opt.state = defaultdict(dict, {p: {k: _doubled(k, x) for k, x in s.items()} for p, s in state.items()})
        with swapped(buffers.slots, doubled):
            yield
    finally:
        torch.set_default_dtype(default)
        for p, x, grad in zip(params, data, grads, strict=True):
            _set(p, x, grad)
        for opt, state in zip(optimizers, states, strict=True):
            opt.state = state
        rng.restore()


def _set(p: Tensor, x: Tensor, grad: Tensor | None) -> None:
    if p.is_leaf:
        p.grad = None
    p.data = x
    if p.is_leaf:
        p.grad = grad


def _doubled(name: str, x: Any) -> Any:
    return x.clone() if name == "step" and isinstance(x, Tensor) else to_double(x)


class Promote(TorchFunctionMode):
    """Operations get float64 in place of lower precision; casts to lower precision give float64."""

    _CASTS = frozenset({Tensor.float, Tensor.half, Tensor.bfloat16})

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = dict(kwargs or {})
        if func in self._CASTS:
            copies, func = func is not Tensor.float, Tensor.double
            if copies:  # an in-place operation on it must not change the original
                args = (args[0].clone(), *args[1:])
        args, kwargs = tree_map(_promoted, (args, kwargs))
        if func is Tensor.to or func is Tensor.type:
            args, kwargs = tree_map(_not_lower, (args, kwargs))
        elif kwargs.get("dtype") is not None:
            kwargs["dtype"] = _not_lower(kwargs["dtype"])
        out = func(*args, **kwargs)
        for x in tree_flatten(out)[0]:
            if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 and x.requires_grad:
                raise NotImplementedError(
                    f"check could not promote the result of {getattr(func, '__name__', func)} to float64 (it is {x.dtype}, "
                    f"shape {tuple(x.shape)}): take autocast and fixed precisions out of the loss for the check."
                )
        return out


def _promoted(x: Any) -> Any:
    """A float tensor of lower precision in float64. Leaves that require a gradient are parameters, and stay as they are."""
    if isinstance(x, Tensor) and x.dtype in _LOWER and not (x.requires_grad and x.is_leaf):
        return x.double()
    return x


_LOWER = frozenset({torch.float32, torch.float16, torch.bfloat16})


def _not_lower(x: Any) -> Any:
    return torch.float64 if isinstance(x, torch.dtype) and x in _LOWER else x
