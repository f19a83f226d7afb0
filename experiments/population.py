"""Many small models at once: seconds of training them together over one by one.

    python -m experiments.population [--device cuda] [--quick]

An MLP 20-32-1 on batches of 64, SGD with momentum; `tuned`: lr and weight decay are tuned along. One by one is torch's own loop,
and where they are tuned a population of one, member after member. Medians of interleaved repeats.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import mse_loss

import hypergrad
from experiments import results
from experiments.arguments import arg, command, parse


@dataclass
class Args:
    """Speed of a population against its members one by one."""

    members: tuple = arg((1, 4, 16, 64), "sizes of the population", quick=(1, 2))
    steps: int = arg(20, "training steps", quick=2)
    repeats: int = arg(5, "interleaved repeats", quick=1)
    device: str = arg("cpu", "cpu or cuda")
    out: str = arg("runs/population", "folder of the result", quick="runs/population_quick")
    quick: bool = arg(False, "two small populations: a test of the machinery")


def members(count: int, device: str) -> tuple[list[nn.Module], list[torch.optim.Optimizer]]:
    torch.manual_seed(0)
    models: list[nn.Module] = [
        nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 1)).to(device) for _ in range(count)
    ]
    return models, [torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-3) for m in models]


def measure(args: Args, count: int, tuned: bool) -> dict[str, Any]:
    x, y = (torch.randn(args.steps + 1, 64, n, device=args.device) for n in (20, 1))

    def loss(model: nn.Module, batch: int) -> torch.Tensor:
        return mse_loss(model(x[batch]), y[batch])

    def population(models: list[nn.Module], optimizers: list[torch.optim.Optimizer]) -> None:
        tune = ("lr", "weight_decay") if tuned else ()
        both = hypergrad.Population(models, optimizers, loss, lambda model: loss(model, -1), tune)
        for t in range(args.steps):
            both.step(t)

    def one_by_one(models: list[nn.Module], optimizers: list[torch.optim.Optimizer]) -> None:
        for model, optimizer in zip(models, optimizers, strict=True):
            if tuned:
                population([model], [optimizer])
                continue
            for t in range(args.steps):
                optimizer.zero_grad()
                loss(model, t).backward()
                optimizer.step()

    def seconds(train: Callable[..., None]) -> float:
        fresh = members(count, args.device)
        if args.device.startswith("cuda"):
            torch.cuda.synchronize()
        start = time.perf_counter()
        train(*fresh)
        if args.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds(population)  # first calls are slow
    seconds(one_by_one)
    pairs = [(seconds(population), seconds(one_by_one)) for _ in range(args.repeats)]
    together, alone = (statistics.median(times) for times in zip(*pairs, strict=True))
    speed = statistics.median(b / a for a, b in pairs)
    row = {"members": count, "tuned": tuned, "steps": args.steps, "repeats": args.repeats}
    return row | {"seconds_together": together, "seconds_one_by_one": alone, "speed": speed}


def main(args: Args) -> list[dict[str, Any]]:
    if min(*args.members, args.steps, args.repeats) < 1:
        raise SystemExit("--members, --steps and --repeats are at least 1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = [measure(args, count, tuned) for tuned in (False, True) for count in args.members]
    finally:
        torch.set_num_threads(threads)
    results.write(Path(args.out, "population.json"), command(args), rows, args.device, one_line_a_row=True)
    for row in rows:
        print(f"{row['members']:>4} members, {'tuned' if row['tuned'] else 'plain':<6}{row['speed']:>7.2f}x")
    return rows


if __name__ == "__main__":
    main(parse(Args))
