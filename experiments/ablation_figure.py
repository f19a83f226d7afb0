"""What each policy of the online method is worth, at a glance: its removal, suite by suite."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

Rows = list[dict[str, Any]]
WIDEST = math.log(1.5)  # where colours end


def ablation(rows: Rows) -> Figure:
    """Validation loss without each policy over that with it, mean over a suite's runs, in per cent; bold: surely not 0."""
    rows = [row for row in rows if row["suite"] != "all"]
    policies = list(dict.fromkeys(row["without"] for row in rows))
    suites = list(dict.fromkeys(row["suite"] for row in rows))
    found = {(row["without"], row["suite"]): row for row in rows}
    figure = Figure(figsize=(1.2 + 0.95 * len(suites), 1.2 + 0.34 * len(policies)), layout="constrained")
    panel = figure.subplots()
    means = [[found.get((p, s), {}).get("mean") for s in suites] for p in policies]
    logs = [[math.nan if mean is None else math.log(mean) for mean in row] for row in means]
    panel.imshow(logs, cmap="RdBu_r", norm=TwoSlopeNorm(0.0, -WIDEST, WIDEST), aspect="auto")
    for y, policy in enumerate(policies):
        for x, suite in enumerate(suites):
            row = found.get((policy, suite))
            if row is None:
                continue
            if row["lost"]:
                panel.text(
                    x,
                    y + 0.36,
                    f"{row['lost']} of {row['runs']} lost",
                    ha="center",
                    va="center",
                    fontsize=6,
                    color="black",
                )
            if row["mean"] is None:
                continue
            mean, upper = math.log(row["mean"]), row["upper"]
            sure = upper is not None and abs(mean) > math.log(upper) - mean
            panel.text(
                x, y, f"{100 * (row['mean'] - 1):+.1f}", ha="center", va="center", fontsize=8,
                fontweight="bold" if sure else "normal", color="white" if abs(mean) > 0.7 * WIDEST else "black",
            )  # fmt: skip
    panel.set_xticks(range(len(suites)), suites, fontsize=9)
    panel.set_yticks(range(len(policies)), policies, fontsize=9)
    panel.xaxis.tick_top()
    panel.tick_params(length=0)
    panel.set_title("validation loss without the policy, in % above that with it", fontsize=10)
    return figure
