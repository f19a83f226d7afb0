"""Formulas of operations that a traced step computes in another way than torch.

Operations with a number (`x.add_(y, alpha=a)`) take a tensor with a graph for it, where torch takes a plain float only. Roots
√x and xᵉ, 0 < e < 1, have the derivative 0 at x = 0, as in every rule here (see adam.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


# operations with a number that torch wants as a plain float
def _lerp(x: Tensor, end: Tensor, weight: Any) -> Tensor:
    return x + weight * (end - x)


def _add(x: Tensor, y: Any, *, alpha: Any = 1) -> Tensor:
    return x + alpha * y


def _sub(x: Tensor, y: Any, *, alpha: Any = 1) -> Tensor:
    return x - alpha * y


def _addcmul(x: Tensor, a: Tensor, b: Tensor, *, value: Any = 1) -> Tensor:
    return x + value * a * b


def _addcdiv(x: Tensor, a: Tensor, b: Tensor, *, value: Any = 1) -> Tensor:
    return x + value * a / b


def _addmm(x: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    return beta * x + alpha * (a @ b)


def _addr(x: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    return beta * x + alpha * torch.outer(a, b)


def _clamp(x: Tensor, min: Any = None, max: Any = None) -> Tensor:
    low, high = (None if b is None else torch.as_tensor(b).to(x) for b in (min, max))
    return torch.clamp(x, low, high)


def _largest(x: Tensor, y: Any) -> Tensor:
    return torch.maximum(x, torch.as_tensor(y).to(x))


def _smallest(x: Tensor, y: Any) -> Tensor:
    return torch.minimum(x, torch.as_tensor(y).to(x))


def _norm(x: Tensor, ord: Any = 2, dtype: Any = None) -> Tensor:
    return torch.linalg.vector_norm(x, ord, dtype=dtype)


FORMULAS: dict[str, Callable[..., Tensor]] = {
    "lerp": _lerp,
    "add": _add,
    "sub": _sub,
    "subtract": _sub,
    "addcmul": _addcmul,
    "addcdiv": _addcdiv,
    "addmm": _addmm,
    "baddbmm": _addmm,
    "addmv": _addmm,
    "addr": _addr,
    "clamp": _clamp,
    "clip": _clamp,
}
# torch._foreach operations that are no method of a tensor, or whose last argument is positional
OF_LISTS: dict[str, Callable[..., Tensor]] = {
    "maximum": _largest,
    "minimum": _smallest,
    "clamp_min": _largest,
    "clamp_max": _smallest,
    "norm": _norm,
    "addcmul": lambda x, a, b, value=1: _addcmul(x, a, b, value=value),
    "addcdiv": lambda x, a, b, value=1: _addcdiv(x, a, b, value=value),
}


def in_place(name: str) -> bool:
    return name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))


def root(name: str, args: Any) -> Tensor | None:
    """√x or xᵉ with the derivative 0 at 0; None where the operation is another one."""
    base = name.strip("_").removeprefix("i")
    if base not in ("sqrt", "pow") or not isinstance(args[0], Tensor) or not args[0].requires_grad:
        return None
    exponent = 0.5 if base == "sqrt" else args[1]
    if type(exponent) is not float or not 0 < exponent < 1:
        return None
    y = _Root.apply(args[0], exponent)
    return args[0].copy_(y) if in_place(name) else y


class _Root(torch.autograd.Function):
    """y = xᵉ for a fixed e in (0, 1), dy = e y/x dx where x > 0, else 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, exponent: float) -> Tensor:
        y = x.sqrt() if exponent == 0.5 else x.pow(exponent)
        ctx.exponent = exponent
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, y = ctx.saved_tensors
        with torch.no_grad():
            slope = torch.where(x > 0, ctx.exponent * y / x, 0)
        return grad * slope, None
