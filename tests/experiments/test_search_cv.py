"""The comparison with a grid runs, on a problem of one hyperparameter and one of two, and its table shows it."""

from __future__ import annotations

import pytest

from experiments import results, search_cv
from experiments.search_figures import search_cv as table


def test_quick(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {name: search_cv.PROBLEMS[name] for name in ("ridge", "elastic_net")}
    monkeypatch.setattr(search_cv, "PROBLEMS", kept)
    rows = search_cv.main(["--quick", "--out", str(tmp_path)])
    assert [(row["model"], row["method"]) for row in rows] == [(m, how) for m in kept for how in ("gradient", "grid")]
    grids = [row for row in rows if row["method"] == "grid"]
    assert [row["fold_fits"] for row in grids] == [9 * 5, 4 * 4 * 5]
    for row, grid in zip(rows[::2], grids):
        assert row["loss_ratio"] == row["loss"] / grid["loss"] <= 1.001
        assert row["fold_fits"] == 5 * row["candidates"] <= 5 * 30
    written = results.load("search_cv.json", tmp_path)
    assert written is not None and written["rows"] == rows
    assert "elastic net, diabetes" in table(written)


def test_a_second_call_goes_on_from_what_is_there(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_cv, "PROBLEMS", {"ridge": search_cv.PROBLEMS["ridge"]})
    rows = search_cv.main(["--quick", "--out", str(tmp_path)])
    monkeypatch.setattr(search_cv, "search", lambda *_: pytest.fail("measured again"))
    assert search_cv.main(["--quick", "--out", str(tmp_path)]) == rows
