import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments.gpu_check import correct, exact, loops, rows, speed
from experiments.gpu_check.__main__ import TIERS, Args, main
from experiments.gpu_check.jobs import difference, of_rule, same
from experiments.gpu_check.rows import NotRun, Place, Row

ROOT = rows.ROOT
QUICK = Place("cpu", quick=True)
# What a machine with torch's own packages lacks is not found there either.
LACKING = """
import importlib.machinery as machinery, runpy
lacks, find = {"sklearn", "matplotlib", "torchvision", "scipy", "optuna", "mnist1d", "pandas"}, machinery.PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in lacks else find(name, path, target)
machinery.PathFinder.find_spec = find_spec
runpy.run_module("experiments.gpu_check", run_name="__main__", alter_sys=True)
"""
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def fine(place: Place) -> Row:
    return {"detail": "fine", "number": 1}


def wrong(place: Place) -> Row:
    raise ValueError(f"went wrong in {ROOT}/somewhere.py and in /opt/elsewhere/site-packages/torch/nn.py")


def stopped(place: Place) -> Row:
    raise KeyboardInterrupt


@without_gpu
def test_without_a_gpu_it_says_so_and_ends_well(capsys):
    assert main((), Args()) == []
    assert "no GPU" in capsys.readouterr().out


@pytest.mark.slow
@without_gpu
@pytest.mark.parametrize("words", [[], ["correct"], ["speed"]])
def test_the_script_ends_before_any_set_up_without_a_gpu(words, tmp_path):
    hidden = {**os.environ, "PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        ["bash", str(ROOT / "scripts/gpu_check.sh"), *words],
        cwd=tmp_path,
        env=hidden,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "no GPU" in done.stdout


def test_an_unknown_tier_is_refused_with_the_known_ones():
    with pytest.raises(SystemExit, match="unknown 'fast'; choose from correct, speed"):
        main(("fast",), Args(device="cpu"))


@pytest.mark.slow
def test_both_tiers_run_on_a_cpu_without_further_packages(tmp_path):
    words = ("--device", "cpu", "--quick", "--seconds", "200")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", LACKING, "correct", "speed", *words, "--out", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu_correct.json").read_text())
    assert found["command"] == "python -m experiments.gpu_check correct --quick --seconds 200.0 --device cpu"
    assert found["environment"]["device"] == "cpu" and found["environment"]["torch"] == torch.__version__
    by_name = {row["check"]: row for row in found["rows"]}
    assert list(by_name) == list(correct.CHECKS)
    assert {name for name, row in by_name.items() if not row["passed"]} == {
        "nn.LSTM, cuDNN on",
        "loop: capturable AdamW",
        "loop: capturable AdamW, lr a tensor",
        "waits for the device a step",
    }
    assert "made-up clusters, as scikit-learn is not installed" in by_name["quickstart"]["detail"]
    text = (tmp_path / "gpu_speed.json").read_text()
    measured = json.loads(text)["rows"]
    assert [row["check"] for row in measured] == list(speed.CHECKS)
    assert all(row["passed"] and row["ratio"] > 0 and row["memory_ratio"] is None for row in measured)
    assert {row["products_a_step"] for row in measured if row["form"] == "tuned"} == {1.0}
    runs = [row for row in measured if row["form"].startswith("cost=")]
    assert len(runs) == 6 and all(row["steps"] == 40 and 0 < row["products_a_step"] < 1 for row in runs)
    assert str(tmp_path) not in text and str(Path.home()) not in text


def test_a_failing_check_is_a_row_and_the_next_one_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(TIERS["correct"], "checks", {"wrong": wrong, "fine": fine})
    with pytest.raises(SystemExit) as ended:
        main(("correct",), Args(device="cpu", out=str(tmp_path)))
    assert ended.value.code == 1
    bad, good = json.loads((tmp_path / "gpu_correct.json").read_text())["rows"]
    assert bad["detail"] == "ValueError: went wrong in somewhere.py and in torch/nn.py"
    assert 'File "tests/experiments/test_gpu_check.py"' in bad["traceback"]
    assert str(ROOT) not in json.dumps(bad)
    assert good == {"check": "fine", "passed": True, "seconds": good["seconds"], "detail": "fine", "number": 1}
    assert "1 passed, 1 failed, 0 not run" in capsys.readouterr().out


def test_checks_still_to_come_when_time_is_up_are_rows_that_were_not_run(monkeypatch, tmp_path):
    clock = iter([0.0, 0.0, 1.0, 10.0, 10.0])
    monkeypatch.setattr(rows.time, "perf_counter", lambda: next(clock))
    kept = []
    found = rows.run({"first": fine, "second": fine}, QUICK, 5.0, lambda done: kept.append(len(done)))
    assert [row["passed"] for row in found] == [True, None]
    assert found[1]["detail"] == "not run: time was up"
    assert kept == [1, 2]


def test_a_check_that_does_not_apply_is_no_failure():
    def elsewhere(place: Place) -> Row:
        raise NotRun("there is none")

    assert rows.outcome(elsewhere, QUICK) == {"passed": None, "detail": "not run: there is none"}


def test_a_run_that_is_stopped_keeps_the_rows_before(monkeypatch, tmp_path):
    monkeypatch.setattr(TIERS["speed"], "checks", {"fine": fine, "stopped": stopped, "never": fine})
    with pytest.raises(KeyboardInterrupt):
        main(("speed",), Args(device="cpu", out=str(tmp_path)))
    assert [row["check"] for row in json.loads((tmp_path / "gpu_speed.json").read_text())["rows"]] == ["fine"]


def test_settings_of_torch_are_put_back_after_a_check_that_fails():
    def leaves_settings(place: Place) -> Row:
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(True)
        raise ValueError("here")

    assert rows.outcome(leaves_settings, QUICK)["passed"] is False
    assert torch.get_default_dtype() == torch.float32
    assert not torch.are_deterministic_algorithms_enabled()


def test_running_out_of_memory_is_a_row():
    def large(place: Place) -> Row:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")

    assert rows.outcome(large, QUICK)["detail"].startswith("OutOfMemoryError: CUDA out of memory")


def test_another_hypergradient_is_told_from_the_same_one():
    one, other = of_rule("AdamW", "cpu"), of_rule("Adam", "cpu")
    assert difference(one, one) == 0
    with pytest.raises(AssertionError, match="differs by"):
        same(one, other)
    one.gradients["lr"] = one.gradients["lr"] * float("nan")
    with pytest.raises(AssertionError, match="differs by nan"):
        same(one, of_rule("AdamW", "cpu"))


def test_a_loop_that_does_not_train_is_an_error():
    with pytest.raises(AssertionError, match="validation loss"):
        loops.live_loop(QUICK, maximize=True)


def test_the_table_has_every_rule_in_every_mode():
    assert len({**exact.IN_FRONT, **exact.REST}) == len(exact.RULES) * len(exact.MODES) == 44
