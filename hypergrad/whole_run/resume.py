"""The state of `tune_run` on disk, from which it goes on after a kill: one JSON file, replaced atomically."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAME = "tune_run.json"


class ResumeFile:
    """The file of one study.

    Args:
        log_dir: the folder; None: nothing is kept.
        study: numbers and strings that identify the study.
    """

    def __init__(self, log_dir: str | Path | None, study: Mapping[str, Any]):
        self.path = None if log_dir is None else Path(log_dir, NAME)
        self.study = json.loads(json.dumps(study))

    def load(self, resume: bool) -> dict[str, Any] | None:
        """The state saved last, or None where there is none.

        Raises:
            ValueError: the file is damaged, of another study, or exists although `resume` is False.
        """
        if self.path is None or not self.path.is_file():
            return None
        if not resume:
            raise ValueError(f"{self.path} exists already: pass resume=True to go on from it, or another log_dir.")
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            known, state = content["study"], content["state"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} cannot be read ({error}): delete it to begin anew.") from error
        differ = [name for name in {**self.study, **known} if known.get(name) != self.study.get(name)]
        if differ:
            shown = "; ".join(f"{n}: {_short(known.get(n))} there, {_short(self.study.get(n))} here" for n in differ)
            raise ValueError(f"{self.path} is of another study ({shown}): pass another log_dir, or delete the file.")
        return state

    def save(self, state: Mapping[str, Any]) -> None:
        """Write the state, so that the file is whole at every moment."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_name(self.path.name + ".tmp")
        with draft.open("w", encoding="utf-8") as file:
            json.dump({"study": self.study, "state": state}, file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self.path)


def _short(x: Any) -> str:
    text = json.dumps(x)
    return text if len(text) <= 60 else text[:57] + "..."
