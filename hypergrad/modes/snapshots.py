"""Snapshots of a training run, last in, first out, in two levels.

The newest few stay on the device. Older ones go to host memory or to disk, and come back before they are needed: a thread moves
them while the device computes. At most `PENDING` are on their way at a time, so that device memory does not grow with the number
of snapshots, whatever the speed of the disk.
"""

from __future__ import annotations

import math
import os
import tempfile
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from hypergrad.problem import Saved
from hypergrad.updates.binding import State

NEAR = 1  # snapshots that stay on the device, besides those on their way
PENDING = 2
NOTHING = torch.empty(0)
SEGMENT = 4  # steps between snapshots that go to files


def default_every(steps: int) -> int:
    """√K steps between snapshots: about 2√K states in all."""
    return max(1, math.isqrt(steps))


@dataclass
class Snapshot:
    """The state before a step, and the model's buffers."""

    state: State
    buffers: list[Saved]

    def tensors(self) -> list[Tensor]:
        """What is moved to the second level. What an optimizer without a rule remembers besides tensors stays."""
        return [self.state.theta, *self.state.slots.values(), *(saved.value for saved in self.buffers)]

    def with_tensors(self, tensors: Sequence[Tensor]) -> Snapshot:
        theta, *rest = tensors
        slots = dict(zip(self.state.slots, rest, strict=False))
        values = rest[len(slots) :]
        buffers = [Saved(saved.tensor, x) for saved, x in zip(self.buffers, values, strict=True)]
        return Snapshot(replace(self.state, theta=theta, slots=slots), buffers)

    def without_tensors(self) -> Snapshot:
        """What `with_tensors` makes a whole snapshot of again."""
        slots = dict.fromkeys(self.state.slots, NOTHING)
        return Snapshot(
            replace(self.state, theta=NOTHING, slots=slots), [Saved(saved.tensor, NOTHING) for saved in self.buffers]
        )

    def digest(self) -> int:
        """A number of θ's bits: another one where a step was not played again bit for bit, but for one chance in four billion."""
        theta = self.state.theta
        if theta.device.type != "cpu":
            return int(torch.hash_tensor(theta))
        return zlib.crc32(theta.detach().contiguous().view(torch.uint8).numpy().data)


class Stack(Protocol):
    """What a list of snapshots is, as far as the adjoint needs it."""

    def append(self, snapshot: Snapshot, /) -> None: ...

    def pop(self) -> Snapshot: ...

    def __len__(self) -> int: ...


class FarStack:
    """A stack whose older snapshots lie in host memory (`folder` None) or in files."""

    def __init__(self, folder: Path | None, device: torch.device, worker: ThreadPoolExecutor):
        self.folder, self.device, self.worker = folder, device, worker
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.near: deque[Snapshot] = deque()
        self.far: list[tuple[Snapshot, Any]] = []  # without its tensors; what holds them, or its future
        self.kinds: list[tuple[torch.Size, torch.dtype]] = []  # of the last snapshot's tensors
        self.coming: tuple[Snapshot, Future[list[Tensor]]] | None = None
        self.written = 0

    def __len__(self) -> int:
        return len(self.near) + len(self.far) + (self.coming is not None)

    def append(self, snapshot: Snapshot) -> None:
        if self.coming is not None:  # it was on its way back; it stays
            self.near.append(self._arrived())
        self.near.append(snapshot)
        while len(self.near) > NEAR:
            old = self.near.popleft()
            tensors = old.tensors()
            self.far.append(
                (old.without_tensors(), self.worker.submit(self._away, tensors, self._mark(), self._name()))
            )
            if len(self.far) > PENDING:
                empty, away = self.far[-1 - PENDING]
                self.far[-1 - PENDING] = empty, _done(away)  # raises here what went wrong there

    def pop(self) -> Snapshot:
        found = self.near.pop() if self.near else self._arrived()
        if len(self.near) < NEAR and self.coming is None and self.far:
            self._fetch()
        return found

    def _arrived(self) -> Snapshot:
        if self.coming is None:
            self._fetch()
        assert self.coming is not None
        (empty, coming), self.coming = self.coming, None
        tensors = coming.result()
        for x in tensors if self.stream is not None else ():
            x.record_stream(torch.cuda.current_stream(self.device))
        return empty.with_tensors(tensors)

    def _fetch(self) -> None:
        empty, away = self.far.pop()
        self.coming = empty, self.worker.submit(self._back, away)

    def _name(self) -> Path | None:
        self.written += 1
        return None if self.folder is None else self.folder / f"{id(self)}-{self.written}"

    # ---- in the worker's thread

    def _mark(self) -> Any:
        return None if self.stream is None else torch.cuda.current_stream(self.device).record_event()

    def _away(self, tensors: list[Tensor], ready: Any, name: Path | None) -> Any:
        with self._beside(ready):
            host = [_to_host(x) for x in tensors]
        if name is None:
            return host
        with name.open("wb") as file:  # buffered: a raw write may write a part only
            for x in host:
                file.write(x.view(-1).view(torch.uint8).numpy().data)
        kinds = [(x.shape, x.dtype) for x in host]
        self.kinds = self.kinds if self.kinds == kinds else kinds  # one list for all files
        return _File(str(name), self.kinds)

    def _back(self, away: Any) -> list[Tensor]:
        host = _done(away)
        if isinstance(host, _File):
            host = host.read()
        with self._beside(None):
            return [x.to(self.device, non_blocking=True) for x in host]

    @contextmanager
    def _beside(self, ready: Any) -> Iterator[None]:
        """On a stream of its own, after `ready`, and done at the end."""
        if self.stream is None:
            yield
            return
        with torch.cuda.stream(self.stream):
            if ready is not None:
                self.stream.wait_event(ready)
            yield
            self.stream.synchronize()


class _File(NamedTuple):
    """Tensors in a file, one behind the other."""

    path: str
    kinds: list[tuple[torch.Size, torch.dtype]]

    def read(self) -> list[Tensor]:
        with open(self.path, "rb") as file:
            out = [_read(file, shape, dtype) for shape, dtype in self.kinds]
        os.unlink(self.path)
        return out


def _done(away: Any) -> Any:
    return away.result() if isinstance(away, Future) else away


def _read(file: Any, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    x = torch.empty(shape, dtype=dtype)
    if x.numel():
        read = file.readinto(x.view(-1).view(torch.uint8).numpy())
        if read != x.numel() * x.element_size():
            raise OSError(
                f"a snapshot's file is too short: {read} of {x.numel() * x.element_size()} bytes of a tensor."
            )
    return x


def _to_host(x: Tensor) -> Tensor:
    if x.device.type == "cpu":
        return x.contiguous()
    return torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True)


class Stacks(AbstractContextManager["Stacks"]):
    """Makes stacks, and clears up behind them.

    Args:
        offload: None, everything stays on the device; "host", older snapshots go to host memory; a folder (or "disk" for a
            temporary one), to files there, which are gone at the end. Files are slow for the states of a segment that is
            played again, one a step: these stay on the device then, and segments are `SEGMENT` steps long, whatever K is.
    """

    def __init__(self, offload: str | Path | None, device: torch.device):
        if offload is not None and not isinstance(offload, (str, Path)):
            raise TypeError(f"offload must be None, 'host', 'disk' or a folder, got {type(offload).__name__}.")
        if offload not in (None, "host", "disk") and not Path(offload).is_dir():
            raise ValueError(f"offload: there is no folder {str(offload)!r}; make it, or pass 'host' or 'disk'.")
        self.device = device
        self.far = offload is not None and not (offload == "host" and device.type == "cpu")
        self.folder: tempfile.TemporaryDirectory[str] | None = None
        self.worker: ThreadPoolExecutor | None = None
        if self.far:
            self.worker = ThreadPoolExecutor(1, "hypergrad snapshots")
            if offload != "host":
                parent = None if offload == "disk" else offload
                self.folder = tempfile.TemporaryDirectory(prefix="hypergrad-", dir=parent, ignore_cleanup_errors=True)

    def new(self) -> Stack:
        if self.worker is None:
            return []
        return FarStack(None if self.folder is None else Path(self.folder.name), self.device, self.worker)

    def of_a_segment(self) -> Stack:
        return [] if self.folder is not None else self.new()

    def default_every(self, steps: int) -> int:
        """√K, or fewer where it is a matter of memory that does not grow with K."""
        return default_every(steps) if self.folder is None else min(default_every(steps), SEGMENT)

    def __exit__(self, *_: object) -> None:
        if self.worker is not None:
            self.worker.shutdown(cancel_futures=True)
        if self.folder is not None:
            self.folder.cleanup()
