"""Stacks of checkpoints whose older ones are in host memory or on disk.

The newest few stay on the device. A thread moves older ones away and fetches them before they are needed, while the device
computes. At most `PENDING` are being moved at a time, so that device memory does not grow with the number of checkpoints,
whatever the speed of the disk.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hypergrad.differentiate.checkpoints import Checkpoint, Stack, default_every, kinds_of

ON_DEVICE = 1  # checkpoints that stay on the device, besides those that are being moved
PENDING = 1
SEGMENT = 2  # steps between checkpoints that go to files, where disk space allows:
SHARE = 0.5  # of the free space


class OffloadedStack:
    """A stack whose older checkpoints are in host memory (`folder` None) or in files."""

    def __init__(self, folder: Path | None, device: torch.device, worker: ThreadPoolExecutor):
        self.folder, self.device, self.worker = folder, device, worker
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.on_device: deque[Checkpoint] = deque()
        self.leaving: deque[_Offloaded] = deque()
        self.offloaded: list[_Offloaded] | _Files = [] if folder is None else _Files()
        self.template: Checkpoint | None = None  # of the last one
        self.coming: tuple[_Offloaded, Future[list[Tensor]]] | None = None
        self.written = 0  # files so far

    def __len__(self) -> int:
        return len(self.on_device) + len(self.leaving) + len(self.offloaded) + (self.coming is not None)

    def append(self, checkpoint: Checkpoint) -> None:
        if self.coming is not None:  # it was being fetched, and stays on the device
            self.on_device.append(self._arrived())
        self.on_device.append(checkpoint)
        while len(self.on_device) > ON_DEVICE:
            old = self.on_device.popleft()
            if len(self.leaving) == PENDING:
                early = self.leaving.popleft()
                self.offloaded.append(early._replace(away=_done(early.away)))  # raises the worker's error
            self.template = old.template(self.template)
            away = self.worker.submit(self._away, old.tensors(), self._event(), self._number())
            self.leaving.append(_Offloaded(self.template, _packed(old.state.counts), away))

    def pop(self) -> Checkpoint:
        return self.on_device.pop() if self.on_device else self._arrived()

    def fetch(self) -> None:
        """Start to fetch the next checkpoint: it will be popped soon."""
        if not self.on_device and self.coming is None and len(self):
            self._fetch()

    def _arrived(self) -> Checkpoint:
        if self.coming is None:
            self._fetch()
        assert self.coming is not None
        (item, coming), self.coming = self.coming, None
        tensors = coming.result()
        for x in tensors if self.stream is not None else ():
            x.record_stream(torch.cuda.current_stream(self.device))
        counts = item.counts if isinstance(item.counts, tuple) else (item.counts,) * len(item.template.state.counts)
        return item.template.with_tensors(tensors, counts)

    def _fetch(self) -> None:
        item = self.leaving.pop() if self.leaving else self.offloaded.pop()
        self.coming = item, self.worker.submit(self._back, item)

    def _number(self) -> int:
        self.written += 1
        return self.written

    def _path(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{id(self)}-{number}"

    # ---- in the worker's thread

    def _event(self) -> Any:
        return None if self.stream is None else torch.cuda.current_stream(self.device).record_event()

    def _away(self, tensors: list[Tensor], ready: Any, number: int) -> Any:
        with self._on_own_stream(ready):
            host = [_to_host(x) for x in tensors]
        if self.folder is None:
            return host
        with self._path(number).open("wb") as file:  # buffered: a raw write may write a part only
            for x in host:
                file.write(x.view(-1).view(torch.uint8).numpy().data)
        return number

    def _back(self, item: _Offloaded) -> list[Tensor]:
        host = _done(item.away)
        if self.folder is not None:
            host = _read(self._path(host), kinds_of(item.template.tensors()))
        with self._on_own_stream(None):
            return [x.to(self.device, non_blocking=True) for x in host]

    @contextmanager
    def _on_own_stream(self, ready: Any) -> Iterator[None]:
        """On a stream of its own, after the event `ready`; finished on return."""
        if self.stream is None:
            yield
            return
        with torch.cuda.stream(self.stream):
            if ready is not None:
                self.stream.wait_event(ready)
            yield
            self.stream.synchronize()


class _Offloaded(NamedTuple):
    """A checkpoint that is not on the device."""

    template: Checkpoint
    counts: tuple[int, ...] | int  # one number where all parameters have the same
    away: Any  # its tensors, or the number of its file, or the future of that


class _Files:
    """A stack of checkpoints in files, in a few bytes each: there is one for every few steps of a run."""

    def __init__(self) -> None:
        self.templates: list[Checkpoint] = []
        self.numbers, self.counts = array("q"), array("q")
        self.uneven: dict[int, tuple[int, ...]] = {}  # number -> counts, where parameters have not all the same

    def __len__(self) -> int:
        return len(self.templates)

    def append(self, item: _Offloaded, /) -> None:
        self.templates.append(item.template)
        self.numbers.append(item.away)
        if isinstance(item.counts, tuple):
            self.uneven[item.away] = item.counts
            self.counts.append(-1)
        else:
            self.counts.append(item.counts)

    def pop(self) -> _Offloaded:
        template, number, count = self.templates.pop(), self.numbers.pop(), self.counts.pop()
        return _Offloaded(template, self.uneven.pop(number) if count < 0 else count, number)


def _packed(counts: tuple[int, ...]) -> tuple[int, ...] | int:
    return counts[0] if len(set(counts)) == 1 else counts


def _done(away: Any) -> Any:
    return away.result() if isinstance(away, Future) else away


def _read(path: Path, kinds: Sequence[tuple[torch.Size, torch.dtype]]) -> list[Tensor]:
    """Tensors from a file that holds one after the other. The file is deleted."""
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
    """Start to fetch a stack's next checkpoint, while something else is computed."""
    if isinstance(stack, OffloadedStack):
        stack.fetch()


class Stacks(AbstractContextManager["Stacks"]):
    """Makes stacks, and deletes their files at the end.

    Args:
        offload: None, everything stays on the device; "host", older checkpoints go to host memory; a folder (or "disk" for a
            temporary one), to files there, which are deleted at the end. Files are slow for the states of a segment that is
            replayed, one a step: these stay on the device then, and segments are `SEGMENT` steps long, whatever K is, or as
            long as it takes to leave half of the free disk space free.
    """

    def __init__(self, offload: str | Path | None, device: torch.device):
        if offload is not None and not isinstance(offload, (str, Path)):
            raise TypeError(f"offload must be None, 'host', 'disk' or a folder, got {type(offload).__name__}.")
        if offload not in (None, "host", "disk") and not Path(offload).is_dir():
            raise ValueError(f"offload: there is no folder {str(offload)!r}; make it, or pass 'host' or 'disk'.")
        self.device, self.offloads = device, offload is not None
        self.folder: tempfile.TemporaryDirectory[str] | None = None
        self.worker: ThreadPoolExecutor | None = None
        if offload is not None and not (offload == "host" and device.type == "cpu"):
            self.worker = ThreadPoolExecutor(1, "hypergrad checkpoints")
            if offload != "host":
                parent = None if offload == "disk" else offload
                self.folder = tempfile.TemporaryDirectory(prefix="hypergrad-", dir=parent, ignore_cleanup_errors=True)

    def new(self) -> Stack:
        if self.worker is None:
            return []
        return OffloadedStack(None if self.folder is None else Path(self.folder.name), self.device, self.worker)

    def of_a_segment(self) -> Stack:
        return [] if self.folder is not None else self.new()

    def default_every(self, steps: int, nbytes: int) -> int:
        """√K steps, or fewer where it is a matter of memory that does not grow with K; a checkpoint takes nbytes."""
        most = default_every(steps)
        if self.folder is None:
            return most
        available = SHARE * shutil.disk_usage(self.folder.name).free
        if steps * nbytes > most * available:
            raise ValueError(
                f"offload: a checkpoint every {most} steps takes {steps / most * nbytes / 2**30:.3g} GiB, more than half of what "
                f"is free in {self.folder.name!r}. Pass a folder on a disk with more space, or every=… for fewer checkpoints."
            )
        return min(most, max(SEGMENT, math.ceil(steps * nbytes / available)))

    def __exit__(self, *_: object) -> None:
        if self.worker is not None:
            self.worker.shutdown(cancel_futures=True)
        if self.folder is not None:
            self.folder.cleanup()
