"""Check hypergrad on a GPU, in two commands that each end within five minutes and keep what they have if stopped.

bash scripts/gpu_check.sh correct
bash scripts/gpu_check.sh speed
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import torch

from experiments import results
from experiments.arguments import arg, command, parse
from experiments.gpu_check import correct, speed
from experiments.gpu_check.rows import Check, Place, Row, run


@dataclass
class Args:
    """Check on a GPU that hypergrad is right there (correct), or measure what it costs there (speed)."""

    seconds: float = arg(0.0, "after so many no further check begins; 0: 150 for correct, 200 for speed")
    device: str = arg("cuda", "cuda, or cpu for a test of the machinery")
    out: str = arg("experiments/results", "folder of gpu_correct.json and gpu_speed.json")
    quick: bool = arg(False, "tiny sizes: a test of the machinery")


class Tier:
    """The checks of one command, most valuable first, and its time."""

    def __init__(self, checks: dict[str, Check], seconds: float):
        self.checks, self.seconds = checks, seconds


TIERS = {"correct": Tier(correct.CHECKS, 150), "speed": Tier(speed.CHECKS, 200)}


def main(names: tuple[str, ...], args: Args) -> list[Row]:
    """Run the named tiers, all where none is named. Leaves with status 1 where a check failed."""
    for name in names:
        if name not in TIERS:
            raise SystemExit(f"gpu_check: unknown {name!r}; choose from {', '.join(TIERS)}")
    place = Place(args.device, args.quick)
    if place.cuda and not torch.cuda.is_available():
        print("gpu_check: no GPU that torch can use on this machine, so nothing was checked.")
        return []
    os.environ.setdefault(
        "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
    )  # read when CUDA starts; replays are compared bit for bit
    rows: list[Row] = []
    for name in names or tuple(TIERS):
        words = command(args).replace("gpu_check.__main__", f"gpu_check {name}")
        path = Path(args.out, f"gpu_{name}.json")

        def save(done: list[Row], path: Path = path, words: str = words) -> None:
            results.write(path, words, done, args.device)

        tier = TIERS[name]
        found = run(tier.checks, place, args.seconds or tier.seconds, save)
        count = {passed: sum(row["passed"] is passed for row in found) for passed in (True, False, None)}
        print(f"gpu_check {name}: {count[True]} passed, {count[False]} failed, {count[None]} not run; {path}")
        rows += found
    if any(row["passed"] is False for row in rows):
        raise SystemExit(1)
    return rows


if __name__ == "__main__":
    tiers = tuple(takewhile(lambda word: not word.startswith("-"), sys.argv[1:]))
    main(tiers, parse(Args, sys.argv[1 + len(tiers) :]))
