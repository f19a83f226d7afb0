"""A GAN: two optimizers, two losses, of which one rises where the other falls.

    python -m experiments.gan [--seeds 5] [--quick]

Eight Gaussians on a ring (radius 1, standard deviation 0.05), generator 2-64-64-2 and discriminator 2-64-64-1, the
non-saturating losses of Goodfellow et al. (2014), Adam with betas (0.5, 0.999), batches of 128. The discriminator takes one or
five steps for each of the generator's, of which there are 400. The tuner is given both optimizers and the energy distance between
generated points and held-out ones as its validation loss, and the number of the discriminator's steps as total_steps (method
"tuned") or none ("open"); lr of both is tuned, from 1e-4 or from 2e-3.

`distance` is the energy distance between 2,000 generated points and 2,000 of the ring that nothing else has seen, after the last
step: 0 for equal distributions, about 0.7 for an untrained generator. `ratio` is that over the mean of plain runs at 2e-3.
`passed_over` are steps that the tuner dropped.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

import hypergrad
from experiments import results
from experiments.arguments import arg, command, parse
from experiments.sweep import sweep

PLAIN = 2e-3
STARTS = (1e-4, 2e-3)
TURNS = (1, 5)


@dataclass
class Args:
    """Plain and tuned runs of a small GAN. Finished runs are kept; call it again to go on."""

    seeds: int = arg(5, "runs of each kind", quick=1)
    seed: int = arg(0, "first seed; the next ones count up from it")
    steps: int = arg(400, "of the generator", quick=40)
    jobs: int = arg(os.cpu_count() or 1, "processes, each with one thread")
    out: str = arg("runs/gan", "folder of finished runs and result", quick="runs/gan_quick")
    quick: bool = arg(False, "one run of each kind, ten times shorter: a test of the machinery, under a minute")


def ring(n: int, generator: torch.Generator | None = None) -> Tensor:
    """n points of the eight Gaussians [n, 2]."""
    angle = torch.randint(8, (n,), generator=generator) * (math.pi / 4)
    return torch.stack([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(n, 2, generator=generator)


def energy_distance(x: Tensor, y: Tensor) -> Tensor:
    """2 E|x − y| − E|x − x'| − E|y − y'| over pairs of different points of x [n, d] and y [m, d]."""

    def within(z: Tensor) -> Tensor:
        return torch.pdist(z).mean()

    return 2 * torch.cdist(x, y).mean() - within(x) - within(y)


class GAN(nn.Module):
    """A generator and a discriminator."""

    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
        self.d = nn.Sequential(
            nn.Linear(2, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1)
        )

    def loss_d(self, real: Tensor) -> Tensor:
        fake = self.g(torch.randn(len(real), 2)).detach()
        return softplus(-self.d(real)).mean() + softplus(self.d(fake)).mean()

    def loss_g(self, n: int) -> Tensor:
        return softplus(-self.d(self.g(torch.randn(n, 2)))).mean()


def fit(seed: int, start: float, turns: int, steps: int, tuned: bool, **options: Any) -> tuple[GAN, dict[str, Any]]:
    """Train once; returns the nets, and what the run ended in.

    Args:
        start: lr of both.
        turns: the discriminator's steps for one of the generator's.
        options: arguments of `hypergrad.Tuner`.
    """
    torch.manual_seed(seed)
    model = GAN()
    opt_d, opt_g = (torch.optim.Adam(net.parameters(), lr=start, betas=(0.5, 0.999)) for net in (model.d, model.g))
    held_out = ring(512, torch.Generator().manual_seed(10**6 + seed))

    def val_loss() -> Tensor:
        return energy_distance(model.g(torch.randn(512, 2)), held_out)

    options = {"total_steps": steps * turns} | options
    tuner = hypergrad.Tuner(model, [opt_d, opt_g], val_loss, tune=("lr",), **options) if tuned else None
    backward, began = (tuner.backward if tuner else Tensor.backward), time.perf_counter()
    for _ in range(steps):
        for _ in range(turns):
            opt_d.zero_grad()
            backward(model.loss_d(ring(128)))
            opt_d.step()
        opt_g.zero_grad()
        backward(model.loss_g(128))
        opt_g.step()
    row: dict[str, Any] = {"seconds": round(time.perf_counter() - began, 3)}
    fresh = torch.Generator().manual_seed(2 * 10**6 + seed)
    with torch.no_grad():
        made = model.g(torch.randn(2000, 2, generator=fresh))
        row["distance"] = float(energy_distance(made, ring(2000, fresh)))
    lr_d, lr_g = tuner.values["lr"].tolist() if tuner else (start, start)
    stats = tuner.stats if tuner else {}
    row |= {
        "lr_d": lr_d,
        "lr_g": lr_g,
        "rollbacks": stats.get("rollbacks", 0),
        "backtracks": stats.get("backtracks", 0),
    }
    row["passed_over"] = stats.get("spikes", 0) + stats.get("nonfinite_steps", 0)
    if tuner:
        tuner.close()
    return model, row


def run(item: dict[str, Any]) -> dict[str, Any]:
    """One item of the sweep: its row is the item's own fields, then what was measured."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned, open_ = item["method"] != "plain", item["method"] == "open"
        options = {"total_steps": None} if open_ else {}
        _, row = fit(item["seed"], item["start"], item["turns"], item["steps"], tuned, **options)
    return item | row | {"diverged": not math.isfinite(row["distance"])}


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every row with its distance over the mean of the plain runs with as many turns."""
    out = []
    for row in rows:
        plain = [r["distance"] for r in rows if r["method"] == "plain" and r["turns"] == row["turns"]]
        out.append(row | {"ratio": row["distance"] / fmean(plain)})
    return out


def main(args: Args) -> list[dict[str, Any]]:
    kinds = [("plain", PLAIN), *((method, start) for method in ("tuned", "open") for start in STARTS)]
    items = [
        {"method": method, "start": start, "turns": turns, "seed": seed, "steps": args.steps}
        for method, start in kinds
        for turns in TURNS
        for seed in range(args.seed, args.seed + args.seeds)
    ]
    out = Path(args.out)
    rows = with_ratios(sweep(run, items, out / "gan.jsonl", args.jobs))
    for method, start in kinds:
        for turns in TURNS:
            mine = [r for r in rows if (r["method"], r["start"], r["turns"]) == (method, start, turns)]
            print(
                f"{method:6} from {start:g}, {turns} to 1: distance {fmean(r['distance'] for r in mine):.4f}, ratio "
                f"{fmean(r['ratio'] for r in mine):.2f}, passed over {fmean(r['passed_over'] for r in mine):.0f}"
            )
    results.write(out / "gan.json", command(args), rows)
    return rows


if __name__ == "__main__":
    main(parse(Args))
