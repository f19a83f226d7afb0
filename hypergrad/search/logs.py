"""TensorBoard: a run for each trial, with HParams, so that the parallel-coordinates view compares them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from hypergrad.search.objective import Outcome
from hypergrad.search.space import Values


def record_trial(log_dir: Path, number: int, values: Values, outcome: Outcome) -> None:
    """Write one trial that has ended, as run "trial_0007".

    Args:
        log_dir: of the study.
        values: what was tried; where hypergradients moved some, those they came to.
    """
    from torch.utils.tensorboard import SummaryWriter  # here: it takes a second to import

    writer = SummaryWriter(str(log_dir / f"trial_{number:04d}"))
    for step, value in outcome.curve:
        writer.add_scalar("loss/reported", value, step)
    for step, point in enumerate(outcome.notes.get("path", [])):
        for name, value in point.items():
            if value is not None:
                writer.add_scalar("loss/path" if name == "value" else f"hyper/{name}", value, step)
    if outcome.error:
        writer.add_text("error", f"```\n{outcome.error}\n```", 0)
    metrics: dict[str, Any] = {
        f"cost/{unit}": getattr(outcome.cost, unit) for unit in ("seconds", "epochs", "gradient_evaluations")
    }
    if outcome.value is not None and math.isfinite(outcome.value):
        metrics = {"loss/val": outcome.value} | metrics
    hparams = {name: x if isinstance(x, (bool, int, float, str)) else str(x) for name, x in values.items()}
    writer.add_hparams(hparams | {"state": outcome.state}, metrics, run_name=".")  # ".": the default makes a second run
    writer.close()
