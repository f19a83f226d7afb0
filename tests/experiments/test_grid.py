import json

import pytest

from experiments import grid

AXES = {"lr": (0.1, 1.0, 10.0), "momentum": (0.0, 0.9)}


def run(item):
    """The best lr of set a is 1 without momentum, of b 0.1 with it; 10 diverges."""
    best = {"a": (1.0, 0.0), "b": (0.1, 0.9)}[item["set"]]
    error = abs(item["lr"] - best[0]) + abs(item["momentum"] - best[1])
    return item | {"error": error, "diverged": item["lr"] == 10}


def test_each_cell_has_its_winner_on_seeds_that_chose_nothing(tmp_path):
    path = tmp_path / "grid.jsonl"
    fresh = [{"seed": 1}, {"seed": 2, "replay": True}]
    rows = grid.measure(run, [{"set": "a"}, {"set": "b"}], AXES, "error", fresh, path, 1)
    assert sum(row["method"] == "grid" for row in rows) == 2 * 6
    won = [row for row in rows if row["method"] == "winner"]
    assert [(row["set"], row["lr"], row["momentum"], row["seed"]) for row in won] == [
        ("a", 1.0, 0.0, 1),
        ("a", 1.0, 0.0, 2),
        ("b", 0.1, 0.9, 1),
        ("b", 0.1, 0.9, 2),
    ]
    assert [row.get("replay") for row in won] == [None, True, None, True]
    lines = path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows
    assert grid.measure(pytest.fail, [{"set": "a"}, {"set": "b"}], AXES, "error", fresh, path, 1) == rows


def test_a_grid_that_diverged_everywhere_has_no_winner():
    rows = [run({"set": "a", "lr": 10.0, "momentum": x}) for x in AXES["momentum"]]
    with pytest.raises(SystemExit, match="every setting of the grid diverged"):
        grid.winner(rows, AXES, "error")
