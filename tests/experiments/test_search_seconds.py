"""hybrid-online charged by the clock: its loop is the table's run, its charges add up, and all of it runs in its quick mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments import search_seconds
from experiments.search_problems import folds, scores
from experiments.table_searches import Table

pytest.importorskip("optuna")


@pytest.mark.parametrize("name", ["iris", "breast", "diabetes"])
def test_what_the_tuner_and_tpe_are_told_is_the_second_metric(name: str) -> None:
    data = folds(name)
    output = 0.3 * torch.randn(*data.held_y.shape, generator=torch.Generator().manual_seed(0))  # below the cap
    mean = float(search_seconds.held_out(data, output)) / len(data.x)
    assert mean == pytest.approx(scores(output, data.held_y, data.held, data.kind)[1], rel=1e-5)


def test_every_epoch_sees_every_row_once() -> None:
    data = folds("iris")
    given, rows = search_seconds.batches(data, 40, 2, 0), data.x.shape[1]
    assert [x.shape[1] for x, _ in given] == [40, 40, rows - 80] * 2
    first = torch.cat([x for x, _ in given[:3]], 1)
    assert torch.equal(first.sort(1).values, data.x.sort(1).values) and not torch.equal(given[0][0], given[3][0])


def test_what_was_found_is_found_when_it_is_paid() -> None:
    row = {"trial_seconds": [2.0, 3.0, 4.0], "trial_nll": [0.5, None, 0.25]}
    assert search_seconds.path(row, "nll", "seconds") == [(2.0, 0.5), (9.0, 0.25)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_quick_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(table: Table, seed: int, budget: int) -> list[tuple[float, float]]:
        return [(1.0, float(table.end[seed % 256]))]

    monkeypatch.setattr(search_seconds, "STRATEGIES", dict.fromkeys(search_seconds.RIVALS, found))
    folder = str(tmp_path)
    rows: list[dict[str, Any]] = search_seconds.main(["--quick", "--out", folder, "--runs", folder])
    assert {row["kind"] for row in rows} == {"summary", "problem", "difference", "trial", "cost"}
    own = [row for row in rows if row["kind"] == "summary" and row["strategy"] == "hybrid-online"]
    assert {(row["charge"], row["budget"]) for row in own} >= {("promised", 4), ("evaluations", 4)}
    assert all(row["low"] <= row["score"] <= row["high"] for row in own)
    trials = [row for row in rows if row["kind"] == "cost"]
    assert all(row["trials"] >= 4 and np.isfinite(row["median_seconds"]) for row in trials)
    monkeypatch.setattr(search_seconds, "optimize", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(search_seconds, "study", lambda item: item)
    assert search_seconds.main(["--quick", "--out", folder, "--runs", folder]) == rows
