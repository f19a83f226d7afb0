from pathlib import Path

import pytest

from experiments import results, worker_start

pytest.importorskip("optuna")


@pytest.mark.slow
def test_a_row_each_way(tmp_path: Path) -> None:
    rows = worker_start.main(["--quick", "--out", str(tmp_path)])
    assert [row["workers"] for row in rows] == ["processes", "processes, again", "threads"]
    assert all(0 <= row["until_first_trial"] < row["seconds"] for row in rows)
    assert rows[2]["processes"] == 1 and all(row["processes"] in (1, 2) for row in rows)
    assert results.load("worker_start.json", tmp_path)["rows"] == rows  # type: ignore[index]
