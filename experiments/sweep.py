"""Many independent runs, one process a core: what ends is kept at once, and a second call goes on from there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from experiments.results import finite

Row = dict[str, Any]


def sweep(run: Callable[[Row], Row], todo: list[Row], path: Path, jobs: int = 1) -> list[Row]:
    """Run each of ``todo`` that has no row in the JSONL file ``path`` yet; return every row of the file.

    Args:
        run: a module's function of one item of ``todo``; its row must repeat that item's fields, which are its key.
        todo: flat dicts.
        path: rows are appended here as they come; a line torn by an interruption is run again.
        jobs: processes; 1 runs in this one. Each uses one thread.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = finished(path)
    left = [item for item in todo if not any(item.items() <= row.items() for row in kept)]
    with path.open("a", encoding="utf-8") as file:
        if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            file.write("\n")
        bar = tqdm(total=len(todo), initial=len(todo) - len(left), desc=path.stem, unit="run", disable=None)
        for row in _in_processes(run, left, jobs) if jobs > 1 else _in_this_process(run, left):
            file.write(json.dumps(finite(row), allow_nan=False) + "\n")
            file.flush()
            bar.update()
        bar.close()
    return finished(path)


def finished(path: Path) -> list[Row]:
    """The rows kept so far."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # torn by an interruption
    return rows


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _in_this_process(run: Callable[[Row], Row], items: list[Row]) -> Iterator[Row]:
    with one_thread():
        yield from map(run, items)


def _in_processes(run: Callable[[Row], Row], items: list[Row], jobs: int) -> Iterator[Row]:
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,))
    try:
        for future in as_completed([pool.submit(run, item) for item in items]):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)
