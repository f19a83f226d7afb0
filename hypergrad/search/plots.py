"""A study as PNGs: Optuna's plots of its history and of each entry's importance, and its quality against cost."""

from __future__ import annotations

import itertools
import math
import warnings
from pathlib import Path
from typing import Any

from hypergrad.search.extras import need
from hypergrad.search.records import Record
from hypergrad.search.storage import sign_of


def plot(trials: list[Record], study: Any, folder: Path) -> dict[str, Path]:
    """Write the pictures for which there are enough trials.

    Args:
        trials: of the study.
        study: of Optuna, with the same trials.
        folder: made if needed.

    Returns:
        name → file.
    """
    plt = need("matplotlib.pyplot", "Study.plot")
    drawn = need("optuna.visualization.matplotlib", "Study.plot")
    folder.mkdir(parents=True, exist_ok=True)
    done = [x for x in trials if x.state == "complete" and x.value is not None and math.isfinite(x.value)]
    varied = any(x.value != done[0].value for x in done)
    draws = {"history": lambda: drawn.plot_optimization_history(study), "cost": lambda: _cost(plt, trials, done, study)}
    if varied:
        draws["importance"] = lambda: drawn.plot_param_importances(study)
    made: dict[str, Path] = {}
    with (
        plt.rc_context(),
        warnings.catch_warnings(),
    ):  # Optuna sets a style for everything, and warns of what is experimental
        warnings.simplefilter("ignore")
        for name, draw in draws.items() if done else ():
            axes = draw()
            made[name] = folder / f"{name}.png"
            axes.figure.savefig(made[name], dpi=120, bbox_inches="tight")
            plt.close(axes.figure)
    return made


def _cost(plt: Any, trials: list[Record], done: list[Record], study: Any) -> Any:
    """A dot for each trial, and a line for the best value so far, over what all trials took."""
    unit = "gradient_evaluations" if any(x.cost.gradient_evaluations for x in done) else "seconds"
    spent = dict(zip((x.number for x in trials), itertools.accumulate(getattr(x.cost, unit) for x in trials)))
    axes = plt.subplots()[1]
    values, sign = [x.value for x in done if x.value is not None], sign_of(study)
    axes.scatter([spent[x.number] for x in done], values, s=14, label="a trial")
    best = [sign * x for x in itertools.accumulate((sign * x for x in values), min)]
    axes.step([spent[x.number] for x in done], best, where="post", label="best so far")
    axes.set(xlabel=f"{unit.replace('_', ' ')}, all trials so far", ylabel="objective value")
    axes.legend()
    return axes
