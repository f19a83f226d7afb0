"""A framework's run on one of two ranks, which torchrun starts: half of every batch; what was seen of it goes to a file.

python -m torch.distributed.run --standalone --nproc-per-node 2 tests/integrations/one_rank.py lightning FOLDER
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

import torch
from torch.utils.data import DataLoader, DistributedSampler

sys.path.insert(0, str(Path(__file__).parents[2]))

from hypergrad.online import tuner_parts
from tests.integrations import runs
from tests.unbounded import without_clock


def main(kind: str, folder: Path) -> None:
    torch.set_num_threads(1)
    tuner_parts.Calibration = without_clock  # type: ignore[assignment]
    warnings.simplefilter("ignore")
    runs.BATCH //= 2
    # accelerate lets a scheduler step once for every process
    rank, job = os.environ["RANK"], runs.Job(scheduled=kind != "accelerate")
    if kind == "lightning":
        # its own sampler shuffles
        rows = runs.train_set()
        sampler = DistributedSampler(rows, num_replicas=2, rank=int(rank), shuffle=False)
        runs.loader = lambda: DataLoader(rows, batch_size=runs.BATCH, sampler=sampler)
        runs.lightning(job, folder, devices=2, strategy="ddp", use_distributed_sampler=False)
    elif kind == "accelerate":
        runs.accelerate(job)
    else:
        runs.transformers(job, folder / rank)
    weights = torch.cat([w.flatten() for w in job.weights])
    seen = {"used": job.used, "weights": weights.tolist(), "stats": job.tuner.stats}
    (folder / f"{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
