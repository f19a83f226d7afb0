"""A stand-in for a GPU: tensors that say they lie on a device, are kept in host memory, and refuse to meet host tensors.

    with stand_in() as device:
        model, x = model.to(NAME), x.to(NAME)
        device.clear()
        train(model, x)
        device.waits, device.kernels, device.bytes_to_host, device.bytes_to_device

What is counted, as a GPU would have it:

    kernels           operations that write to memory of the device; views and empty tensors are none, a foreach operation is one
    waits             what makes Python wait until the device is done: numbers read (`float(x)`, `x.tolist()`, `if x`),
                      `torch.equal`, copies to the host, sizes that depend on values (`x.nonzero()`, masks as indices)
    bytes_to_device   of what is copied there, among it indices that are lists
    bytes_to_host     of what is copied back, numbers that are read included

A copy to the host that does not block makes nobody wait. In the main thread it arrives when an event is waited for, and is not
there before (`hypergrad.core.host_copy`); worker threads wait for theirs at once.

Host tensors may only meet tensors of the device as CUDA allows it: as single numbers, as indices, in copies.

It says nothing of speed, streams, the order in which kernels run, numerics of a GPU's own kernels, or its random numbers. Not
there at all: autocast, GradScaler, compiled code, process groups, pinned memory (asked for, it is ordinary memory). The device is
torch's spare one (PrivateUse1), which is renamed for the whole process.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "stand_in"
_setup_privateuseone_for_python_backend(NAME)
getattr(
    torch, NAME
).get_amp_supported_dtype = list  # none: asked for wherever torch.utils.checkpoint runs, on a CPU too
aten = torch.ops.aten

READS = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default}
SIZES = {aten.nonzero.default, aten.masked_select.default, aten.unique_dim.default, aten._unique2.default}
EMPTY = {aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default, aten.new_empty.default}
INDEXED = ("aten.index.", "aten.index_put", "aten._index_put", "aten._unsafe_index")


class Device:
    """What was asked of the device since `clear`."""

    def __init__(self) -> None:
        self.kernels: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.bytes_to_device = self.bytes_to_host = 0
        self.on_their_way: list[tuple[Tensor, Tensor]] = []  # host tensors, and what they will hold
        self.counts = True
        self.float64 = True

    def clear(self) -> None:
        counts, on_their_way, float64 = self.counts, self.on_their_way, self.float64
        self.__init__()
        self.counts, self.on_their_way, self.float64 = counts, on_their_way, float64

    def takes(self, dtype: torch.dtype | None) -> None:
        """Raise where the device has no such numbers, as Apple's MPS has no float64."""
        if dtype == torch.float64 and not self.float64:
            raise TypeError(f"Cannot convert a {NAME} Tensor to float64 dtype as it has none.")

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What runs inside is not counted."""
        before, self.counts = self.counts, False
        try:
            yield
        finally:
            self.counts = before

    def wait(self, what: str, nbytes: int = 0) -> None:
        if self.counts:
            self.waits[what] += 1
            self.bytes_to_host += nbytes

    def received(self, nbytes: int) -> None:
        if self.counts:
            self.bytes_to_device += nbytes

    def sent(self, target: Tensor, source: Tensor) -> None:
        if self.counts:
            self.bytes_to_host += source.nbytes
        self.on_their_way.append((target, source.clone()))

    def synchronize(self) -> None:
        """Copies that were on their way arrive."""
        if self.counts:
            self.waits["synchronize"] += 1
        for target, value in self.on_their_way:
            target.copy_(value)
        self.on_their_way.clear()

    def launched(self, what: str) -> None:
        if self.counts:
            self.kernels[what] += 1


DEVICE = Device()  # the one device there is


class OnDevice(Tensor):
    """A tensor of the device; `host` is where it is kept."""

    __slots__ = ("host",)  # not among the attributes that a user's parameter has
    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> OnDevice:
        DEVICE.takes(host.dtype)
        out = Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=f"{NAME}:0",
        )
        out.host = host
        return out

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    # these do not come by the dispatcher

    def tolist(self) -> Any:
        DEVICE.wait("tolist", self.host.nbytes)
        return self.host.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def new_tensor(self, data: Any, **kwargs: Any) -> Tensor:
        return torch.tensor(data, dtype=kwargs.get("dtype", self.dtype), device=kwargs.get("device", NAME))

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def untyped_storage(self) -> Any:
        return self.host.untyped_storage()

    def __getitem__(self, index: Any) -> Tensor:
        return super().__getitem__(_lists_moved(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_lists_moved(index), value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        out = OnDevice(self.host.detach().clone()).requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            out = torch.nn.Parameter(out.detach(), self.requires_grad)
        memo[id(self)] = out
        return out

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.host})"


def _lists_moved(index: Any) -> Any:
    """Lists in an index become tensors of the device."""
    if isinstance(index, list):
        return torch.tensor(index, device=NAME)
    return tuple(map(_lists_moved, index)) if isinstance(index, tuple) else index


class _Factories(TorchDispatchMode):
    """Makes factories with `device=NAME` work."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _host(x: Any) -> Any:
    return x.host if isinstance(x, OnDevice) else x


def _device_of(x: Any) -> str | None:
    return None if x is None else torch.device(x).type


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    here = [x for x in tensors if isinstance(x, OnDevice)]
    wanted = _device_of(kwargs.get("device"))
    kwargs = dict(kwargs) | ({"device": torch.device("cpu")} if wanted == NAME else {})
    kwargs.pop("pin_memory", None)
    if not here and wanted != NAME:
        return func(*args, **kwargs)
    if func is aten.copy_.default:
        return _copied(func, args, kwargs)
    if func is aten._to_copy.default:
        return _moved(func, args, kwargs, wanted)
    strangers = [x for x in tensors if not isinstance(x, OnDevice) and x.dim() > 0 and x.device.type != "meta"]
    if strangers and not str(func).startswith(INDEXED):
        shapes = ", ".join(str(tuple(x.shape)) for x in strangers)
        raise RuntimeError(f"Expected all tensors to be on the same device: {func} met host tensors of shape {shapes}.")
    if func in READS:
        DEVICE.wait(str(func), here[0].host.element_size())
    elif func in SIZES or (str(func).startswith(INDEXED) and _has_mask(args[1])):
        DEVICE.wait(f"{func}: a size that depends on values")
    for x in strangers:  # indices
        DEVICE.received(x.nbytes)
    if here and func not in EMPTY and not _is_view(func):
        DEVICE.launched(str(func))
    out = func(*tree_map(_host, args), **tree_map(_host, kwargs))
    if wanted is not None and wanted != NAME:  # a meta tensor
        return out
    if func._schema.is_mutable and args and isinstance(args[0], OnDevice) and out is args[0].host:
        return args[0]
    if isinstance(kwargs.get("out"), OnDevice):
        return kwargs["out"]
    return tree_map(lambda x: OnDevice(x) if isinstance(x, Tensor) else x, out)


def _copied(func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    target, source = args[0], args[1]
    if isinstance(target, OnDevice):
        DEVICE.launched(str(func))
        DEVICE.received(0 if isinstance(source, OnDevice) else source.nbytes)
    elif args[2:] == (True,) and threading.current_thread() is threading.main_thread():
        DEVICE.sent(target, source.host)
        return target
    else:
        DEVICE.wait("copied to the host", source.host.nbytes)
    func(*map(_host, args), **kwargs)
    return target


def _moved(func: Any, args: Any, kwargs: dict[str, Any], wanted: str | None) -> Tensor:
    source = args[0]
    if isinstance(source, OnDevice):  # it converts, then copies
        DEVICE.takes(kwargs.get("dtype"))
    out = func(*map(_host, args), **kwargs)
    if wanted == "cpu":
        DEVICE.wait("copied to the host", source.host.nbytes)
        return out
    DEVICE.launched(str(func))
    DEVICE.received(0 if isinstance(source, OnDevice) else source.nbytes)
    return OnDevice(out)


def _has_mask(index: Any) -> bool:
    return any(isinstance(x, Tensor) and x.dtype == torch.bool for x in index)


def _is_view(func: Any) -> bool:
    """Whether an operation returns nothing but views of its arguments."""
    infos = [r.alias_info for r in func._schema.returns]
    return bool(infos) and all(info is not None and not info.is_write for info in infos)


@contextmanager
def stand_in(float64: bool = True) -> Iterator[Device]:
    """While it is on there is a device NAME; with float64=False one without such numbers, as MPS."""
    plain_tensor: Callable[..., Tensor] = torch.tensor

    def tensor(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if _device_of(device) != NAME:
            return plain_tensor(data, *args, device=device, **kwargs)
        out = plain_tensor(data, *args, **kwargs)
        DEVICE.received(math.prod(out.shape) * out.element_size())
        requires_grad = kwargs.get("requires_grad", False)
        return OnDevice(out.detach()).requires_grad_(requires_grad)

    def pool(*args: Any) -> ThreadPoolExecutor:  # a mode is on in one thread
        return ThreadPoolExecutor(*args, initializer=lambda: _Factories().__enter__())

    DEVICE.clear()
    DEVICE.float64 = float64
    without = mock.patch("hypergrad.core.float64.WITHOUT", set() if float64 else {NAME})
    threads = mock.patch("hypergrad.differentiate.offload.ThreadPoolExecutor", pool)
    far = mock.patch.multiple("hypergrad.core.host_copy", ASYNCHRONOUS={NAME}, _event=lambda _: DEVICE)
    with _Factories(), mock.patch("torch.tensor", tensor), threads, far, without:
        try:
            yield DEVICE
        finally:
            DEVICE.float64 = True
