"""Fashion-MNIST from a hundred blind starts: the protocol of Clarke et al., ICLR 2022 (arXiv 2110.10461), section 4.2.

    python -m experiments.fashion_mnist [--starts 100] [--methods untuned tuned] [--quick]

An MLP 784-50-10 is trained by SGD for 10,000 steps of 50 images from a random learning rate, weight decay and momentum.
Each start is one row: how the same start ends untuned, and tuned by hypergrad while it trains; `--methods clarke` is the
protocol's own method (clarke.py). `test_loss` is the
cross-entropy on the whole test set, at the model's own weights after the last step.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hypergrad
from experiments import datasets, flops, results
from experiments.arguments import arg, command, parse
from experiments.clarke import LookBack
from experiments.sweep import sweep

METHODS: dict[str, dict[str, Any]] = {
    "untuned": {},
    "untuned_decay": {"decay": True},
    "tuned": {"tune": ("lr", "weight_decay")},
    "tuned_lr": {"tune": ("lr",)},
    "tuned_momentum": {"tune": ("lr", "weight_decay", "momentum")},
    "clarke": {"look_back": ("lr", "weight_decay")},
    "clarke_momentum": {"look_back": ("lr", "weight_decay", "momentum")},
}
BATCH, VAL_BATCH = 50, 250


@dataclass
class Args:
    """Fashion-MNIST from random starts, untuned and tuned online. Finished starts are kept; call it again to go on."""

    methods: tuple = arg(("untuned", "untuned_decay", "tuned"), f"any of {', '.join(METHODS)}")
    starts: int = arg(16, "random starts of each method", quick=1)
    seed: int = arg(0, "seed of the first start; the next ones count up from it")
    steps: int = arg(10_000, "training steps of one run", quick=200)
    jobs: int = arg(os.cpu_count() or 1, "processes, each with one thread")
    device: str = arg("cpu", "where to train: cpu or cuda")
    data_dir: str = arg(None, "folder of the set's IDX files (default: a cache, Debian's package, download)")
    out: str = arg("runs/fashion_mnist", "folder of finished starts and result", quick="runs/fashion_mnist_quick")
    quick: bool = arg(False, "one short start of each method: a test of the machinery, under a minute")


def start(seed: int) -> dict[str, Any]:
    """The protocol's distribution of starts."""
    rng = np.random.default_rng(seed)
    return {
        "lr": float(10 ** rng.uniform(-6, -1)),
        "weight_decay": float(10 ** rng.uniform(-7, -2)),
        "momentum": float(rng.uniform(0, 1)),
    }


def fit(data: datasets.Data, method: str, seed: int, steps: int) -> tuple[nn.Module, dict[str, Any]]:
    """Train once; returns the model, and what the run was and cost."""
    options, hyper = METHODS[method], start(seed)
    device = data.train.x.device
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(data.train.x.shape[1], 50), nn.ReLU(), nn.Linear(50, 10)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), **hyper)
    draws = torch.Generator(device).manual_seed(seed)

    def val_loss() -> Tensor:
        picked = torch.randint(len(data.val.y), (VAL_BATCH,), generator=draws, device=device)
        return cross_entropy(model(data.val.x[picked]), data.val.y[picked])

    def training_loss(model: nn.Module, batch: Tensor) -> Tensor:
        return cross_entropy(model(data.train.x[batch]), data.train.y[batch])

    tuner = scheduler = rival = None
    if "tune" in options:
        tuner = hypergrad.Tuner(
            model, optimizer, val_loss, tune=options["tune"], total_steps=steps, every=10, hyper_lr=0.1, seed=seed
        )
    elif "look_back" in options:
        rival = LookBack(model, optimizer, training_loss, val_loss, tune=options["look_back"], seed=seed)
    elif options.get("decay"):
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    backward = tuner.backward if tuner else Tensor.backward

    began, per_epoch = time.perf_counter(), len(data.train.y) // BATCH
    order = torch.empty(0)
    for step in range(steps):
        at = step % per_epoch * BATCH
        if at == 0:
            order = torch.randperm(len(data.train.y), device=device)
        batch = order[at : at + BATCH]
        if rival:
            rival.look(batch)
        loss = training_loss(model, batch)
        optimizer.zero_grad()
        backward(loss)
        optimizer.step()
        if rival:
            rival.move()
        if scheduler:
            scheduler.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)

    row: dict[str, Any] = {f"start_{name}": value for name, value in hyper.items()}
    tuning = tuner or rival
    ended = {name: values.item() for name, values in tuning.values.items()} if tuning else {}
    row |= {f"end_{name}": ended.get(name, value) for name, value in hyper.items()}
    row["gradient_evaluations"] = flops.gradient_evaluations(tuning.stats) if tuning else steps
    row["seconds"] = round(time.perf_counter() - began, 3)
    if tuner:
        tuner.close()
    return model, row


@torch.no_grad()
def whole_loss(model: nn.Module, split: datasets.Split) -> float:
    """Mean cross-entropy of all of ``split`` at the model's own weights."""
    return cross_entropy(model(split.x), split.y).item()


@cache
def load(data_dir: str | None, device: str) -> datasets.Data:
    return datasets.fashion_mnist(data_dir).to(device)


@cache
def flops_ratio(method: str, steps: int, data_dir: str | None, device: str) -> float:
    """FLOPs of a tuned run over those of the plain one; see flops.whole_run."""
    if not {"tune", "look_back"} & METHODS[method].keys():
        return 1.0
    data = load(data_dir, device)
    tuned, plain = (flops.whole_run(partial(fit, data, name, 0), steps) for name in (method, "untuned"))
    return tuned / plain


def run(item: dict[str, Any], data_dir: str | None) -> dict[str, Any]:
    """One item of the sweep: its row is the item's own fields, then what was measured."""
    data = load(data_dir, item["device"])
    model, row = fit(data, item["method"], item["seed"], item["steps"])
    row |= {"val_loss": whole_loss(model, data.val), "test_loss": (test_loss := whole_loss(model, data.test))}
    row = item | row | {"diverged": not math.isfinite(test_loss)}
    return row | {"flops_ratio": flops_ratio(item["method"], item["steps"], data_dir, item["device"])}


def main(args: Args) -> list[dict[str, Any]]:
    unknown = [name for name in args.methods if name not in METHODS]
    if unknown:
        raise SystemExit(f"--methods: unknown {', '.join(unknown)}; choose from {', '.join(METHODS)}")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("--device cuda: this machine has no GPU that torch can use; leave --device away")
    if min(args.starts, args.steps, args.jobs) < 1:
        raise SystemExit("--starts, --steps and --jobs are at least 1")
    try:
        datasets.find_fashion_mnist(args.data_dir)
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from None

    todo = [
        {"method": method, "seed": seed, "steps": args.steps, "device": args.device}
        for seed in range(args.seed, args.seed + args.starts)
        for method in args.methods
    ]
    out, jobs = Path(args.out), min(args.jobs, len(todo))
    rows = sweep(partial(run, data_dir=args.data_dir), todo, out / "fashion_mnist.jsonl", jobs)
    rows.sort(key=lambda row: (row["method"], row["seed"], row["steps"]))
    results.write(out / "fashion_mnist.json", command(args), rows, args.device)

    print(f"\n{'method':<16}{'runs':>6}{'test loss: mean':>18}{'median':>9}{'best':>9}{'worst':>9}{'flops':>8}")
    for method in args.methods:
        own = [row for row in rows if row["method"] == method and row["steps"] == args.steps]
        ended = sorted(row["test_loss"] for row in own if not row["diverged"]) or [math.nan]
        print(
            f"{method:<16}{len(own):>6}{np.mean(ended):>18.4g}{np.median(ended):>9.4g}{ended[0]:>9.4g}{ended[-1]:>9.4g}"
            f"{own[0]['flops_ratio']:>7.2f}x"
        )
    print(f"\n{sum(row['diverged'] for row in rows)} diverged (left out of the means). {out / 'fashion_mnist.json'}")
    return rows


if __name__ == "__main__":
    main(parse(Args))
