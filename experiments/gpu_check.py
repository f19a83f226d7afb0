"""Everything that must run on CUDA: the case table, the commands, and live loops under the ways GPUs are used.

bash scripts/gpu_check.sh [--data-dir DIR]
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import hypergrad
from experiments import datasets, results
from experiments.arguments import arg, command, parse


@dataclass
class Args:
    """Run the case table, the quickstart, the experiment and live loops on CUDA."""

    data_dir: str = arg(None, "folder of Fashion-MNIST's IDX files; where the set is nowhere, made-up images stand in")
    out: str = arg("experiments/results", "folder of gpu_check.json")
    steps: int = arg(100, "training steps of each live loop", quick=20)
    quick: bool = arg(False, "short loops, and no case table")


# How a loop is run: automatic mixed precision, a GradScaler, torch's fused kernels.
LOOPS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bf16 autocast": {"autocast": torch.bfloat16},
    "fp16 autocast, GradScaler": {"autocast": torch.float16, "scaler": True},
    "fused AdamW": {"fused": True},
    "bf16 autocast, fused AdamW": {"autocast": torch.bfloat16, "fused": True},
    "fp16 autocast, GradScaler, fused AdamW": {"autocast": torch.float16, "scaler": True, "fused": True},
}


def live_loop(device: str, steps: int, autocast: torch.dtype | None = None, scaler: bool = False, fused: bool = False):
    """A user's loop; returns what happened as a line, and raises where training or tuning did not happen."""
    torch.manual_seed(0)
    data = datasets.digits().to(device)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=1e-4, fused=fused)
    grad_scaler = torch.amp.GradScaler(device) if scaler else None

    def loss_of(split: datasets.Split) -> torch.Tensor:
        with torch.autocast(torch.device(device).type, autocast or torch.bfloat16, enabled=autocast is not None):
            return cross_entropy(model(split.x), split.y)

    tuner = hypergrad.Tuner(
        model, optimizer, lambda: loss_of(data.val), tune=("lr", "weight_decay"), total_steps=steps, scaler=grad_scaler
    )
    before = loss_of(data.val).item()
    for _ in range(steps):
        loss = loss_of(data.train)
        optimizer.zero_grad()
        if grad_scaler:
            tuner.backward(grad_scaler.scale(loss))
            grad_scaler.step(optimizer)
            grad_scaler.update()
        else:
            tuner.backward(loss)
            optimizer.step()
    after, lr = loss_of(data.val).item(), tuner.values["lr"].item()
    tuner.close()
    line = f"validation loss {before:.3f} to {after:.3f}, lr 1e-4 to {lr:.2g}"
    if not (math.isfinite(after) and after < before and lr != 1e-4):
        raise AssertionError(line)
    return line


def shell(*words: str, **environment: str) -> str:
    """Run this Python with ``words``; the last line it printed, or an error with the last ones."""
    done = subprocess.run(
        [sys.executable, *words], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    lines = (done.stdout + done.stderr).strip().splitlines()
    if done.returncode:
        raise AssertionError(" / ".join(lines[-3:]))
    return lines[-1] if lines else ""


def main(args: Args) -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        print("gpu_check: no GPU that torch can use on this machine, so nothing was checked.")
        return []
    with tempfile.TemporaryDirectory() as folder:
        images = args.data_dir or _images(folder)
        quick = ("--quick", "--device", "cuda", "--out", folder)
        checks = {
            "quickstart --quick": lambda: shell("-m", "experiments.quickstart", *quick),
            "fashion_mnist --quick": lambda: shell("-m", "experiments.fashion_mnist", *quick, "--data-dir", images),
        }
        for name, options in LOOPS.items():
            checks[f"loop: {name}"] = lambda options=options: live_loop("cuda", args.steps, **options)
        if not args.quick:
            table = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests", "--ignore=tests/experiments")
            checks["case table"] = lambda: shell(*table, HYPERGRAD_DEVICE="cuda")
        rows = []
        for name, check in checks.items():
            began = time.perf_counter()
            try:
                passed, detail = True, check()
            except Exception as error:  # each failure is a row, and the next check runs
                passed, detail = False, f"{type(error).__name__}: {error}"
            seconds = round(time.perf_counter() - began, 1)
            detail = detail.replace(str(Path.cwd()), ".").replace(folder, "OUT")
            rows.append({"check": name, "passed": passed, "seconds": seconds, "detail": detail})
            print(f"{'passed' if passed else 'FAILED'}  {name} ({seconds} s): {detail}", flush=True)
    results.write(Path(args.out, "gpu_check.json"), command(args), rows, "cuda")
    failed = sum(not row["passed"] for row in rows)
    print(f"gpu_check: {len(rows) - failed} of {len(rows)} checks passed.")
    if failed:
        raise SystemExit(1)
    return rows


def _images(folder: str) -> str:
    try:
        return str(datasets.find_fashion_mnist(download=False))
    except FileNotFoundError:
        datasets.write_stand_in(Path(folder))
        return folder


if __name__ == "__main__":
    main(parse(Args))
