"""Results on disk: ``experiments/results/<name>.json``, and the goals that are read out of them.

A result file is ``{"command", "environment", "rows": [flat dicts]}``. ``goals.json`` has one row for each number that
the project promises; its ``reached`` and ``met`` are recomputed from the result files, never typed.
"""

from __future__ import annotations

import json
import math
import operator
import os
import platform
import statistics
from pathlib import Path
from typing import Any

import torch

import hypergrad

FOLDER = Path(__file__).parent / "results"

OPS = {"<=": operator.le, "<": operator.lt, ">=": operator.ge, ">": operator.gt, "==": operator.eq}
AGGREGATES = {
    "mean": statistics.fmean,
    "median": statistics.median,
    "max": max,
    "min": min,
    "sum": math.fsum,
}


def environment(device: str = "cpu") -> dict[str, Any]:
    """What the numbers depend on, and nothing that names a machine or a person."""
    cuda = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()} if device.startswith("cuda") else {}
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "hypergrad": hypergrad.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        **cuda,
    }


def write(
    path: Path, command: str, rows: list[dict[str, Any]], device: str = "cpu", one_line_a_row: bool = False
) -> None:
    """Write a result file in one move; numbers that are not finite become null. `one_line_a_row` is for large files."""
    head, rows = {"command": command, "environment": environment(device)}, [finite(row) for row in rows]
    if one_line_a_row:
        lines = ",\n  ".join(json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows)
        _replace(path, f'{json.dumps(head, indent=1, ensure_ascii=False)[:-2]},\n "rows": [\n  {lines}\n ]\n}}\n')
    else:
        save(path, head | {"rows": rows})


def save(path: Path, content: dict[str, Any] | list[Any]) -> None:
    _replace(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def finite(row: dict[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}


def stem(name: str, family: str, full: bool = False) -> str:
    """The name, without its ending, of an experiment's files on a family of workloads, in their larger version if `full`."""
    return name + ("" if family == "main" else f"_{family}") + ("_full" if full else "")


def load(name: str, folder: Path = FOLDER) -> dict[str, Any] | None:
    """The result file of that name, or None where it was not measured yet."""
    path = folder / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def select(rows: list[dict[str, Any]], where: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows whose fields equal ``where``; a name that no row has is an error, not an empty answer."""
    unknown = [key for key in where if rows and all(key not in row for row in rows)]
    if unknown:
        raise KeyError(f"no row has a field {unknown[0]!r}: fields are {sorted(rows[0])}")
    return [row for row in rows if all(key in row and row[key] == value for key, value in where.items())]


def aggregate(rows: list[dict[str, Any]], field: str | None, how: str) -> float | int | None:
    """One number from the rows. A null among them (a diverged run) gives None: leaving it out takes a filter."""
    if how == "count":
        return len(rows)
    if how not in AGGREGATES:
        raise ValueError(f"unknown aggregate {how!r}: one of count, {', '.join(AGGREGATES)}")
    if field is None:
        raise ValueError(f"aggregate {how!r} needs a field to work on: only count does without")
    values = [row[field] for row in rows]
    return AGGREGATES[how](values) if values and None not in values else None


def recompute(goal: dict[str, Any], folder: Path = FOLDER) -> dict[str, Any]:
    """The goal with ``reached`` and ``met`` as its source has them now; a source that is missing meets nothing."""
    source = goal["source"]
    result = load(source["file"], folder)
    rows = select(result["rows"], source["filter"]) if result else []
    reached = aggregate(rows, source["field"], source["aggregate"]) if result else None
    met = reached is not None and bool(OPS[goal["op"]](reached, goal["target"]))
    return {**goal, "reached": reached, "met": met}
