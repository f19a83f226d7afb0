import json
import math
from functools import partial
from pathlib import Path

import pytest

from experiments.sweep import finished, sweep


def square(item: dict, log: str = "", fail_at: int | None = None) -> dict:
    if item["n"] == fail_at:
        raise RuntimeError("interrupted")
    if log:
        with Path(log).open("a") as file:
            file.write(f"{item['n']}\n")
    return item | {"square": item["n"] ** 2 if item["n"] else math.nan}


TODO = [{"n": n} for n in range(4)]
ROWS = [{"n": 0, "square": None}, {"n": 1, "square": 1}, {"n": 2, "square": 4}, {"n": 3, "square": 9}]


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_every_item_has_its_row_and_numbers_that_are_not_finite_are_null(tmp_path, jobs):
    rows = sweep(square, TODO, tmp_path / "new/rows.jsonl", jobs)
    assert sorted(rows, key=lambda row: row["n"]) == ROWS
    assert [json.loads(line) for line in (tmp_path / "new/rows.jsonl").read_text().splitlines()] == rows


def test_an_interrupted_sweep_goes_on_where_it_stopped(tmp_path):
    path, log = tmp_path / "rows.jsonl", tmp_path / "log"
    with pytest.raises(RuntimeError, match="interrupted"):
        sweep(partial(square, log=str(log), fail_at=2), TODO, path)
    assert finished(path) == ROWS[:2]
    assert sweep(partial(square, log=str(log)), TODO, path) == ROWS
    assert log.read_text().split() == ["0", "1", "2", "3"]


def test_a_torn_line_is_run_again(tmp_path):
    path = tmp_path / "rows.jsonl"
    sweep(square, TODO, path)
    whole = path.read_text()
    path.write_text(whole[:-5])
    assert finished(path) == ROWS[:3]
    assert sweep(square, TODO, path) == ROWS


def test_rows_of_other_settings_stay(tmp_path):
    path = tmp_path / "rows.jsonl"
    sweep(square, TODO[:2], path)
    assert len(sweep(square, [{"n": 5}], path)) == 3
