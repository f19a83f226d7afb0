"""Does a tuned training last? Memory over very many steps, and trainings that are killed at random moments.

    python -m experiments.soak [--steps 100000] [--kills 50] [--quick]

memory   a small net is tuned for `steps` steps; resident memory is read every hundredth of them. From the second half: its
         slope by least squares, in bytes a step, and the standard error of that
kills    a training writes a checkpoint (model, optimizer, scheduler, tuner, random numbers) every few steps, and is killed by
         SIGKILL at random moments, `kills` times; each time it goes on from its last checkpoint. At the end weights, values and
         counts are compared, bit for bit, with those of a training that nothing stopped
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import hypergrad
from experiments import results
from experiments.arguments import arg, command, parse

Row = dict[str, Any]
EVERY = 25  # steps between checkpoints


@dataclass
class Args:
    """Train for very many steps, and kill trainings."""

    steps: int = arg(100_000, "training steps of the run whose memory is watched", quick=400)
    kills: int = arg(50, "how often a training is killed", quick=2)
    seed: int = arg(0, "of the moments")
    child: str = arg("", "folder of the training that is to be killed: for this script's own use")
    out: str = arg("runs/soak", "folder of the result", quick="runs/soak_quick")
    quick: bool = arg(False, "few steps and kills: a test of the machinery")


class Training:
    """A small net on drawn data, tuned; its whole state can be saved and loaded.

    Args:
        steps: known to the tuner.
    """

    def __init__(self, steps: int):
        torch.manual_seed(0)
        self.x, self.y = torch.randn(512, 8), torch.randn(512, 1)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        self.tuner = hypergrad.Tuner(self.model, self.optimizer, self.val_loss, total_steps=steps, cost=None)
        self.t = 0

    def loss(self, rows: Tensor) -> Tensor:
        return (self.model(self.x[rows]) - self.y[rows]).square().mean()

    def val_loss(self) -> Tensor:
        return self.loss(torch.randint(256, 512, (64,)))

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.tuner.backward(self.loss(torch.randint(0, 256, (32,))))
        self.optimizer.step()
        self.scheduler.step()
        self.t += 1

    @property
    def parts(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler, "tuner": self.tuner}

    def save(self, path: Path) -> None:
        """In one move: a kill leaves the old file or the new one."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        torch.save(state | {"t": self.t, "rng": torch.get_rng_state()}, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.t = state["t"]
        torch.set_rng_state(state["rng"])

    def ends(self) -> Row:
        """What two trainings are compared by."""
        weights = torch.cat([p.detach().flatten() for p in self.model.parameters()]).tolist()
        return {"weights": weights, "values": {k: x.tolist() for k, x in self.tuner.values.items()}, **self.tuner.stats}


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def memory(steps: int) -> Row:
    training, at, seen = Training(steps), [], []
    for t in range(steps):
        training.step()
        if (t + 1) % max(steps // 100, 1) == 0:
            at.append(t + 1)
            seen.append(resident())
    x, y = np.array(at[len(at) // 2 :], float), np.array(seen[len(seen) // 2 :], float)
    away = x - x.mean()
    slope = float(away @ y / (away @ away))
    off = y - y.mean() - slope * away
    error = float(np.sqrt(off @ off / (len(x) - 2) / (away @ away)))
    return {
        "kind": "memory", "steps": steps, "bytes": seen[-1], "bytes_a_step": slope, "standard_error": error,
        "growth_in_the_run": seen[-1] - seen[0], "val_loss": training.tuner.val_loss,
    }  # fmt: skip


def child(folder: Path, steps: int) -> None:
    """The training that is killed: from its checkpoint, if there is one, to the end, or until it is killed."""
    training, path = Training(steps), folder / "checkpoint.pt"
    if path.exists():
        training.load(path)
    (folder / "begun").touch()
    while training.t < steps:
        training.step()
        if training.t % EVERY == 0:
            training.save(path)
        time.sleep(0.002)  # so that a run is long enough to be killed so often
    torch.save(training.ends(), folder / "ends.pt")


def kills(count: int, seed: int) -> Row:
    steps, draw, done, kept = 60 * max(count, 5), random.Random(seed), 0, []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path, begun = folder / "checkpoint.pt", folder / "begun"
        while not (folder / "ends.pt").exists():
            begun.unlink(missing_ok=True)
            words = [sys.executable, "-m", "experiments.soak", "--child", name, "--steps", str(steps)]
            process = subprocess.Popen(words, env=os.environ | {"OMP_NUM_THREADS": "1"})
            if done < count:
                while not begun.exists() and process.poll() is None:
                    time.sleep(0.005)
                time.sleep(draw.uniform(0.0, 0.3))
                process.send_signal(signal.SIGKILL)
                done += process.wait() == -signal.SIGKILL
                kept.append(int(torch.load(path, weights_only=True)["t"]) if path.exists() else 0)
            elif process.wait():
                raise RuntimeError(f"the training ended with {process.returncode}.")
        found = torch.load(folder / "ends.pt", weights_only=True)
    whole = Training(steps)
    for _ in range(steps):
        whole.step()
    return {
        "kind": "kills", "steps": steps, "killed": done, "checkpoints_lost": sum(b < a for a, b in pairwise(kept)),
        "equal": found == whole.ends(), "first_kept": kept[0] if kept else 0, "last_kept": kept[-1] if kept else 0,
    }  # fmt: skip


def main(args: Args) -> None:
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if args.child:
            child(Path(args.child), args.steps)
            return
        rows = [kills(args.kills, args.seed), memory(args.steps)]
    results.write(Path(args.out) / "soak.json", command(args), rows)
    for row in rows:
        print(", ".join(f"{name} {x}" for name, x in row.items()))


if __name__ == "__main__":
    main(parse(Args))
