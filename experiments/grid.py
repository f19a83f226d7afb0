"""The bar that tuned runs are held against: a grid of fixed settings, the best of them by validation, that one on fresh seeds.

The seeds on which the winner is measured chose nothing, so its numbers are not those of a lucky seed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from experiments.results import select
from experiments.sweep import sweep

Row = dict[str, Any]
Axes = Mapping[str, tuple[float, ...]]
GRID_SEED = 0


def settings(axes: Axes) -> list[Row]:
    """Every point of the grid."""
    return [dict(zip(axes, values)) for values in itertools.product(*axes.values())]


def winner(rows: list[Row], axes: Axes, error: str) -> dict[str, float]:
    """The setting among the grid's ``rows`` with the least validation error; those that diverged have none."""
    least = min((row for row in rows if not row["diverged"]), key=lambda row: row[error], default=None)
    if least is None:
        raise SystemExit("every setting of the grid diverged: there is no winner to measure")
    return {name: least[name] for name in axes}


def measure(
    run: Callable[[Row], Row], cells: list[Row], axes: Axes, error: str, fresh: list[Row], path: Path, jobs: int
) -> list[Row]:
    """Run the grid in each of ``cells``, and its winner there as each of ``fresh``. Returns every row of the file.

    Args:
        run: as of `sweep`; its rows have ``diverged`` and the validation error ``error``.
        cells: what a grid's items have in common, a set or a number of steps; a winner is chosen in each.
        fresh: what a winner's items have beside cell and setting: seeds that chose nothing.
        path, jobs: as of `sweep`.
    """
    own = [cell | {"method": "grid", "seed": GRID_SEED} for cell in cells]
    rows = sweep(run, [each | point for each in own for point in settings(axes)], path, jobs)
    todo = []
    for cell, each in zip(cells, own):
        won = winner(select(rows, each), axes, error)
        todo += [cell | {"method": "winner"} | won | extra for extra in fresh]
    return sweep(run, todo, path, jobs)
