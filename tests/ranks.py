"""Two processes with a process group, in which tests run functions: they are started once for many tests."""

from __future__ import annotations

import datetime
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hypergrad.online import tuner_parts
from tests.unbounded import without_clock

TIMEOUT = 120.0  # seconds in which every function ends


def _serve(rank: int, size: int, store: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    tuner_parts.Calibration = without_clock  # type: ignore[assignment]
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=datetime.timedelta(seconds=60)
    )
    while (job := pipe.recv()) is not None:
        f, args = job
        torch.manual_seed(0)
        try:
            pipe.send(("done", f(*args)))
        except Exception as error:
            pipe.send(("failed", f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
        torch.set_default_dtype(torch.float32)
    dist.destroy_process_group()


class Ranks:
    """The processes; `ranks(f, *args)` has what f returns on each of them. f is a function at the top of a module."""

    def __init__(self, pipes: list[Any]):
        self.pipes = pipes

    def __call__(self, f: Callable[..., Any], *args: Any) -> list[Any]:
        answers = self.answers(f, *args)
        for kind, answer in answers:
            assert kind == "done", answer
        return [answer for _, answer in answers]

    def errors(self, f: Callable[..., Any], *args: Any) -> list[str]:
        """What f raises on each of them."""
        answers = self.answers(f, *args)
        assert all(kind == "failed" for kind, _ in answers), answers
        return [answer for _, answer in answers]

    def answers(self, f: Callable[..., Any], *args: Any) -> list[tuple[str, Any]]:
        for pipe in self.pipes:
            pipe.send((f, args))
        assert all(pipe.poll(TIMEOUT) for pipe in self.pipes), f"{f.__name__} did not end"
        return [pipe.recv() for pipe in self.pipes]


@contextmanager
def started(folder: Path, size: int = 2) -> Iterator[Ranks]:
    context = mp.get_context("spawn")
    pairs = [context.Pipe() for _ in range(size)]
    processes = [
        context.Process(target=_serve, args=(i, size, str(folder / "store"), child), daemon=True)
        for i, (_, child) in enumerate(pairs)
    ]
    for process in processes:
        process.start()
    try:
        yield Ranks([mine for mine, _ in pairs])
    finally:
        for mine, _ in pairs:
            mine.send(None)
        for process in processes:
            process.join(10)
            process.kill()
