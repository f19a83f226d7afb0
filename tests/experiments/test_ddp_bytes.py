"""`experiments.ddp_bytes`: what is written out for many processes. Counts are held in tests/online/test_distributed.py."""

from __future__ import annotations

import json

import pytest

from experiments import ddp_bytes
from experiments.arguments import parse


def test_a_ring_sends_twice_the_bytes_but_for_a_share():
    rows = {(row["net"], row["processes"]): row for row in ddp_bytes.written_out()}
    gpt, resnet = rows["GPT of 124 M weights", 8], rows["ResNet-18", 64]
    assert gpt["weights"] == 124_439_808  # GPT-2's
    assert gpt["gradient_bytes"] == 2 * 7 / 8 * 4 * 124_439_808
    assert resnet["vector_bytes"] == 2 * 63 / 64 * 4 * resnet["weights"] and resnet["weights"] // 10**6 == 11
    assert resnet["mean_vector_bytes"] == pytest.approx(resnet["vector_bytes"] / 5)


@pytest.mark.slow
def test_two_processes_count_the_same(tmp_path):
    rows = ddp_bytes.main(parse(ddp_bytes.Args, ["--quick", "--out", str(tmp_path)]))
    counted = [row for row in rows if row["rows"] == "counted"]
    assert {row["processes"] for row in counted} == {2}
    assert {row["kind"] for row in counted} == {"plain", "resting", "product", "reading", "product and reading"}
    assert json.loads((tmp_path / "ddp_bytes.json").read_text())["rows"] == rows
