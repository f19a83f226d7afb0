"""A TorchFunctionMode under which an optimizer's unmodified `step()` becomes part of an autograd graph.

    torch.no_grad(), set_grad_enabled     do nothing
    x.item()                              is a TracedFloat
    x.detach(), x.data                    are x; `x.data = y` copies y into x
    x.add_(y, alpha=a), … with traced a   x.copy_(x + a y), …: an argument `alpha` of type float would lose the graph
    f(x, a) with traced a                 f(x, a.t)
    √x and xᵉ, 0 < e < 1, at x = 0        have the derivative 0, as in every rule here (see adam.py)
    torch._foreach_f(xs, …)               is f of each tensor
    x.bfloat16(), dtype=torch.float32     lower than `dtype`: ignored, for a derivative of the step without that rounding

Tensors may be changed in place after they were saved for the backward pass: what is saved is a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_any, tree_map

from hypergrad.optimizers.traced.formulas import FORMULAS, OF_LISTS, in_place, root
from hypergrad.optimizers.traced.traced_float import TracedFloat, traced_math, untraced


def _item(x: Tensor) -> Any:
    value = x.detach().item()
    return TracedFloat(value, x.double().reshape(())) if x.requires_grad else value


def _same(x: Tensor, *args: Any, **kw: Any) -> Tensor:
    return x


def _set_data(x: Tensor, y: Tensor) -> None:
    if x.shape != y.shape:
        raise NotImplementedError(f"it gives a tensor of shape {tuple(x.shape)} the data of one of {tuple(y.shape)}")
    x.copy_(y)


def _of_detached(f: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, *args, **kw: f(x.detach(), *args, **kw)


def _filled(empty: Callable[..., Tensor], *where: Any, value: Any, **kw: Any) -> Tensor:
    if isinstance(value, (list, tuple)):
        device = next((x.device for x in value if isinstance(x, Tensor)), None)
        numbers = [x if isinstance(x, Tensor) else torch.tensor(x, device=device) for x in value]
        value = torch.stack([x.to(torch.float64) for x in numbers])
    kw.setdefault("dtype", torch.get_default_dtype() if not isinstance(where[0], Tensor) else where[0].dtype)
    kw.pop("requires_grad", None)
    return empty(*where, **kw) + value.to(kw["dtype"])


# made from a number: torch would take the plain one
_MADE_FROM: dict[Any, Callable[..., Tensor]] = {
    torch.tensor: lambda value, **kw: _filled(torch.zeros, (), value=value, **kw),
    torch.as_tensor: lambda value, **kw: _filled(torch.zeros, (), value=value, **kw),
    torch.scalar_tensor: lambda value, **kw: _filled(torch.zeros, (), value=value, **kw),
    torch.full: lambda size, fill_value, **kw: _filled(torch.zeros, size, value=fill_value, **kw),
    torch.full_like: lambda x, fill_value, **kw: _filled(torch.zeros_like, x, value=fill_value, **kw),
    Tensor.new_full: lambda x, size, fill_value, **kw: _filled(x.new_zeros, size, value=fill_value, dtype=x.dtype),
    Tensor.new_tensor: lambda x, value, **kw: _filled(x.new_zeros, (), value=value, dtype=x.dtype),
}


def _unbound(x: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
    """`unbind` as views that may be changed in place."""
    return tuple(x.select(dim, i) for i in range(x.shape[dim]))


_INSTEAD: dict[Any, Callable[..., Any]] = {
    torch._C._set_grad_enabled: lambda mode: None,
    Tensor.item: _item,
    Tensor.detach: _same,
    torch.detach: _same,
    Tensor.detach_: _same,
    Tensor.requires_grad_: _same,
    Tensor.data.__get__: _same,  # type: ignore[attr-defined]
    Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
    Tensor.unbind: _unbound,
    torch.unbind: _unbound,
    Tensor.__iter__: lambda x: iter(_unbound(x)),
    Tensor.tolist: _of_detached(Tensor.tolist),
    Tensor.numpy: _of_detached(Tensor.numpy),
    Tensor.__array__: _of_detached(Tensor.__array__),
    Tensor.__float__: _of_detached(Tensor.__float__),
    Tensor.__int__: _of_detached(Tensor.__int__),
}


# ---- casts to a lower precision

_CASTS = {Tensor.float: torch.float32, Tensor.half: torch.float16, Tensor.bfloat16: torch.bfloat16}


class Promoted(TorchFunctionMode):
    """Casts to a precision lower than `dtype` are casts to `dtype`."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def at_least(self, x: Any) -> Any:
        lower = isinstance(x, torch.dtype) and x.is_floating_point and torch.finfo(x).eps > torch.finfo(self.dtype).eps
        return self.dtype if lower else x

    def promoted(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
        if func in _CASTS:
            return Tensor.to, (args[0], self.at_least(_CASTS[func])), {}
        if func is Tensor.to or func is Tensor.type:
            args = (args[0], *map(self.at_least, args[1:]))
        if "dtype" in kwargs:
            kwargs = kwargs | {"dtype": self.at_least(kwargs["dtype"])}
        return func, args, kwargs

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        func, args, kwargs = self.promoted(func, args, dict(kwargs or {}))
        return func(*args, **kwargs)


class Tracing(Promoted):
    """See the module. Entered by `tracing`."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        func, args, kwargs = self.promoted(func, args, dict(kwargs or {}))
        instead = _INSTEAD.get(func)
        if instead is not None:
            return instead(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name.startswith("_foreach_"):
            return self._each(name.removeprefix("_foreach_"), args, kwargs)
        out = kwargs.pop("out", None)
        if isinstance(out, Tensor):  # autograd does not take `out=`
            return out.copy_(self(func, *args, **kwargs))
        if out is not None:
            kwargs["out"] = out
        y = root(name, args)
        if y is not None:
            return y
        if not tree_any(lambda x: isinstance(x, TracedFloat), (args, kwargs)) and not _number_is_tensor(kwargs):
            return func(*args, **kwargs)
        return _with_tensors(func, name, args, kwargs)

    def __call__(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.__torch_function__(func, (), args, kwargs)

    def _each(self, name: str, args: Any, kwargs: Any) -> list[Any] | None:
        """A `torch._foreach` operation, tensor by tensor."""
        n = next(len(x) for x in args if isinstance(x, (list, tuple)))
        formula = OF_LISTS.get(name.rstrip("_"))
        func: Any = getattr(Tensor, name, None) if isinstance(args[0], (list, tuple)) else getattr(torch, name)
        rows = []
        for i in range(n):
            each = [x[i] if isinstance(x, (list, tuple)) else x for x in args]
            named = {k: x[i] if isinstance(x, (list, tuple)) else x for k, x in kwargs.items()}
            if formula is None:
                rows.append(self(func, *each, **named))
            else:
                y = formula(*_unwrapped(each), **_unwrapped(named))
                rows.append(each[0].copy_(y) if name.endswith("_") else y)
        return None if name.endswith("_") else rows


def _unwrapped(x: Any) -> Any:
    return tree_map(lambda y: y.t if isinstance(y, TracedFloat) else y, x)


def _number_is_tensor(kwargs: Any) -> bool:
    """torch takes a 0-d tensor for such a number, but not one with a graph."""
    return any(
        isinstance(kwargs.get(name), Tensor) and kwargs[name].requires_grad for name in ("alpha", "value", "beta")
    )


def _with_tensors(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """An operation that was given a TracedFloat, with its tensor instead."""
    new, kw = _unwrapped((args, kwargs))
    if func in _MADE_FROM:
        return _MADE_FROM[func](*new, **kw)
    formula = FORMULAS.get(name.rstrip("_")) if not name.startswith("__") else None
    if formula is not None:
        y = formula(*new, **kw)
        return args[0].copy_(y) if in_place(name) else y
    try:
        return func(*new, **kw)
    except TypeError:  # it takes plain numbers only: the self-check sees what is lost
        return func(*tree_map(untraced, args), **tree_map(untraced, kwargs))


@contextmanager
def tracing(dtype: torch.dtype) -> Iterator[None]:
    """Operations inside are recorded, also under no_grad and on detached tensors."""
    saved = torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x)
    with traced_math(), torch.enable_grad(), saved, Tracing(dtype):
        yield
