"""Figures, each a function of the rows of one result file."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Rows = list[dict[str, Any]]

# One colour for what hypergrad does, quiet ones for what it is compared with.
TUNED, OTHERS = "#0b6e99", ("#c8553d", "#8a8d91", "#d6a33d")


def quickstart(rows: Rows) -> Figure:
    """Validation loss, lr and weight decay along each run."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    panels = figure.subplots(1, 3)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    fields = ("val_loss", "validation loss"), ("lr", "learning rate (scale)"), ("weight_decay", "weight decay")
    for panel, (field, title) in zip(panels, fields):
        for method, colour in reversed(list(zip(methods, (TUNED, *OTHERS)))):
            own = [row for row in rows if row["method"] == method]
            main = method == methods[0]
            panel.plot(
                [row["step"] for row in own],
                [math.nan if row[field] is None else row[field] for row in own],
                color=colour,
                linewidth=2.2 if main else 1.4,
                linestyle="-" if main else "--",
                label=method,
            )
        panel.set_yscale("log")
        _tidy(panel, title, "training step")
    handles, labels = panels[0].get_legend_handles_labels()
    legend = {"loc": "outside upper center", "ncols": len(methods), "frameon": False, "fontsize": 9}
    figure.legend(handles[::-1], labels[::-1], **legend)
    return figure


BLOWN_UP = 4.0  # where runs are drawn that end in NaN, or above this


def fashion_mnist(rows: Rows) -> Figure:
    """Where each start ends: test loss over the learning rate that it started from."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    panel = figure.subplots()
    shown = {
        "untuned": ("untuned", OTHERS[1], "o"),
        "untuned_decay": ("untuned, lr decays to zero", OTHERS[2], "s"),
        "tuned": ("tuned by hypergrad", TUNED, "D"),
    }
    for method, (label, colour, marker) in shown.items():
        own = [row for row in rows if row["method"] == method]
        x = [row["start_lr"] for row in own]
        y = [BLOWN_UP if row["diverged"] else min(row["test_loss"], BLOWN_UP) for row in own]
        if own:
            panel.scatter(x, y, s=26, color=colour, marker=marker, alpha=0.85, linewidths=0, label=label)
    panel.set_xscale("log")
    panel.set_yscale("log")
    ticks = (0.34, 0.4, 0.5, 0.7, 1.0, 1.5, 2.3)
    panel.set_yticks([*ticks, BLOWN_UP], [*(f"{tick:g}" for tick in ticks), "blown up"])
    panel.minorticks_off()
    _tidy(panel, "test cross-entropy after 10,000 steps", "learning rate at the start")
    panel.legend(frameon=False, fontsize=9)
    return figure


# The searches of the shootout: what their names begin with, legend, marker, colour, where labels stand, what joins numbers.
FAMILIES = (
    ("random_", "best of k random", "o", OTHERS[1], (4, 5), ""),
    ("halving_", "successive halving: trials/by", "s", OTHERS[2], (-9, -13), "/"),
    ("first_", "first 1/16 of n, then the top k: n→k", "^", "#7d5ba6", (5, 4), "→"),
    ("grid", "grid of 200", "*", "#444444", (-8, 7), ""),
)


def shootout(rows: Rows) -> Figure:
    """Quality over cost of each method that was run on every workload: geometric mean regret, in plain runs, log axes."""
    ends = [row for row in rows if row["kind"] == "summary"]
    everywhere = max(row["workloads"] for row in ends)
    ends = [row for row in ends if row["workloads"] == everywhere]
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    panel = figure.subplots()
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlim(0.16, 300)
    low, high = min(row["low"] for row in ends), max(row["high"] for row in ends)
    panel.set_ylim(low / 1.02, high * 1.03)
    ticks = [tick for tick in (1, 1.05, 1.1, 1.2, 1.35, 1.5, 1.75, 2, 2.5, 3, 4, 5) if tick < high]
    panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    costs = (1, 2, 4, 8, 16, 32, 64, 200)
    panel.set_xticks(costs, [f"{cost}×" for cost in costs])
    panel.minorticks_off()
    for prefix, legend, marker, colour, offset, joint in FAMILIES:
        own = sorted((row for row in ends if row["method"].startswith(prefix)), key=lambda row: row["cost"])
        _points(panel, own, marker, colour, legend)
        if prefix == "random_":
            panel.plot(
                [row["cost"] for row in own], [row["regret"] for row in own], color=colour, lw=1, ls="--", zorder=1
            )
        for row in own:
            short = joint.join(row["method"].split("_")[1:])
            at = (row["cost"], row["regret"])
            panel.annotate(short, at, xytext=offset, textcoords="offset points", fontsize=7.5, color=colour)
    live = [row for row in ends if not row["method"].startswith(tuple(family[0] for family in FAMILIES))]
    tuned = [row for row in live if row["method"] == "hypergrad"]
    others = [row for row in live if row not in tuned]
    _points(panel, others, "o", OTHERS[0], "one live run")
    _points(panel, tuned, "D", TUNED, "hypergrad, its defaults")
    _labels(panel, others, 0.75)
    _tidy(panel, "regret: test loss over that of the best of a grid of 200 (bars: 5–95 %)", "cost in plain runs")
    panel.legend(frameon=False, fontsize=8)
    return figure


def _points(panel: Axes, rows: Rows, marker: str, colour: str, legend: str) -> None:
    for row in rows:
        panel.plot([row["cost"]] * 2, [row["low"], row["high"]], color=colour, linewidth=1, alpha=0.45)
    if rows:
        x, y = ([row[name] for row in rows] for name in ("cost", "regret"))
        panel.scatter(x, y, s=42, marker=marker, color=colour, linewidths=0, label=legend, zorder=3)


def _labels(panel: Axes, rows: Rows, x: float) -> None:
    """Titles in a column that ends at x, pushed apart, with a thin line to the point of each."""
    bottom, top = (math.log(limit) for limit in panel.get_ylim())
    room, floor = (top - bottom) / 26, -math.inf
    for row in sorted(rows, key=lambda row: row["regret"]):
        floor = max(math.log(row["regret"]), floor + room)
        line = {"arrowstyle": "-", "color": OTHERS[1], "linewidth": 0.5, "shrinkB": 3}
        at, text = (row["cost"], row["regret"]), (x, math.exp(floor))
        look = {"fontsize": 8, "ha": "right", "va": "center", "color": OTHERS[0]}
        panel.annotate(row["title"], at, xytext=text, arrowprops=line, **look)


def _tidy(panel: Axes, title: str, xlabel: str) -> None:
    panel.set_title(title, fontsize=10, loc="left")
    panel.set_xlabel(xlabel, fontsize=9)
    panel.tick_params(labelsize=8)
    panel.grid(alpha=0.25, linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
