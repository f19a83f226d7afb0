"""The table that black-box strategies search: 256 quasi-random configurations of each set and space, five folds each.

    python -m experiments.search_table [--quick]

Sobol's sequence, scrambled with a seed, in the unit coordinates of the space. A row keeps the configuration's number and
its held-out scores after each epoch of LOOKS. Finished rows are kept in `--out`; a second call goes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import qmc

from experiments import results
from experiments.arguments import arg, command, parse
from experiments.search_problems import EPOCHS, LOOKS, METRICS, SETS, SPACES, Values, fit, folds
from experiments.sweep import sweep
from hypergrad.search import Float, Int, Space

Row = dict[str, Any]
NAME = "search_table.json"


@dataclass
class Args:
    """Train every configuration of the table; what is there already is kept."""

    sets: tuple = arg(tuple(SETS), "any of them", quick=("iris",))
    configs: int = arg(256, "configurations of each space, a power of 2", quick=4)
    epochs: int = arg(EPOCHS, "of a run", quick=2)
    jobs: int = arg(1, "processes, each with one thread")
    out: str = arg("runs/search_table", "folder of finished rows and result", quick="runs/search_table_quick")
    quick: bool = arg(False, "a few configurations of iris: a test of the machinery")


def units(space: Space, n: int = 256, seed: int = 0) -> np.ndarray:
    """Sobol's points [n, entries]."""
    return qmc.Sobol(len(space), rng=seed).random(n)


def values_at(space: Space, unit: np.ndarray) -> Values:
    """The configuration at unit coordinates: whole numbers are cut out of [low, high] evenly."""
    out: Values = {}
    for u, (name, entry) in zip(unit, space.items(), strict=True):
        inside = float(min(max(u, 1e-9), 1 - 1e-9))
        if isinstance(entry, Float):
            out[name] = entry.from_unit(inside)
        else:
            assert isinstance(entry, Int)
            out[name] = int(entry.low + inside * (entry.high - entry.low + 1))
    return out


def run(item: Row) -> Row:
    space = SPACES[item["space"]]
    values = values_at(space, units(space)[item["config"]])
    torch.set_flush_denormal(True)  # weights that decay to nothing are slow otherwise
    try:
        curve = fit(folds(item["set"]), values, seed=item["config"], epochs=item["epochs"])
    finally:
        torch.set_flush_denormal(False)  # it is the process's: hypothesis, for one, refuses to draw floats with it
    row = dict(item)
    for k, metric in enumerate(METRICS[item["set"]]):
        row |= {f"{metric}_{look}": float(f"{pair[k]:.5g}") for look, pair in zip(LOOKS, curve, strict=False)}
    return row


def main(argv: list[str] | None = None) -> list[Row]:
    args = parse(Args, argv)
    todo = [
        {"set": name, "space": space, "config": i, "epochs": args.epochs}
        for name in args.sets
        for space in SPACES
        for i in range(args.configs)
    ]
    rows = sweep(run, todo, Path(args.out) / "search_table.jsonl", args.jobs)
    rows.sort(key=lambda row: (row["set"], row["space"], row["config"]))
    results.write(Path(args.out) / NAME, command(args), rows, one_line_a_row=True)
    return rows


if __name__ == "__main__":
    main()
