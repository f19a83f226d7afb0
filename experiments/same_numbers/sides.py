"""A checkout of the base beside the present code, and the processes that run the cases in both."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experiments.same_numbers.compare import Outcome

ROOT = Path(__file__).parents[2]
SIDE = Path(__file__).with_name("side.py")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}


@contextmanager
def checkout(commit: str, root: Path = ROOT) -> Iterator[Path]:
    """The commit in a temporary worktree of the repository at `root`, removed at the end whatever happens.

    Raises:
        SystemExit: there is no such commit, or no repository.
    """
    with tempfile.TemporaryDirectory(prefix="same_numbers_") as folder, ended_in_order():
        tree = Path(folder, "base")
        try:
            _git(root, "worktree", "add", "--detach", "--quiet", str(tree), commit)
            yield tree
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"--base {commit}: {error.stderr.strip()}") from None
        finally:
            if tree.exists():
                _git(root, "worktree", "remove", "--force", str(tree))


def _git(root: Path, *words: str) -> None:
    subprocess.run(["git", "-C", str(root), *words], check=True, capture_output=True, text=True)


@contextmanager
def ended_in_order() -> Iterator[None]:
    """SIGTERM and SIGHUP leave through every `finally`, as Ctrl-C does."""

    def leave(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def outcomes(roots: Sequence[Path], names: Sequence[str], quick: bool, jobs: int) -> list[dict[str, Outcome]]:
    """For every root: case → its outcome. `jobs` processes at a time; with two or more, a side's cases are dealt out."""
    parts = min(max(jobs // len(roots), 1), len(names))
    with tempfile.TemporaryDirectory(prefix="same_numbers_") as folder:
        files = [
            [Path(folder, f"side {i + 1}, part {part + 1}.jsonl") for part in range(parts)] for i in range(len(roots))
        ]
        how = "quick" if quick else "full"
        calls = [
            (root, [sys.executable, str(SIDE), str(file), how, *names[part::parts]])
            for root, of_side in zip(roots, files, strict=True)
            for part, file in enumerate(of_side)
        ]
        _run(calls, jobs)
        return [_read(of_side) for of_side in files]


def _run(calls: list[tuple[Path, list[str]]], jobs: int) -> None:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | ONE_THREAD
    running: list[subprocess.Popen] = []
    waiting = iter(calls)
    try:
        while True:
            while len(running) < jobs and (call := next(waiting, None)) is not None:
                running.append(subprocess.Popen(call[1], cwd=call[0], env=env))
            if not running:
                return
            time.sleep(0.05)
            running = [process for process in running if process.poll() is None]
    finally:
        for process in running:
            process.kill()
            process.wait()


def _read(files: list[Path]) -> dict[str, Outcome]:
    """The outcomes that were written. The line at which a process was killed may be half there: it is no outcome."""
    found = {}
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
            try:
                outcome = json.loads(line)
            except ValueError:
                continue
            found[outcome["case"]] = outcome
    return found
