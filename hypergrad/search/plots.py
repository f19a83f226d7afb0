"""A study as PNGs: its history, quality against cost, and the importance of each entry."""

from __future__ import annotations

import itertools
import math
import warnings
from pathlib import Path
from typing import Any

from hypergrad.search.extras import need
from hypergrad.search.records import Record

DOTS, LINE, GREY = "#9ab3c9", "#1f5f99", "#666666"


def plot(trials: list[Record], study: Any, folder: Path) -> dict[str, Path]:
    """Write the pictures for which there are enough trials.

    Args:
        trials: of the study.
        study: of Optuna, with the same trials.
        folder: made if needed.

    Returns:
        name → file.
    """
    need("matplotlib", "Study.plot")
    folder.mkdir(parents=True, exist_ok=True)
    done = [
        each for each in trials if each.state == "complete" and each.value is not None and math.isfinite(each.value)
    ]
    made: dict[str, Path] = {}
    if done:
        made["history"] = _progress(done, [each.number for each in done], "trial", folder / "history.png")
        unit = "gradient_evaluations" if any(each.cost.gradient_evaluations for each in done) else "seconds"
        spent = {each.number: total for each, total in zip(trials, _running(trials, unit))}
        label = unit.replace("_", " ") + ", all trials so far"
        made["cost"] = _progress(done, [spent[each.number] for each in done], label, folder / "cost.png")
    weights = importances(study) if len(done) > 1 else {}
    if weights:
        made["importance"] = _bars(weights, folder / "importance.png")
    return made


def importances(study: Any) -> dict[str, float]:
    """name → its share of the variance of the validation loss (fANOVA, by Optuna); of entries that every trial has.

    Args:
        study: of Optuna.
    """
    optuna = need("optuna", "importances")
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of entries with a single value
        try:
            return optuna.importance.get_param_importances(study, evaluator=evaluator)
        except (ValueError, RuntimeError):  # all values equal, or no entry that all trials have
            return {}


def _running(trials: list[Record], unit: str) -> list[float]:
    return list(itertools.accumulate(getattr(each.cost, unit) for each in trials))


def _axes(width: float = 6.0, height: float = 3.6) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # not pyplot, which opens windows and keeps state

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _progress(done: list[Record], x: list[float], label: str, path: Path) -> Path:
    """A dot for each trial, and a line for the best value so far."""
    figure, axes = _axes()
    values = [each.value for each in done if each.value is not None]
    axes.scatter(x, values, s=14, color=DOTS, label="a trial")
    axes.step(x, list(itertools.accumulate(values, min)), where="post", color=LINE, label="best so far")
    if min(values) > 0 and max(values) > 30 * min(values):
        axes.set_yscale("log")
    axes.set(xlabel=label, ylabel="validation loss")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    return path


def _bars(weights: dict[str, float], path: Path) -> Path:
    figure, axes = _axes(height=1.2 + 0.35 * len(weights))
    names = list(weights)[::-1]
    bars = axes.barh(names, [weights[name] for name in names], color=LINE, height=0.6)
    axes.bar_label(bars, fmt="%.2f", padding=3, color=GREY)
    axes.set(xlabel="share of the variance of the validation loss")
    figure.savefig(path, dpi=120)
    return path
