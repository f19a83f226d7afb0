"""The log of a run: TensorBoard events and the same numbers as JSON lines, in one folder; and warnings."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hypergrad.core.row_file import Rows
from hypergrad.core.user_warnings import warn_user

LR = "lr_scale"  # what is tuned of lr: lr over its shape


class Recorder:
    """Write scalars against the number of training steps.

    No step is written twice: where a run goes on from a state (`go_on`), rows of later steps are dropped, and TensorBoard hides
    their events; a run that begins in the folder of an earlier one puts its `metrics.jsonl` aside, as `metrics.1.jsonl`, ….

    Args:
        log_dir: folder of the run, which it has to itself; made if needed. `metrics.jsonl` in it gets one object a call of
            `scalars`.
        hparams: shown in TensorBoard's HParams tab, in the same run, once `close` is called.
        pages: tags → the Custom Scalars tab; by default a tuner's.
    """

    def __init__(
        self,
        log_dir: str | Path,
        hparams: Mapping[str, Any],
        pages: Callable[[Sequence[str]], dict[str, dict[str, list[Any]]]] | None = None,
    ):
        from torch.utils.tensorboard import SummaryWriter  # here: it takes a second to import

        folder = Path(log_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.hparams, self.pages = dict(hparams), pages or layout
        self.rows = Rows(folder)
        self.make = lambda: SummaryWriter(str(folder), purge_step=self.rows.hidden_from)
        self._writer: Any = None  # made at the first row: only then is it known what it hides
        self.closed = False
        self.last: dict[str, float] = {}
        self.starts: dict[str, float] = {}
        self.waiting: list[tuple[str, str]] = []  # said before the first step: of a run that goes on, said before

    @property
    def writer(self) -> Any:
        """TensorBoard's."""
        if self._writer is None:
            self.rows.open()
            self._writer = self.make()
            waiting, self.waiting = self.waiting, []
            for tag, message in waiting:
                self.text(0, message, tag)
        return self._writer

    def go_on(self, step: int) -> None:
        """A run goes on after so many steps; so do the lines of `begin`, where this folder has its rows."""
        if self._writer is not None:
            self._writer.close()
        self._writer, self.waiting = None, []
        self.rows.go_on(step)
        self.starts = {tag: x for tag, x in self.rows.last.items() if tag.startswith("start/")} or self.starts

    def begin(self, values: Mapping[str, float]) -> None:
        """Record the values, hyper/…, from which tuning starts: at step 0, and as a horizontal line in each chart.

        The line is needed because TensorBoard leaves outliers, such as a start, out of a chart's range.
        """
        if not self.rows.has_scalars:
            self.scalars(0, values)
        self.starts = {f"start/{name.removeprefix('hyper/')}": values[name] for name in charted(values)}

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        writer = self.writer
        if not self.rows.has_scalars:
            writer.add_custom_scalars(self.pages(list(values)))
        values = {**values, **self.starts}
        for tag, value in values.items():
            writer.add_scalar(tag, value, step)
        finite = {tag: value if math.isfinite(value) else None for tag, value in values.items()}  # JSON has no NaN
        self.rows.add({"step": step, **finite})
        self.last.update(values)

    def text(self, step: int, message: str, tag: str = "notes") -> None:
        """Write a sentence, or with tag="recipe" code, to TensorBoard's Text tab and to the JSON lines."""
        if self._writer is None and step == 0:
            self.waiting.append((tag, message))
            return
        writer, row = self.writer, {"step": step, "note" if tag == "notes" else tag: message}
        if row not in self.rows.said:
            writer.add_text(tag, message if tag == "notes" else f"```python\n{message}\n```", step)
            self.rows.add(row)

    def flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        metrics = {tag: value for tag, value in self.last.items() if tag.startswith("loss/")}
        if metrics:
            from torch.utils.tensorboard.summary import hparams

            for part in hparams(self.hparams, metrics):  # `add_hparams` would write the metrics' last points once more
                self.writer.file_writer.add_summary(part)
        if self._writer is not None:
            self._writer.close()


def short(labels: Sequence[str]) -> list[str]:
    """Labels without the number of the param group where there is only one group: lr/0 becomes lr.

    Example:
        >>> short(["lr/0", "weight_decay/0", "weight_decay/1"])
        ['lr', 'weight_decay/0', 'weight_decay/1']
    """
    names = [label.split("/")[0] for label in labels]
    return [name if label == f"{name}/0" and names.count(name) == 1 else label for name, label in zip(names, labels)]


def tagged(labels: Sequence[str]) -> list[str]:
    """Short labels as the tags of a tuner have them, which say that what is tuned of lr is its scale.

    Example:
        >>> tagged(["lr/0", "lr/1", "momentum/0"])
        ['lr_scale/0', 'lr_scale/1', 'momentum']
    """
    return [LR + name.removeprefix("lr") if name.split("/")[0] == "lr" else name for name in short(labels)]


def charted(tags: Iterable[str]) -> list[str]:
    """Of hyper/NAME and hyper/log10_NAME the latter, where there are both."""
    own = [tag for tag in tags if tag.startswith("hyper/")]
    return [tag for tag in own if tag.replace("hyper/", "hyper/log10_") not in own]


def layout(tags: Iterable[str]) -> dict[str, dict[str, list[Any]]]:
    """The Custom Scalars tab: a run on one page, from what is tuned to what it costs.

    Args:
        tags: those of the tuned values, hyper/…; the others follow from these.
    """
    shown = [tag.removeprefix("hyper/") for tag in charted(tags)]
    names = [name.removeprefix("log10_") for name in shown]
    charts: dict[str, list[str]] = {}  # param groups of one name in one chart
    for name in shown:
        charts.setdefault(name.split("/")[0].replace("log10_", "log10 "), []).extend((f"hyper/{name}", f"start/{name}"))

    lrs = [name.replace(LR, "lr/applied", 1) for name in names if name.split("/")[0] == LR]

    def lines(*tags: str) -> list[Any]:
        return ["Multiline", [f"^{re.escape(tag)}$" for tag in tags]]

    def band(tag: str) -> list[Any]:
        return ["Margin", [tag, f"{tag}_low", f"{tag}_high"]]

    return {
        "hyperparameters; level lines: where they started": {
            **({"lr as it was used: its scale times its shape": lines(*lrs)} if lrs else {}),
            **{title: lines(*own) for title, own in charts.items()},
        },
        "loss": {"validation": lines("loss/val", "loss/val_best"), "training": lines("loss/train")},
        "hypergradient of the validation loss, with its standard error": {
            name: band(f"val_hypergradient/{name}")
            for name in reversed(names)  # TensorBoard shows these last to first
        },
        "run": {
            "size of tangents, in that of the weights": lines(*(f"tangent/{name}" for name in names)),
            "cost so far, over that of a plain run": lines("run/cost_over_plain"),
            "events so far": lines("run/rollbacks", "run/backtracks", "run/steps_passed_over"),
        },
    }


class Journal:
    """The log and the warnings of one tuner.

    Scalars and sentences go to a `Recorder` where there is a log_dir, scalars to `on_log`; sentences are also Python warnings.

    Args:
        log_dir, hparams: as of `Recorder`.
        on_log: `on_log(metrics, step)`, called with every row of scalars; what it raises is raised.
        silent: neither log nor warnings: another process has them.
    """

    def __init__(
        self,
        log_dir: str | Path | None,
        hparams: Mapping[str, Any],
        on_log: Callable[[dict[str, float], int], object] | None = None,
        silent: bool = False,
    ):
        self.silent = silent
        self.recorder = None if log_dir is None or silent else Recorder(log_dir, hparams)
        self.on_log, self.hparams = None if silent else on_log, dict(hparams)
        self.begun = False  # a row has been written
        self.noted: set[str] = set()
        self.step, self.clock = 0, time.perf_counter()

    @property
    def on(self) -> bool:
        """Whether scalars go anywhere."""
        return self.recorder is not None or self.on_log is not None

    def begin(self, values: Mapping[str, float]) -> None:
        """As `Recorder.begin`."""
        self.begun = True
        if self.recorder is not None:
            self.recorder.begin(values)
        self._hand_on(0, values)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        now = time.perf_counter()
        elapsed = 1e3 * (now - self.clock) / max(step - self.step, 1)
        self.step, self.clock, self.begun = step, now, True
        row = {**values, "run/ms_per_step": elapsed}
        if self.recorder is not None:
            self.recorder.scalars(step, row)
        self._hand_on(step, row)

    def _hand_on(self, step: int, values: Mapping[str, float]) -> None:
        if self.on_log is not None:
            self.on_log({tag: float(x) for tag, x in values.items()}, step)

    def note(self, step: int, message: str, warn: bool = True) -> None:
        """A sentence to the log, and as a warning."""
        if self.recorder is not None:
            self.recorder.text(step, message)
        if warn and not self.silent:
            warn_user(message)

    def note_once(self, step: int, message: str, warn: bool = True) -> None:
        if message not in self.noted:
            self.noted.add(message)
            self.note(step, message, warn)

    def recipe(self, step: int, code: str) -> None:
        """What a plain run should use, for the Text tab; once for each code."""
        if self.recorder is not None and code not in self.noted:
            self.noted.add(code)
            self.recorder.text(step, code, "recipe")

    def go_on(self, step: int) -> None:
        """A run goes on after so many steps: rows of later ones are written anew."""
        self.noted.clear()
        if self.recorder is not None:
            self.recorder.go_on(step)

    def flush(self) -> None:
        """What was written is on disk."""
        if self.recorder is not None:
            self.recorder.flush()

    def close(self) -> None:
        if self.recorder is not None:
            self.recorder.close()
