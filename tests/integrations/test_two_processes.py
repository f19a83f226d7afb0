"""Frameworks on two processes: both ranks end with the same bits, where one process on whole batches does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.integrations import runs

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parent / "one_rank.py"


@pytest.mark.parametrize("kind", ["lightning", "accelerate", "transformers"])
def test_two_ranks_train_as_one_process_on_whole_batches(kind: str, tmp_path: Path) -> None:
    pytest.importorskip(kind)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    ended = subprocess.run([*command, kind, str(tmp_path)], capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in "01")
    assert one == other and len(one["used"]) == runs.STEPS
    plain = runs.plain(runs.Job(scheduled=kind != "accelerate"))
    assert one["used"] == pytest.approx(plain.used, rel=1e-3)  # float32: sums in another order
    weights = torch.cat([w.flatten() for w in plain.weights])
    assert torch.allclose(torch.tensor(one["weights"]), weights, rtol=1e-2, atol=1e-4)
    assert one["stats"]["hyper_steps"] == plain.tuner.stats["hyper_steps"] > 0
