"""The hypergradient of a whole training run: 10,000 AdamW steps of an MLP on Fashion-MNIST, every lr_t and weight decay among it.

    python -m experiments.long_run [--device cuda] [--quick]

Three processes: a plain run of all steps (torch.optim), and hypergradients over a tenth of them and over all, with snapshots
on disk. Each says the peak of its memory above that before the model was made, and its seconds. `long_run.json` has a row for
each, and their ratios; the time also of a tenth of the steps by turns in one process, a steadier ratio on a shared machine.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hypergrad
from experiments import datasets, results
from experiments.arguments import arg, command, parse
from experiments.bench_modes import KEPT, MIB, RETURNED, clock, peak

Row = dict[str, Any]
BATCH = 128


@dataclass
class Args:
    """Time, memory and diagnosis of hypergradients of long runs."""

    steps: int = arg(10_000, "training steps of the run", quick=40)
    width: int = arg(256, "hidden units of each of the two layers", quick=32)
    lr: float = arg(1e-3, "learning rate, decaying linearly to zero")
    weight_decay: float = arg(0.01, "weight decay of AdamW")
    offload: str = arg("disk", "where snapshots go: disk, host, or none")
    rounds: int = arg(5, "rounds of a tenth of the steps, plain and differentiated by turns", quick=1)
    device: str = arg("cpu", "cpu or cuda")
    data_dir: str = arg(None, "folder of the set's IDX files (default: a cache, Debian's package, download)")
    one: str = arg("", "run one of plain, short, whole here and print what it took; no result file")
    out: str = arg("runs/long_run", "folder of long_run.json", quick="runs/long_run_quick")
    quick: bool = arg(False, "a few steps of a small model: a test of the machinery")


class Batches:
    """Batch t, drawn by a generator seeded with t: nothing of it is kept."""

    def __init__(self, split: datasets.Split, steps: int):
        self.split, self.steps = split, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, t: int) -> tuple[Tensor, Tensor]:
        index = torch.randint(len(self.split.y), (BATCH,), generator=torch.Generator().manual_seed(t))
        return self.split.x[index], self.split.y[index]


class Work:
    """The model, its optimizer and its losses."""

    def __init__(self, args: Args, data: datasets.Data):
        torch.manual_seed(0)
        hidden = args.width
        layers = nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 10)
        self.model, self.data, self.args = nn.Sequential(*layers).to(args.device), data, args
        self.start = {name: x.clone() for name, x in self.model.state_dict().items()}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=args.lr, weight_decay=args.weight_decay)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(model(batch[0]), batch[1])

    def val_loss(self) -> Tensor:
        return cross_entropy(self.model(self.data.val.x[:2000]), self.data.val.y[:2000])

    def plain(self, steps: int) -> Row:
        self.model.load_state_dict(self.start)
        self.optimizer.state.clear()
        for t, batch in ((t, Batches(self.data.train, steps)[t]) for t in range(steps)):
            self.optimizer.param_groups[0]["lr"] = self.args.lr * (1 - t / steps)
            self.optimizer.zero_grad()
            self.loss(self.model, batch).backward()
            self.optimizer.step()
        return {"val_loss": float(self.val_loss())}

    def differentiated(self, steps: int) -> Row:
        self.model.load_state_dict(self.start)
        self.optimizer.state.clear()
        found = hypergrad.hypergradient(
            self.model,
            self.optimizer,
            self.loss,
            Batches(self.data.train, steps),  # type: ignore[arg-type]
            self.val_loss,
            wrt=("lr", "weight_decay"),
            schedules={"lr": lambda t, _: self.args.lr * (1 - t / steps)},
            per_step=True,
            offload=None if self.args.offload == "none" else self.args.offload,
        )
        keys = "growth_rate", "nonfinite_share", "replayed_exactly", "replay_mismatch", "gradient_evaluations"
        stats = {key: found.stats[key] for key in keys} | {"warnings": " ".join(found.stats["warnings"])}
        sums = {f"d_{name}": float(x.sum()) for name, x in found.gradients.items()}
        return {"val_loss": float(found.value)} | sums | stats


KINDS: dict[str, Callable[[Work, int], Row]] = {
    "plain": lambda work, steps: work.plain(steps),
    "short": lambda work, steps: work.differentiated(steps // 10),
    "whole": lambda work, steps: work.differentiated(steps),
}


def one(args: Args) -> Row:
    """One run here: its seconds and the growth of the peak."""
    data = datasets.fashion_mnist(args.data_dir).to(args.device)
    warm = Work(args, data)  # torch loads code when it is first used
    warm.plain(3)
    warm.differentiated(3)
    del warm
    before, began = peak(args.device, reset=True), clock(args.device)
    row = KINDS[args.one](Work(args, data), args.steps)
    spent = clock(args.device) - began
    steps = args.steps // 10 if args.one == "short" else args.steps
    memory = (peak(args.device) - before) / MIB
    return {"run": args.one, "steps": steps, "seconds": round(spent, 2), "memory_mib": round(memory, 1)} | row


def by_turns(args: Args) -> list[float]:
    """(seconds differentiated) / (seconds plain) of a tenth of the steps, in turn."""
    work, ratios, steps = Work(args, datasets.fashion_mnist(args.data_dir).to(args.device)), [], args.steps // 10
    for turn in range(args.rounds + 1):
        marks = [clock(args.device)]
        for run in (work.plain, work.differentiated):
            run(steps)
            marks.append(clock(args.device))
        if turn:  # the first warms up
            ratios.append((marks[2] - marks[1]) / (marks[1] - marks[0]))
    return ratios


def in_a_process(args: Args, kind: str, environment: dict[str, str]) -> Row:
    words = []
    for name in ("steps", "width", "lr", "weight_decay", "offload", "rounds", "device", "data_dir"):
        value = getattr(args, name)
        words += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    call = [sys.executable, "-m", "experiments.long_run", *words, "--one", kind]
    done = subprocess.run(call, env=os.environ | environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main(args: Args) -> list[Row]:
    torch.set_num_threads(1)
    if args.one:
        row = {"ratios": by_turns(args)} if args.one == "turns" else one(args)
        print(json.dumps(row))
        return [row]
    rows = []
    for kind in KINDS:
        began = time.perf_counter()
        rows.append(in_a_process(args, kind, RETURNED))
        print(f"{rows[-1]}  ({time.perf_counter() - began:.0f} s)", flush=True)
    plain, short, whole = rows
    ratios = in_a_process(args, "turns", KEPT)["ratios"]
    summary = {
        "run": "ratios",
        "time_by_turns": round(statistics.median(ratios), 2),
        "time_whole": round(whole["seconds"] / plain["seconds"], 2),
        "memory": round(whole["memory_mib"] / plain["memory_mib"], 2),
        "memory_whole_over_short": round(whole["memory_mib"] / short["memory_mib"], 2),
    }
    print(summary)
    results.write(Path(args.out, "long_run.json"), command(args), [*rows, summary], args.device)
    return [*rows, summary]


if __name__ == "__main__":
    main(parse(Args))
