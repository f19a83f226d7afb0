from pathlib import Path

import pytest

from experiments import iris_forest, results

pytest.importorskip("optuna")


def test_twelve_points_have_the_same_winner_as_gridsearchcv(tmp_path: Path) -> None:
    rows = iris_forest.main(["--quick", "--out", str(tmp_path)])
    theirs, ours = rows
    assert (theirs["search"], ours["search"]) == ("scikit-learn", "hypergrad.search")
    assert {key: x for key, x in theirs.items() if key != "search"} == {
        key: x for key, x in ours.items() if key != "search"
    }
    assert ours["points"] == 12 and ours["same_winner"] == 1 and ours["largest_difference_of_scores"] == 0.0
    assert results.load("iris_forest.json", tmp_path)["rows"] == rows  # type: ignore[index]


def test_the_full_grid_has_144_points() -> None:
    points = 1
    for values in iris_forest.GRID.values():
        points *= len(values)
    assert points == 144
