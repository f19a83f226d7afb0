"""The processes that train one model together, and the means over them.

DistributedDataParallel trains with the mean of the ranks' gradients, so what is trained is the mean of their losses. Everything
else that a hypergradient is made of is linear in a loss: Hessian products, validation gradients. So every rank computes its
own, and the mean over the ranks takes its place.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

SUMS = 64  # numbers by which a gradient is recognised, see `column_sums`


class Processes:
    """The ranks of one process group, each with a copy of the model in DistributedDataParallel.

    With one process (`ALONE`) every mean is its argument, and nothing is communicated. All ranks have to call each
    method that communicates in the same order.

    Args:
        group: their process group; None: one process.
        wrappers: the DistributedDataParallel modules; they are not kept alive.

    Attributes:
        size, rank: as of the group.
        uneven: whether a rank may leave parameters without a gradient that others have (find_unused_parameters).
    """

    def __init__(self, group: Any = None, wrappers: Sequence[Any] = ()):
        self.group, self._wrappers = group, [weakref.ref(x) for x in wrappers]
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.uneven = any(x.find_unused_parameters for x in wrappers)

    @property
    def alone(self) -> bool:
        return self.size == 1

    @property
    def wrappers(self) -> list[Any]:
        return [x for ref in self._wrappers if (x := ref()) is not None]

    def mean(self, x: Tensor) -> Tensor:
        """The mean over the ranks, the same on each bit for bit: one collective."""
        return x if self.alone else self.mean_(x.detach().clone(memory_format=torch.contiguous_format))

    def mean_(self, x: Tensor) -> Tensor:
        """The same in place, of a contiguous tensor."""
        if not self.alone:
            dist.all_reduce(x, group=self.group)
            x.div_(self.size)  # after the sum: that of whole numbers is exact
        return x

    def means(self, tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor | None]:
        """The mean of each tensor, shaped as in `like`, by one collective. None is zero, and where all ranks have it None."""
        if self.alone:
            return list(tensors)
        flat = [torch.zeros_like(y).flatten() if x is None else x.detach().flatten() for x, y in zip(tensors, like)]
        has = self.any([x is not None for x in tensors])
        found = self.mean(torch.cat(flat)).split([y.numel() for y in like])
        return [x.view(y.shape) if h else None for x, y, h in zip(found, like, has, strict=True)]

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """Which flags are set on a rank. Without `uneven` those of all ranks are the same, and nothing is communicated."""
        if self.alone or not self.uneven:
            return list(flags)
        device = self._device()
        return self.mean(torch.tensor(flags, dtype=torch.float64, device=device)).bool().tolist()

    def largest(self, x: int) -> int:
        """The largest of the ranks' numbers."""
        return x if self.alone else max(self.all(x))

    def all(self, x: Any) -> list[Any]:
        """What every rank has, in the order of ranks. Through pickle: for beginnings."""
        if self.alone:
            return [x]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, x, group=self.group)
        return found

    def check_same(self, what: str, x: Any) -> None:
        """Raise where ranks have different numbers or names."""
        found = self.all(x)
        if any(repr(y) != repr(found[0]) for y in found):
            shown = "; ".join(f"rank {i}: {y}" for i, y in enumerate(found))
            raise ValueError(f"{what} must be the same on every rank of DistributedDataParallel, but {shown}.")

    def _device(self) -> torch.device:
        return next(p.device for x in self.wrappers for p in x.module.parameters())

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Forward passes in here do not prepare DistributedDataParallel for a backward pass: none follows that it is to see."""
        wrappers = self.wrappers
        saved = [(x.require_backward_grad_sync, x.require_forward_param_sync) for x in wrappers]
        try:
            for x in wrappers:
                x.require_backward_grad_sync = False
            yield
        finally:
            for x, (backward, forward) in zip(wrappers, saved, strict=True):
                x.require_backward_grad_sync, x.require_forward_param_sync = backward, forward


ALONE = Processes()


def column_sums(x: Tensor) -> Tensor:
    """At most SUMS sums of elements of a vector [n], and its norm: what tells one gradient from another.

    Example:
        >>> column_sums(torch.tensor([3.0, 4.0])).tolist()
        [3.0, 4.0, 5.0]
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    width = min(SUMS, len(wide))
    whole = len(wide) // width * width
    sums = wide[:whole].view(-1, width).sum(0)
    sums[: len(wide) - whole] += wide[whole:]
    return torch.cat([sums, torch.linalg.vector_norm(wide)[None]])


def is_mean(found: Sequence[float], means: Sequence[float], dtype: torch.dtype) -> bool:
    """Whether a gradient is the mean of the ranks' own; True where something is not finite.

    If it is a rank's own instead, the root of the sum of squares is that of its distance from the mean, about.

    Args:
        found: `column_sums` of the gradient.
        means: the means of the ranks' `column_sums`.
        dtype: of the gradient.
    """
    off = sum((a - b) ** 2 for a, b in zip(found[:-1], means[:-1], strict=True)) ** 0.5
    tolerance = min(10 * torch.finfo(dtype).eps ** 0.5, 0.1)
    return not off > tolerance * means[-1]
