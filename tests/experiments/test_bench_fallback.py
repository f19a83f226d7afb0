"""The benchmark of the fallback, short."""

from __future__ import annotations

import json

import pytest
import torch

from experiments import bench_fallback
from experiments.mode_tables import TABLES
from hypergrad.optimizers.registry import rule_of


@pytest.mark.parametrize("mode", bench_fallback.MODES)
def test_adams_own_step_agrees_with_its_rule(mode):
    assert bench_fallback.error_of(mode, "deep_adam", "cpu") < 1e-9


def test_the_rule_does_not_see_the_subclass():
    params = [torch.nn.Parameter(torch.ones(2))]
    by_rule, own = (rule_of(bench_fallback.OPTIMIZERS[m][1](params)) for m in (bench_fallback.RULE, bench_fallback.OWN))
    assert by_rule is not None
    assert own is None


@pytest.mark.slow
def test_rows_of_every_mode(tmp_path):
    optimizers = (bench_fallback.RULE, bench_fallback.OWN)
    cases = ("mlp_adam",)
    rows = bench_fallback.main(
        bench_fallback.Args(cases=cases, steps=2, rounds=1, optimizers=optimizers, out=str(tmp_path))
    )
    assert [(row["optimizer"], row["mode"]) for row in rows] == [
        (o, m) for o in optimizers for m in bench_fallback.MODES
    ]
    assert all(row["times_plain"] > 0 for row in rows)
    result = json.loads((tmp_path / "bench_fallback.json").read_text())
    assert f"| {bench_fallback.OWN} | 6 |" in TABLES["bench_fallback"](result)
