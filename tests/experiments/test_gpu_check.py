import os
import subprocess

import pytest
import torch

from experiments import gpu_check

ROOT = gpu_check.results.PYPROJECT.parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_and_ends_well(capsys):
    assert gpu_check.main(gpu_check.Args()) == []
    assert "no GPU" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_script_ends_before_any_set_up_without_a_gpu(tmp_path):
    hidden = {**os.environ, "PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        ["bash", str(ROOT / "scripts/gpu_check.sh")],
        cwd=tmp_path,
        env=hidden,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "no GPU" in done.stdout


@pytest.mark.parametrize("name", ["float32", "bf16 autocast"])
def test_a_live_loop_runs_on_cpu_as_it_would_on_cuda(name):
    assert "validation loss" in gpu_check.live_loop("cpu", steps=60, **gpu_check.LOOPS[name])


def test_a_failing_command_is_an_error_with_its_last_lines():
    with pytest.raises(AssertionError, match="went wrong"):
        gpu_check.shell("-c", "raise SystemExit('went wrong')")
