"""The table of schedulers: every cell is there, and the same again from the finished runs."""

import json
from pathlib import Path

import pytest

from experiments import schedulers
from experiments.arguments import parse


@pytest.mark.slow
def test_the_table_of_schedulers(tmp_path: Path) -> None:
    args = parse(schedulers.Args, ["--quick", "--out", str(tmp_path)])
    schedulers.main(args)
    result = json.loads((tmp_path / "schedulers.json").read_text())
    rows = result["rows"]
    assert [(row["scheduler"], row["start_lr"]) for row in rows] == [
        (name, lr) for name in ("none", "OneCycleLR") for lr in (1e-6, 1e-1)
    ]
    assert all(row["over_best"] == row["val"] / row["best_val"] and row["best_lr"] in schedulers.GRID for row in rows)
    runs = (tmp_path / "schedulers.jsonl").read_text()
    schedulers.main(args)
    assert (tmp_path / "schedulers.jsonl").read_text() == runs
    assert json.loads((tmp_path / "schedulers.json").read_text()) == result
