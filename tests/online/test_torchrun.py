"""The script of docs/distributed.md under torchrun, as a user would start it; and one whose rank dies."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hypergrad

ROOT = Path(hypergrad.__file__).parents[1]
pytestmark = pytest.mark.slow


def script() -> str:
    found = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return found[1]


def torchrun(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    (folder / "train.py").write_text(code, encoding="utf-8")
    options = [
        "--standalone",
        "--nproc-per-node",
        "2",
        "--redirects",
        "1",
        "--log-dir",
        "logs",
    ]  # stdout, a file a rank
    command = [sys.executable, "-m", "torch.distributed.run", *options, "train.py"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


def test_the_page_s_script_ends_with_the_same_values_on_both_ranks(tmp_path: Path) -> None:
    done = torchrun(tmp_path, script())
    assert done.returncode == 0, done.stderr
    one, other = (next(tmp_path.glob(f"logs/*/*/{i}/stdout.log")).read_text().split() for i in range(2))
    assert one[0] == "0" and other[0] == "1" and one[1:] == other[1:]
    lr, loss = map(float, one[1:])
    assert lr > 1e-4 and loss < 0.1  # it began at 1e-5; the variance of y is 0.4


def test_a_rank_that_raises_in_val_loss_ends_the_job(tmp_path: Path) -> None:
    dying = "    if optimizer.state and rank == 1:\n        raise FileNotFoundError('no validation data')\n"
    code = script().replace("def val_loss():\n", "def val_loss():\n" + dying)
    done = torchrun(tmp_path, code)
    assert done.returncode != 0 and "no validation data" in done.stderr
