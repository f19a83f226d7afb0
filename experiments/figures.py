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


def _tidy(panel: Axes, title: str, xlabel: str) -> None:
    panel.set_title(title, fontsize=10, loc="left")
    panel.set_xlabel(xlabel, fontsize=9)
    panel.tick_params(labelsize=8)
    panel.grid(alpha=0.25, linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
