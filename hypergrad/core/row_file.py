"""The rows of a run as JSON lines, none of them twice for one step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any


class Rows:
    """`metrics.jsonl` of a run, and what an earlier process left in it.

    Args:
        folder: of the run.

    Attributes:
        hidden_from: TensorBoard is to hide what is there already from this step on. It is told so of the first process too, as it
            takes the first to say it for the one that began the run.
        said: rows of sentences that a run which goes on would say again.
        has_scalars: whether a row of numbers is there.
        last: the last row of numbers of a run that goes on; empty: none.
    """

    def __init__(self, folder: Path):
        self.file = folder / "metrics.jsonl"
        self.of_another = self.file.exists()  # what is there is not known to be of this run
        self.hidden_from = 0
        self.said: list[dict[str, Any]] = []
        self.has_scalars = False
        self.last: dict[str, Any] = {}

    def open(self) -> None:
        """Before the first row: put an earlier run's aside."""
        if self.of_another and self.file.exists():
            n = next(n for n in count(1) if not self._aside(n).exists())
            self.file.rename(self._aside(n))
        self.of_another = False

    def _aside(self, n: int) -> Path:
        return self.file.with_name(f"metrics.{n}.jsonl")

    def go_on(self, step: int) -> None:
        """Drop what was written of later steps, which are taken again."""
        lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else []
        kept = [row for row in map(_parsed, lines) if row is not None and row["step"] <= step]
        self.said = [row for row in kept if row["step"] == step and _is_text(row)]
        numbers = [row for row in kept if not _is_text(row)]
        self.has_scalars, self.last = bool(numbers), numbers[-1] if numbers else {}
        self.of_another, self.hidden_from = False, step + 1
        if lines:
            draft = self.file.with_name(self.file.name + ".tmp")
            draft.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
            draft.replace(self.file)

    def add(self, row: Mapping[str, Any]) -> None:
        self.has_scalars = self.has_scalars or not _is_text(row)
        with self.file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")


def _parsed(line: str) -> dict[str, Any] | None:
    """A row; None where an interruption tore it."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) and "step" in row else None


def _is_text(row: Mapping[str, Any]) -> bool:
    return "note" in row or "recipe" in row
