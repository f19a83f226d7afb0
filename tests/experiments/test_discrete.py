"""Discrete entries: both strategies on every model, within one budget."""

from __future__ import annotations

import pytest
import torch

from experiments import discrete, results
from hypergrad.search import Trial
from hypergrad.search.space import as_space


def test_quick_mode_compares_at_one_budget(tmp_path):
    rows = discrete.main(["--quick", "--out", str(tmp_path), "--runs", str(tmp_path)])
    assert [row["strategy"] for row in rows] == ["tpe", "hybrid-online"]
    assert len({row["gradient_evaluations"] for row in rows}) == 1
    assert rows[0]["val_over_tpe"] == 1 and rows[1]["val_over_tpe"] == rows[1]["val"] / rows[0]["val"]
    assert all(row["trials"] >= 1 for row in rows)
    written = results.load("discrete.json", tmp_path)
    assert written is not None and written["rows"] == rows


@pytest.mark.slow
@pytest.mark.parametrize("name", discrete.CASES)
def test_runs_of_a_case_pass_as_many_examples_whatever_is_chosen(name):
    case = discrete.CASES[name]
    pytest.importorskip("mnist1d" if name.startswith("MNIST") else "sklearn")
    space = as_space(case.space)
    for choice in ({}, {"batch": 128, "activation": "gelu"}, {"kernel": 9}, {"embedding": 64}):
        p = space.first() | {k: v for k, v in choice.items() if k in space} | {"lr": 0.1, "weight_decay": 1e-4}
        run = discrete.build(case, 0.1, "val", p, Trial(0, p, 0))
        batches = list(run.batches)
        size = p.get("batch", case.batch)
        assert {len(y) for _, y in batches} == {size}
        assert abs(size * len(batches) - 0.1 * case.examples) <= size / 2
        assert torch.isfinite(run.loss(run.model, batches[0])) and torch.isfinite(run.val_loss())
