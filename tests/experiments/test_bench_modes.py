"""The benchmark of the modes and the long run, short."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from experiments import bench_gpt, bench_implicit, bench_modes, long_run
from experiments.mode_tables import TABLES
from hypergrad.differentiate.compile import compiled

OURS = [name for name in bench_modes.METHODS if name.startswith(("unrolled", "forward"))]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["mlp_sgd", "mlp_adam", "cnn_sgd", "tinygpt_adam"])
@pytest.mark.parametrize("method", OURS)
def test_every_mode_agrees_with_plain_code(method, case):
    error = bench_modes.error_of(method, case, 3, "cpu")
    assert error is not None
    assert error < 1e-8


@pytest.mark.parametrize(("method", "package"), bench_modes.PACKAGES.items())
def test_peers_agree_with_plain_code(method, package):
    pytest.importorskip(package, reason="pip install -e '.[bench]'")
    error = bench_modes.error_of(method, "mlp_sgd", 3, "cpu")
    assert error is not None
    assert error < 1e-8


def test_the_differentiable_flag_agrees_where_it_is_said_to_be_right():
    """To the float32 of the step counter in stock Adam's bias correction; with momentum it is left out."""
    error = bench_modes.error_of(bench_modes.FLAG, "mlp_adam", 3, "cpu")
    assert error is not None
    assert error < 1e-4
    assert not bench_modes.suits(bench_modes.FLAG, "mlp_sgd")


@pytest.mark.slow
def test_the_gpt_of_a_gpu_in_small(tmp_path):
    """The same code as the GPT of 124 million parameters."""
    methods = ("plain", "plain code, graph kept", bench_modes.FLAG, "unrolled, every √K", "forward")
    args = {"lengths": (2,), "rounds": 1, "methods": methods, "no_memory": True, "out": str(tmp_path)}
    rows = bench_modes.main(bench_modes.Args(cases=("tinygpt_adam",), **args))
    assert [row["method"] for row in rows] == list(methods)
    assert all(row["error"] is None or row["error"] < 1e-4 for row in rows)
    with torch.device("meta"):
        full = bench_gpt.GPT(bench_gpt.FULL)
    assert sum(p.numel() for p in full.parameters()) == pytest.approx(124e6, rel=0.01)


def test_a_method_that_runs_out_of_memory_has_a_row_without_a_time(tmp_path, monkeypatch):
    def full(case):
        def call():
            if case.params[0].dtype == torch.float32:
                raise torch.OutOfMemoryError("full")
            return bench_modes.METHODS["plain code, graph kept"](case)()

        return call

    monkeypatch.setitem(bench_modes.METHODS, "forward", full)
    args = {"lengths": (1,), "rounds": 1, "methods": ("plain", "forward"), "out": str(tmp_path), "no_memory": True}
    bench_modes.main(bench_modes.Args(cases=("tinygpt_adam",), **args))
    plain, lost = json.loads((tmp_path / "bench_modes.json").read_text())["rows"]
    assert (plain["times_plain"], lost["times_plain"]) == (1.0, None)


@pytest.mark.slow
def test_rows_of_every_length_and_method(tmp_path):
    methods = ("plain", "plain code, graph kept", "forward")
    rows = bench_modes.main(
        bench_modes.Args(
            cases=("mlp_sgd",), lengths=(1, 2), rounds=1, methods=methods, no_memory=True, out=str(tmp_path)
        )
    )
    assert [(row["steps"], row["method"]) for row in rows] == [(k, method) for k in (1, 2) for method in methods]
    assert all(row["times_plain"] > 0 for row in rows)
    result = json.loads((tmp_path / "bench_modes.json").read_text())
    assert result["rows"] == rows
    assert "| forward |" in TABLES["bench_modes"](result)


@pytest.mark.slow
def test_compiled_rows_stand_beside_the_same_methods_without(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    args = bench_modes.Args(
        cases=("mlp_sgd",), lengths=(3,), rounds=1, compiled=True, no_memory=True, out=str(tmp_path)
    )
    rows = bench_modes.main(args)
    found = {row["method"]: row for row in rows}
    for method in bench_modes.COMPILED:
        assert found[method]["compile_seconds"] > 0
        assert found[method]["error"] < 1e-8
        assert found[method.removesuffix(", compiled")]["error"] < 1e-8
    result = json.loads((tmp_path / "bench_compiled.json").read_text())
    assert "| forward, compiled |" in TABLES["bench_compiled"](result)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak cannot be reset here")
def test_graphs_take_memory_and_tangents_do_not():
    """At K = 40 graphs of an MLP take some 60 MiB, forward mode some 6."""
    kept, flat = (bench_modes.growth_of(m, "mlp_sgd", 40, "cpu") for m in ("unrolled, graph kept", "forward"))
    assert kept > 3 * flat > 0


@pytest.mark.slow
def test_long_run_has_plain_short_and_whole(stand_in, tmp_path):
    rows = long_run.main(
        long_run.Args(steps=20, width=8, rounds=1, data_dir=str(stand_in), out=str(tmp_path), offload="disk")
    )
    plain, short, whole, ratios = rows
    assert (plain["run"], short["steps"], whole["steps"]) == ("plain", 2, 20)
    assert whole["val_loss"] == pytest.approx(plain["val_loss"], rel=1e-5)  # the same run
    assert whole["replayed_exactly"]
    assert ratios["time_by_turns"] > 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:We've integrated functorch:FutureWarning")  # TorchOpt 0.7.3's own call
@pytest.mark.parametrize("method", bench_implicit.METHODS)
@pytest.mark.parametrize("case", ["mlp_sgd", "cnn_sgd"])
def test_implicit_methods_agree_with_plain_code(method, case):
    if method.startswith("TorchOpt"):
        pytest.importorskip("torchopt", reason="pip install -e '.[bench]'")
    assert bench_implicit.error_of(method, case, "cpu") < 1e-8


def test_rows_of_implicit_methods(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_implicit, "METHODS", {"implicit, CG": bench_implicit.METHODS["implicit, CG"]})
    (row,) = bench_implicit.main(bench_implicit.Args(cases=("mlp_adam",), rounds=1, out=str(tmp_path)))
    assert (row["method"], row["iterations"]) == ("implicit, CG", 10) and row["times_plain"] > 1
    result = json.loads((tmp_path / "bench_implicit.json").read_text())
    assert "| implicit, CG |" in TABLES["bench_implicit"](result)
