"""A validation loss that writes to parameters: its gradient would be taken at other weights than those it was computed with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, strided
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ERROR = (
    "val_loss writes to the parameters that the optimizer holds ({}), as optimizer.eval() and train() of schedule-free "
    "optimizers do, or weights exchanged for their average: its gradient would be taken at other weights than it was computed "
    "with. Compute it with the weights as they are, without optimizer.eval() and train(); for an average of the weights there "
    "are hypergradient(ema=...) and Tuner(average=True)."
)


class _Writes(TorchDispatchMode):
    """Notes operations that write to the memory of some tensors, through whatever view of it."""

    def __init__(self, tensors: Sequence[Tensor]):
        super().__init__()
        self.places = {_place(x) for x in tensors} - {0}
        self.found = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable and not self.found:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._note(func, value)
            if "out" in (kwargs or {}):
                self._note(func, kwargs["out"])
        return func(*args, **(kwargs or {}))

    def _note(self, func: Any, value: Any) -> None:
        if any(isinstance(x, Tensor) and _place(x) in self.places for x in tree_leaves(value)):
            self.found = str(func).removeprefix("aten.").split(".")[0]


@contextmanager
def _without_modes(optimizers: Sequence[Any]) -> Iterator[None]:
    """Let `eval` and `train` of these optimizers raise."""
    held = [(vars(opt), name) for opt in optimizers for name in ("eval", "train") if callable(getattr(opt, name, None))]
    held = [(attributes, name) for attributes, name in held if name not in attributes]
    for attributes, name in held:
        attributes[name] = partial(_refuse, name)
    try:
        yield
    finally:
        for attributes, name in held:
            del attributes[name]


def _refuse(name: str, *args: Any, **kw: Any) -> None:
    raise ValueError(ERROR.format(f"optimizer.{name}()"))


@contextmanager
def _uncompiled(writes: _Writes) -> Iterator[None]:
    """Up to torch 2.11 a compiled module whose first call is under a TorchDispatchMode is never compiled any more."""
    with torch.compiler.set_stance("force_eager"), writes:
        yield


def _place(x: Tensor) -> int:
    return x.untyped_storage().data_ptr() if x.layout is strided else 0


@contextmanager
def refused(
    params: Sequence[Tensor], optimizers: Sequence[Any], closely: bool, explain: Callable[[], object]
) -> Iterator[None]:
    """Raise where what runs here has written to parameters.

    Args:
        optimizers: whose eval() and train() are refused, where they have these, which a step replayed here would not heed.
        closely: see every write, also one by way of `.data`; else those alone that autograd counts.
        explain: called where something was written; it raises where it knows what did.

    Raises:
        ValueError: after the code has come to its end, so that it has put back what it puts back.
    """
    before = [p._version for p in params]
    writes = _Writes(params)
    with _without_modes(optimizers), _uncompiled(writes) if closely else nullcontext():
        yield
    if writes.found or any(p._version != old for p, old in zip(params, before, strict=True)):
        explain()
        raise ValueError(ERROR.format(writes.found or "in place"))
