"""Figures of the experiments with `hypergrad.tune_run`, each a function of the rows of one result file."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from experiments.figures import OTHERS, TUNED, Rows, _tidy


def metalearn_lr(rows: Rows) -> Figure:
    """lr and its objective at each outer step, from both starts by each rule; steps that were gone back from are hollow."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    colours = dict(zip(dict.fromkeys(row["outer"] for row in rows), (TUNED, *OTHERS)))
    fields = ("lr", "learning rate; dashed: 0.620, as published"), ("mean_loss", "mean training loss of the run")
    for panel, (field, title) in zip(figure.subplots(1, 2), fields):
        for outer, colour in colours.items():
            for start in dict.fromkeys(row["start"] for row in rows):
                own = [row for row in rows if (row["kind"], row["outer"], row["start"]) == ("outer step", outer, start)]
                x, y = [row["step"] for row in own], [row[field] for row in own]
                label = outer if start == rows[0]["start"] else None
                panel.plot(x, y, color=colour, linewidth=1.2, label=label)
                faces = [colour if row["best"] else "white" for row in own]
                panel.scatter(x, y, s=18, c=faces, edgecolors=colour, linewidths=0.9, zorder=3)
        panel.set_yscale("log")
        panel.minorticks_off()
        _tidy(panel, title, "outer step")
    lr, loss = figure.axes
    lr.axhline(0.620, color="#444444", linewidth=0.9, linestyle="--", zorder=0)
    ticks = (0.15, 0.3, 0.62, 1.0, 1.5)
    lr.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    ticks = (1.72, 1.75, 1.8, 1.85)
    loss.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    loss.legend(frameon=False, fontsize=9)
    return figure


def learned_schedule(rows: Rows) -> Figure:
    """The schedule at each outer step that was the best so far, and what whole runs came to over their cost."""
    start = next(row["start"] for row in rows if row["method"] == "learned")
    steps = [row for row in rows if row["method"] == "outer step" and row["start"] == start]
    grid = [row for row in rows if row["method"] == "grid"]
    won = min((row for row in grid if not row["diverged"]), key=lambda row: row["val_loss"])
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    scale, colours = Normalize(0, max(row["step"] for row in steps)), colormaps["viridis"]
    for row in steps:
        if row["best"]:
            x = np.linspace(0, 1, len(_knots(row)))
            left.plot(x, _knots(row), color=colours(scale(row["step"])), linewidth=1.3, marker="o", markersize=2.5)
    x = np.linspace(0, 0.999, 200)
    left.plot(
        x, won["peak"] * (1 - x) ** won["power"], color=OTHERS[0], linestyle="--", linewidth=1.4, label="grid's winner"
    )
    left.set_yscale("log")
    left.set_ylim(bottom=min(min(_knots(row)) for row in steps) / 1.5)
    _tidy(left, "learning rate of each outer step that was the best so far", "share of the run")
    left.legend(frameon=False, fontsize=9, loc="best")
    bar = figure.colorbar(ScalarMappable(scale, colours), ax=left, pad=0.01, aspect=30)
    bar.set_label("outer step", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    for horizon, marker in zip(sorted({row["horizon"] for row in steps}), "^so"):
        own = [row for row in steps if row["horizon"] == horizon and row["best"]]
        x, y = ([row[name] for row in own] for name in ("run_equivalents", "value"))
        label = "whole runs" if horizon == 1 else f"runs 1/{round(1 / horizon)} as long"
        right.plot(
            x, y, color=TUNED if horizon == 1 else OTHERS[1], marker=marker, markersize=4, linewidth=1, label=label
        )
    bar_label = f"best of the grid of {len(grid)}"
    right.axhline(won["val_loss"], color=OTHERS[0], linestyle="--", linewidth=1.2, label=bar_label)
    finite = [row["value"] for row in steps if row["best"] and row["value"] is not None and math.isfinite(row["value"])]
    right.set_yscale("log")
    ticks = [
        tick
        for tick in (0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.8, 1, 1.5, 2, 2.5)
        if min(finite) * 0.9 < tick < max(finite) * 1.1
    ]
    right.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    right.minorticks_off()
    _tidy(right, "validation loss, best so far at its horizon", "cost in plain whole runs")
    right.legend(frameon=False, fontsize=9)
    return figure


def data_cleaning(rows: Rows) -> Figure:
    """Learned weights of right and of wrong labels, all seeds together, and AUROC along the outer steps."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    bins = [row for row in rows if row["kind"] == "bin"]
    for field, label, colour in (("wrong", "wrong labels", OTHERS[0]), ("right", "right labels", TUNED)):
        counts = [
            sum(row[field] for row in bins if row["bin"] == i) for i in range(1 + max(row["bin"] for row in bins))
        ]
        left.stairs(counts, np.linspace(0, 1, len(counts) + 1), fill=True, alpha=0.55, color=colour, label=label)
    _tidy(
        left,
        f"examples by their learned weight, {len(dict.fromkeys(row['seed'] for row in bins))} seeds",
        "weight σ(w)",
    )
    left.legend(frameon=False, fontsize=9)
    for seed in dict.fromkeys(row["seed"] for row in rows):
        own = [row for row in rows if (row["kind"], row["seed"]) == ("outer step", seed)]
        right.plot([row["step"] for row in own], [row["auroc"] for row in own], color=TUNED, linewidth=1, alpha=0.8)
    _tidy(right, "AUROC of 1 − weight against corruption, a line a seed", "outer step")
    return figure


def _knots(row: dict[str, Any]) -> list[float]:
    return [x for name, x in row.items() if name.startswith("knot_")]
