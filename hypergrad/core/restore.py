"""What puts a user's objects back: random numbers, modes, parameters, buffers, gradients, and the tensors that modules hold.

A user's code runs inside them on the user's own model.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hypergrad.core import multi_tensor

Slot = tuple[dict[str, Any], str]  # an entry of a module's `_parameters` or `_buffers`


class Rng:
    """The state of torch's random number generators, on CPU and on the parameters' device."""

    def __init__(self, device: torch.device):
        self.device = device
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def seed(self, seed: int) -> None:
        """Seed the generators whose state is kept here."""
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes a millisecond
        if self.cuda is not None:
            with torch.cuda.device(self.device):
                torch.cuda.manual_seed(seed)

    def equals(self, other: Rng) -> bool:
        same = torch.equal(self.cpu, other.cpu)
        return same and (self.cuda is None or (other.cuda is not None and torch.equal(self.cuda, other.cuda)))

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)


class HostRng:
    """The state of numpy's and Python's global generators, which augmentations draw from: 0.1 ms, too long for every step."""

    def __init__(self) -> None:
        self.numpy: Any = np.random.get_state()  # noqa: NPY002
        self.python = random.getstate()

    def seed(self, seed: int) -> None:
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)

    def restore(self) -> None:
        np.random.set_state(self.numpy)  # noqa: NPY002
        random.setstate(self.python)


class Modes:
    """Which modules of a model, and of nets beside it, are in train mode."""

    def __init__(self, model: torch.nn.Module, *others: torch.nn.Module):
        self.found = [(m, m.training) for owner in (model, *others) for m in owner.modules()]

    def restore(self) -> None:
        for module, training in self.found:
            if module.training != training:
                module.training = training  # not by train(), which the user may have made do less


class Saved(NamedTuple):
    """A buffer: the tensor itself, and a copy of its value."""

    tensor: Tensor
    value: Tensor


class Buffers:
    """The buffers of a model, by the modules that hold them: a module may put another tensor in a buffer's place.

    others: nets beside the model, such as one that weighs examples.
    """

    def __init__(self, model: torch.nn.Module, *others: torch.nn.Module):
        modules = dict.fromkeys(m for owner in (model, *others) for m in owner.modules())
        self.places = [(m, name) for m in modules for name, b in m._buffers.items() if b is not None]

    @property
    def slots(self) -> list[Slot]:
        return [(module._buffers, name) for module, name in self.places]

    def now(self) -> list[Tensor]:
        return [module._buffers[name] for module, name in self.places]  # type: ignore[misc]

    def read(self) -> list[Saved]:
        present = self.now()
        return [Saved(b, x) for b, x in zip(present, multi_tensor.copies(present), strict=True)]

    def write(self, saved: Sequence[Saved], silently: bool = False) -> None:
        """Put the tensors and their values back. silently: see `Binding.load`."""
        for (module, name), (tensor, _) in zip(self.places, saved, strict=True):
            module._buffers[name] = tensor
        multi_tensor.write([tensor.data if silently else tensor for tensor, _ in saved], [value for _, value in saved])


def all_params(model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> list[Tensor]:
    """The parameters of optimizers and model, each once."""
    held = [p for opt in optimizers for group in opt.param_groups for p in group["params"]]
    return list({id(p): p for p in [*held, *model.parameters()]}.values())


@contextmanager
def untouched(params: Sequence[Tensor], buffers: Buffers, device: torch.device) -> Iterator[None]:
    """Put values of parameters, buffers and random numbers back at the end, whatever happens inside."""
    theta, saved, rng, host_rng = multi_tensor.copies(params), buffers.read(), Rng(device), HostRng()
    try:
        yield
    finally:
        multi_tensor.write(params, theta)
        buffers.write(saved)
        rng.restore()
        host_rng.restore()


@contextmanager
def as_found(model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[None]:
    """`untouched` for all parameters of optimizers and model, and their gradients put back."""
    params = all_params(model, optimizers)
    grads = [p.grad for p in params]
    try:
        with untouched(params, Buffers(model), params[0].device):
            yield
    finally:
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad


@contextmanager
def swapped(slots: Sequence[Slot], tensors: Sequence[Tensor]) -> Iterator[None]:
    """Let modules hold other tensors, and put the same ones as before back at the end."""
    old = [where[name] for where, name in slots]
    try:
        for (where, name), x in zip(slots, tensors, strict=True):
            where[name] = x
        yield
    finally:
        for (where, name), x in zip(slots, old, strict=True):
            where[name] = x
