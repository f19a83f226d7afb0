"""Snapshots of a training run, last in, first out, in two levels.

The newest few stay on the device. Older ones go to host memory or to disk, and come back before they are needed: a thread moves
them while the device computes. At most `PENDING` are on their way at a time, so that device memory does not grow with the number
of checkpoints, whatever the speed of the disk.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import zlib
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from hypergrad.core.problem import Saved
from hypergrad.optimizers.binding import State

NEAR = 1  # checkpoints that stay on the device, besides those on their way
PENDING = 1
SEGMENT = 2  # steps between checkpoints that go to files, where there is room for them:
SHARE = 0.5  # of what is free there


def default_every(steps: int) -> int:
    """√K steps between checkpoints: about 2√K states in all."""
    return max(1, math.isqrt(steps))


@dataclass
class Checkpoint:
    """The state before a step, and the model's buffers."""

    state: State
    buffers: list[Saved]

    def tensors(self) -> list[Tensor]:
        """What is moved to the second level. What an optimizer without a rule remembers besides tensors stays."""
        return [self.state.theta, *self.state.slots.values(), *(saved.value for saved in self.buffers)]

    def with_tensors(self, tensors: Sequence[Tensor], counts: tuple[int, ...]) -> Checkpoint:
        theta, *rest = tensors
        slots = dict(zip(self.state.slots, rest, strict=False))
        values = rest[len(slots) :]
        buffers = [Saved(saved.tensor, x) for saved, x in zip(self.buffers, values, strict=True)]
        return Checkpoint(replace(self.state, theta=theta, slots=slots, counts=counts), buffers)

    def shell(self, last: Checkpoint | None) -> Checkpoint:
        """What `with_tensors` makes a whole checkpoint of again, of tensors on no device. The last one's, where that would do."""
        if last is not None and self.alike(last):
            return last
        return self.with_tensors([torch.empty_like(x, device="meta") for x in self.tensors()], self.state.counts)

    def alike(self, other: Checkpoint) -> bool:
        """Whether both have the same tensors and nothing besides."""
        a, b = self.state, other.state
        bare = (
            not a.rest and not b.rest and a.slots.keys() == b.slots.keys() and len(self.buffers) == len(other.buffers)
        )
        pairs = zip(self.buffers, other.buffers, strict=False)
        same = bare and all(x.tensor is y.tensor for x, y in pairs)
        return same and kinds_of(self.tensors()) == kinds_of(other.tensors())

    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.tensors())

    def digest(self) -> int:
        """A number of θ's bits: another one where a step was not played again bit for bit, but for one chance in four billion."""
        theta = self.state.theta
        if theta.device.type != "cpu":
            return int(torch.hash_tensor(theta).view(torch.int64)) % 2**64  # uint64: int() of it overflows from 2⁶³ on
        return zlib.crc32(theta.detach().contiguous().view(torch.uint8).numpy().data)


class Stack(Protocol):
    """What a list of checkpoints is, as far as the adjoint needs it."""

    def append(self, checkpoint: Checkpoint, /) -> None: ...

    def pop(self) -> Checkpoint: ...

    def __len__(self) -> int: ...


class FarStack:
    """A stack whose older checkpoints lie in host memory (`folder` None) or in files."""

    def __init__(self, folder: Path | None, device: torch.device, worker: ThreadPoolExecutor):
        self.folder, self.device, self.worker = folder, device, worker
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.near: deque[Checkpoint] = deque()
        self.leaving: deque[_Far] = deque()
        self.far: list[_Far] | _Files = [] if folder is None else _Files()
        self.shell: Checkpoint | None = None  # the last one's
        self.coming: tuple[_Far, Future[list[Tensor]]] | None = None
        self.written = 0  # files so far

    def __len__(self) -> int:
        return len(self.near) + len(self.leaving) + len(self.far) + (self.coming is not None)

    def append(self, checkpoint: Checkpoint) -> None:
        if self.coming is not None:  # it was on its way back; it stays
            self.near.append(self._arrived())
        self.near.append(checkpoint)
        while len(self.near) > NEAR:
            old = self.near.popleft()
            if len(self.leaving) == PENDING:
                early = self.leaving.popleft()
                self.far.append(early._replace(away=_done(early.away)))  # raises here what went wrong there
            self.shell = old.shell(self.shell)
            away = self.worker.submit(self._away, old.tensors(), self._mark(), self._number())
            self.leaving.append(_Far(self.shell, _packed(old.state.counts), away))

    def pop(self) -> Checkpoint:
        return self.near.pop() if self.near else self._arrived()

    def fetch(self) -> None:
        """Let the next checkpoint come: it will be popped soon."""
        if not self.near and self.coming is None and len(self):
            self._fetch()

    def _arrived(self) -> Checkpoint:
        if self.coming is None:
            self._fetch()
        assert self.coming is not None
        (far, coming), self.coming = self.coming, None
        tensors = coming.result()
        for x in tensors if self.stream is not None else ():
            x.record_stream(torch.cuda.current_stream(self.device))
        counts = far.counts if isinstance(far.counts, tuple) else (far.counts,) * len(far.shell.state.counts)
        return far.shell.with_tensors(tensors, counts)

    def _fetch(self) -> None:
        far = self.leaving.pop() if self.leaving else self.far.pop()
        self.coming = far, self.worker.submit(self._back, far)

    def _number(self) -> int:
        self.written += 1
        return self.written

    def _path(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{id(self)}-{number}"

    # ---- in the worker's thread

    def _mark(self) -> Any:
        return None if self.stream is None else torch.cuda.current_stream(self.device).record_event()

    def _away(self, tensors: list[Tensor], ready: Any, number: int) -> Any:
        with self._beside(ready):
            host = [_to_host(x) for x in tensors]
        if self.folder is None:
            return host
        with self._path(number).open("wb") as file:  # buffered: a raw write may write a part only
            for x in host:
                file.write(x.view(-1).view(torch.uint8).numpy().data)
        return number

    def _back(self, far: _Far) -> list[Tensor]:
        host = _done(far.away)
        if self.folder is not None:
            host = _read(self._path(host), kinds_of(far.shell.tensors()))
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


class _Far(NamedTuple):
    """A checkpoint in the second level."""

    shell: Checkpoint
    counts: tuple[int, ...] | int  # a number where all parameters have the same
    away: Any  # its tensors, or the number of its file, or the future of that


class _Files:
    """A stack of those that are in files. There is one for every few steps of a run: a few bytes each."""

    def __init__(self) -> None:
        self.shells: list[Checkpoint] = []
        self.numbers, self.counts = array("q"), array("q")
        self.uneven: dict[int, tuple[int, ...]] = {}  # number -> counts, where parameters have not all the same

    def __len__(self) -> int:
        return len(self.shells)

    def append(self, far: _Far, /) -> None:
        self.shells.append(far.shell)
        self.numbers.append(far.away)
        if isinstance(far.counts, tuple):
            self.uneven[far.away] = far.counts
            self.counts.append(-1)
        else:
            self.counts.append(far.counts)

    def pop(self) -> _Far:
        shell, number, count = self.shells.pop(), self.numbers.pop(), self.counts.pop()
        return _Far(shell, self.uneven.pop(number) if count < 0 else count, number)


def _packed(counts: tuple[int, ...]) -> tuple[int, ...] | int:
    return counts[0] if len(set(counts)) == 1 else counts


def _done(away: Any) -> Any:
    return away.result() if isinstance(away, Future) else away


def kinds_of(tensors: Sequence[Tensor]) -> list[tuple[torch.Size, torch.dtype]]:
    return [(x.shape, x.dtype) for x in tensors]


def _read(path: Path, kinds: Sequence[tuple[torch.Size, torch.dtype]]) -> list[Tensor]:
    """Tensors from a file in which they lie one behind the other, and which is gone then."""
    out = [torch.empty(shape, dtype=dtype) for shape, dtype in kinds]
    with path.open("rb") as file:
        for x in out:
            read = file.readinto(x.view(-1).view(torch.uint8).numpy()) if x.numel() else 0  # type: ignore[attr-defined]
            if read != x.nbytes:
                raise OSError(f"a checkpoint's file is too short: {read} of {x.nbytes} bytes of a tensor.")
    path.unlink()
    return out


def _to_host(x: Tensor) -> Tensor:
    if x.device.type == "cpu":
        return x.contiguous()
    return torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True)


def fetch(stack: Stack) -> None:
    """Let the next checkpoint of a stack come, while something else is done."""
    if isinstance(stack, FarStack):
        stack.fetch()


class Stacks(AbstractContextManager["Stacks"]):
    """Makes stacks, and clears up behind them.

    Args:
        offload: None, everything stays on the device; "host", older checkpoints go to host memory; a folder (or "disk" for a
            temporary one), to files there, which are gone at the end. Files are slow for the states of a segment that is
            played again, one a step: these stay on the device then, and segments are `SEGMENT` steps long, whatever K is, or as
            long as it takes to keep half of the room there free.
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
            self.worker = ThreadPoolExecutor(1, "hypergrad checkpoints")
            if offload != "host":
                parent = None if offload == "disk" else offload
                self.folder = tempfile.TemporaryDirectory(prefix="hypergrad-", dir=parent, ignore_cleanup_errors=True)

    def new(self) -> Stack:
        if self.worker is None:
            return []
        return FarStack(None if self.folder is None else Path(self.folder.name), self.device, self.worker)

    def of_a_segment(self) -> Stack:
        return [] if self.folder is not None else self.new()

    def default_every(self, steps: int, nbytes: int) -> int:
        """√K steps, or fewer where it is a matter of memory that does not grow with K; a checkpoint takes nbytes."""
        most = default_every(steps)
        if self.folder is None:
            return most
        room = SHARE * shutil.disk_usage(self.folder.name).free
        if steps * nbytes > most * room:
            raise ValueError(
                f"offload: a checkpoint every {most} steps takes {steps / most * nbytes / 2**30:.3g} GiB, more than half of what "
                f"is free in {self.folder.name!r}. Pass a folder with more room, or every=… for fewer checkpoints."
            )
        return min(most, max(SEGMENT, math.ceil(steps * nbytes / room)))

    def __exit__(self, *_: object) -> None:
        if self.worker is not None:
            self.worker.shutdown(cancel_futures=True)
        if self.folder is not None:
            self.folder.cleanup()
