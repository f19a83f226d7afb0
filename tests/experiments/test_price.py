"""`experiments.price` and `experiments.strides`: the machinery, by their quick forms; what is counted, on known tensors."""

from __future__ import annotations

import json

import pytest
import torch

from experiments import price, strides
from experiments.arguments import parse


def test_bytes_alive_are_counted():
    """Three vectors of 4,000 bytes at the most: a, b and their sum; then a and b alone, and a view, which is a."""
    with price.Alive() as alive:
        a, b = torch.zeros(1000), torch.zeros(1000)
        assert (alive.now, alive.peak) == (8000, 8000)
        (a + b).sum()
        view = a.view(10, 100)
    assert 12_000 <= alive.peak <= 12_100 and 8000 <= alive.now <= 8100
    assert view.untyped_storage().data_ptr() == a.untyped_storage().data_ptr()


def test_a_backward_pass_is_counted():
    """Inside it the gradient of the weights, 4,000,000 bytes, is made beside them."""
    w = torch.randn(1000, 1000, requires_grad=True)
    x = torch.randn(1, 1000)
    with price.Alive() as alive:
        (x @ w).sum().backward()
    assert w.grad is not None and 4_000_000 <= alive.peak < 8_000_000


@pytest.mark.slow
def test_a_quick_price_has_every_kind_of_row(tmp_path):
    args = parse(price.Args, ["--quick", "--workloads", "diabetes", "--out", str(tmp_path)])
    rows = price.main(args)
    kinds = [row["kind"] for row in rows]
    assert {"summary", "run", "resting", "tangents", "bytes"} == set(kinds) and kinds.count("bytes") == 2 * len(
        price.FORMS
    )
    (run,) = (row for row in rows if row["kind"] == "run")
    assert run["seconds"] > 0 and run["loss"] > 0 and run["split"] == "val" and "test" not in run
    assert json.loads((tmp_path / "price.json").read_text())["rows"] == rows
    again = price.main(parse(price.Args, ["--quick", "--parts", "resting", "--out", str(tmp_path)]))
    assert [row for row in again if row["kind"] != "resting"] == [row for row in rows if row["kind"] != "resting"]


def test_strides_are_compared_with_one():
    """Two runs each: ρ of one workload is log 2 and log ½, of the other log 4 once."""
    place = {"family": "small", "seed": 0, "steps": 9, "start_lr": 1.0, "seconds": 1.0}
    rows = [
        place | {"workload": name, "stride": s, "val": val, "start_lr": lr, "seconds": 3.0 / s}
        for name, s, val, lr in [
            ("a", 1, 1.0, 1.0), ("a", 1, 1.0, 2.0), ("b", 1, 1.0, 1.0),
            ("a", 3, 2.0, 1.0), ("a", 3, 0.5, 2.0), ("b", 3, 4.0, 1.0),
        ]
    ]  # fmt: skip
    one, three = strides.summaries(rows)
    assert (one["mean"], one["seconds"]) == (1.0, 1.0)
    assert (
        three["mean"] == pytest.approx(2.0) and three["worst"] == pytest.approx(4.0) and three["worst_workload"] == "b"
    )
    assert three["seconds"] == pytest.approx(1 / 3) and (three["runs"], three["lost"]) == (3, 0)


@pytest.mark.slow
def test_a_quick_sweep_of_strides_keeps_its_runs(tmp_path):
    words = ["--quick", "--strides", "1", "3", "--out", str(tmp_path)]
    strides.main(parse(strides.Args, words))
    kept = (tmp_path / "strides.jsonl").read_text()
    strides.main(parse(strides.Args, words))
    assert (tmp_path / "strides.jsonl").read_text() == kept
    rows = json.loads((tmp_path / "strides.json").read_text())["rows"]
    assert {row["stride"] for row in rows} == {1, 3} and all(row["kind"] in ("summary", "run") for row in rows)
