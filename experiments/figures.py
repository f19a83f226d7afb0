"""Figures, each a function of the rows of one result file."""

from __future__ import annotations

import math
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from experiments import results

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
    """Where each start ends: test loss over the learning rate that it started from, beside the grid's winner."""
    longest = max(row["steps"] for row in rows)
    rows = [row for row in rows if row["steps"] == longest]
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
    won = [row["test_loss"] for row in rows if row["method"] == "winner" and not row["diverged"]]
    if won:
        tried = sum(row["method"] == "grid" for row in rows)
        label = f"best of a grid of {tried}, mean of {len(won)} seeds"
        panel.axhline(sum(won) / len(won), color=OTHERS[0], linewidth=1.2, linestyle="--", label=label)
    panel.set_xscale("log")
    panel.set_yscale("log")
    ticks = (0.34, 0.4, 0.5, 0.7, 1.0, 1.5, 2.3)
    panel.set_yticks([*ticks, BLOWN_UP], [*(f"{tick:g}" for tick in ticks), "blown up"])
    panel.minorticks_off()
    _tidy(panel, f"test cross-entropy after {longest:,} steps", "learning rate at the start")
    panel.legend(frameon=False, fontsize=9)
    return figure


def trajectories(rows: Rows) -> Figure:
    """lr and weight decay along the tuned runs, each line coloured by where it starts, at the left edge.

    lr is shown over (1 − momentum), how far steps in one direction go in the end, so that starts of any momentum compare.
    """
    runs: dict[int, Rows] = {}
    for row in rows:
        if row["method"] == "tuned":
            runs.setdefault(row["seed"], []).append(row)
    figure = Figure(figsize=(11, 3.9), layout="constrained")
    effective = lambda row: row["lr"] / (1 - row["momentum"])  # noqa: E731
    panels = (
        (f"learning rate / (1 − momentum), {len(runs)} starts", effective),
        ("weight decay", lambda row: row["weight_decay"]),
    )
    for panel, (title, value) in zip(figure.subplots(1, 2), panels):
        lines = [[value(row) for row in run] for run in runs.values()]
        starts = [math.log10(line[0]) for line in lines]
        scale, colours = Normalize(min(starts), max(starts)), colormaps["viridis"]
        for run, line, begun in zip(runs.values(), lines, starts):
            panel.plot([row["step"] for row in run], line, color=colours(scale(begun)), linewidth=0.8, alpha=0.8)
        panel.set_xscale("symlog", linthresh=1)
        panel.set_yscale("log")
        _tidy(panel, title, "steps done (0: the start)")
        bar = figure.colorbar(ScalarMappable(scale, colours), ax=panel, pad=0.01, aspect=30)
        bar.set_label("log10 of the start", fontsize=8)
        bar.ax.tick_params(labelsize=8)
    return figure


# The searches of the shootout: what their names begin with, legend, marker, colour, where labels stand, what joins numbers.
FAMILIES = (
    ("random_", "best of k random", "o", OTHERS[1], (4, 5), ""),
    ("halving_", "successive halving: trials/by", "s", OTHERS[2], (-9, -13), "/"),
    ("first_", "first 1/16 of n, then the top k: n→k", "^", "#7d5ba6", (5, 4), "→"),
    ("grid", "grid of 200", "*", "#444444", (-8, 7), ""),
)


def price(rows: Rows) -> Figure:
    """Quality over seconds: hypergrad at each bound, beside the other methods of the shootout."""
    others = results.load("shootout.json")
    ends = [
        row for row in (others["rows"] if others else ()) if row["kind"] == "summary" and row["method"] != "hypergrad"
    ]
    for row in rows:
        if row["kind"] == "family" and row["family"] == "main" and row["split"] == "test":
            title = "no bound" if row["cost"] is None else f"{row['cost']:g}"
            ends.append(
                row
                | {"kind": "summary", "method": "hypergrad", "title": title, "cost": row["seconds"], "workloads": 12}
            )
    return shootout(ends, "CPU seconds over a plain run's; of searches: plain runs")


def shootout(rows: Rows, xlabel: str = "cost in plain runs") -> Figure:
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
    _points(panel, tuned, "D", TUNED, "hypergrad at cost=…" if len(tuned) > 1 else tuned[0]["title"] if tuned else "")
    for row in tuned if len(tuned) > 1 else ():
        at = (row["cost"], row["regret"])
        panel.annotate(row["title"], at, xytext=(-6, -14), textcoords="offset points", fontsize=8, color=TUNED)
    _labels(panel, others, 0.75)
    _tidy(panel, "regret: test loss over that of the best of a grid of 200 (bars: 5–95 %)", xlabel)
    panel.legend(frameon=False, fontsize=8)
    return figure


def bench_modes(rows: Rows) -> Figure:
    """Time against memory at the largest K: the unrolled mode over the distance between snapshots, and everything else."""
    longest = max(row["steps"] for row in rows)
    rows = [row for row in rows if row["steps"] == longest and row.get("memory_mib") is not None]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    titles = {"mlp_sgd": "MLP, SGD with momentum", "mlp_adam": "MLP, Adam", "cnn_sgd": "CNN, SGD with momentum"}
    figure = Figure(figsize=(4.2 * len(cases), 4.0), layout="constrained")
    for panel, case in zip(figure.subplots(1, len(cases), squeeze=False)[0], cases):
        own = [row for row in rows if row["case"] == case and row["method"] != "plain"]
        curve = sorted((_every(row["method"], longest), row) for row in own if _every(row["method"], longest))
        panel.plot([r["memory_mib"] for _, r in curve], [r["times_plain"] for _, r in curve], color=TUNED, zorder=2)
        for every, row in curve:
            _place(panel, row, TUNED, "o", {1: "every step", longest: f"every {longest}"}.get(every, str(every)))
        rest, peers = [row for row in own if not _every(row["method"], longest)], []
        for row in rest:
            ours = row["method"].startswith(("unrolled", "forward"))
            colour = TUNED if ours else OTHERS[0]
            text = row["method"].removeprefix("unrolled, ")
            _place(panel, row, colour, "D" if ours else "s", text if ours else "")
            peers += [] if ours else [row]
        peers.sort(key=lambda row: -row["times_plain"])
        names = "\n".join(row["method"].split(",")[0] for row in peers)
        x, y = min(row["memory_mib"] for row in peers), min(row["times_plain"] for row in peers)
        panel.annotate(
            f"from above:\n{names}",
            (x, y),
            xytext=(-4, -8),
            textcoords="offset points",
            fontsize=7,
            color=OTHERS[0],
            ha="right",
            va="top",
        )
        panel.set_xscale("log")
        panel.margins(x=0.22)
        panel.set_ylim(0, 1.12 * max(row["times_plain"] for row in own))
        _tidy(panel, f"{titles.get(case, case)}, K = {longest}", "growth of peak memory, MiB")
    figure.axes[0].set_ylabel("time of a step, in plain steps")
    return figure


def _every(method: str, steps: int) -> int:
    """Steps between snapshots; 0 for a method of another kind, or a compiled one."""
    known = {"unrolled, a snapshot every step": 1, "unrolled, every √K": max(1, math.isqrt(steps))}
    if method.startswith("unrolled, every ") and method.endswith(" steps"):
        return int(method.split()[2])
    return known.get(method, 0)


def _place(panel: Axes, row: dict[str, Any], colour: str, marker: str, text: str) -> None:
    x, y = row["memory_mib"], row["times_plain"]
    panel.scatter([x], [y], s=26, color=colour, marker=marker, zorder=3)
    text = text.removeprefix("unrolled, ")
    panel.annotate(text, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7, color=colour)


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
