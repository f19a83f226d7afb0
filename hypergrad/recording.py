"""What a run leaves behind: TensorBoard events and the same numbers as JSON lines, in one folder."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Recorder:
    """Write scalars against the number of training steps.

    Args:
        log_dir: folder of the run; made if needed. `metrics.jsonl` in it gets one object a call of `scalars`.
        hparams: shown in TensorBoard's HParams tab, in the same run, once `close` is called.
    """

    def __init__(self, log_dir: str | Path, hparams: Mapping[str, Any]):
        from torch.utils.tensorboard import SummaryWriter  # here: it takes a second to import

        self.folder = Path(log_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.hparams = dict(hparams)
        self.writer = SummaryWriter(str(self.folder))
        self.closed = False
        self.last: dict[str, float] = {}
        self.bands: set[str] = set()
        self.step = 0

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._lay_out(values)
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)
        finite = {tag: value if math.isfinite(value) else None for tag, value in values.items()}  # JSON has no NaN
        self._line({"step": step, **finite})
        self.last.update(values)
        self.step = step

    def _lay_out(self, values: Mapping[str, float]) -> None:
        """Hypergradients with their standard errors: margin charts in the Custom Scalars tab."""
        named = [tag.removesuffix("/mean") for tag in values if tag.startswith("band/") and tag.endswith("/mean")]
        if not self.bands.issuperset(named):
            self.bands.update(named)
            charts = {
                tag[5:]: ["Margin", [f"{tag}/{x}" for x in ("mean", "low", "high")]] for tag in sorted(self.bands)
            }
            self.writer.add_custom_scalars({"hypergradient, mean and standard error": charts})

    def text(self, step: int, message: str) -> None:
        """A sentence in TensorBoard's Text tab, and in the JSON lines."""
        self.writer.add_text("notes", message, step)
        self._line({"step": step, "note": message})

    def _line(self, row: Mapping[str, Any]) -> None:
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        metrics = {tag: value for tag, value in self.last.items() if tag.startswith("loss/")}
        if metrics:
            # run_name=".": the default would make a second run beside this one; global_step: the metrics are charts that
            # exist, and get their last point once more
            self.writer.add_hparams(self.hparams, metrics, run_name=".", global_step=self.step)
        self.writer.close()


class Journal:
    """What a tuner has to say: scalars for the recorder, if there is one, and sentences that are also warnings."""

    def __init__(self, log_dir: str | Path | None, hparams: Mapping[str, Any]):
        self.recorder = None if log_dir is None else Recorder(log_dir, hparams)
        self.said: set[str] = set()
        self.step, self.clock = 0, time.perf_counter()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        now = time.perf_counter()
        elapsed = 1e3 * (now - self.clock) / max(step - self.step, 1)
        self.step, self.clock = step, now
        if self.recorder is not None:
            self.recorder.scalars(step, {**values, "time/step_ms": elapsed})

    def note(self, step: int, message: str, warn: bool = True) -> None:
        if self.recorder is not None:
            self.recorder.text(step, message)
        if warn:
            warnings.warn(message, stacklevel=4)

    def note_once(self, step: int, message: str) -> None:
        if message not in self.said:
            self.said.add(message)
            self.note(step, message)

    def close(self) -> None:
        if self.recorder is not None:
            self.recorder.close()
