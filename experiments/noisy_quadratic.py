"""The noisy quadratic of Wu et al., ICLR 2018 (arXiv 1803.02021): where short-sighted tuning of lr fails, and the best is known.

    python -m experiments.noisy_quadratic [--seeds 20] [--methods tuned untuned] [--quick]

θ in R^1000, curvatures h_i = i^−p, loss ½ Σ h_i θ_i². The loss of a batch is ½ Σ h_i (θ_i − c_i)² with c_i ~ N(0, s²/h_i): its
gradient is h_i θ_i plus noise of variance s² h_i, its Hessian is diag(h). θ starts in N(0, 1); T steps of plain SGD. A
hypergradient that looks a few steps ahead takes lr to where noise no longer moves the loss, far below what T steps need.

Each tuned run is one row: lr starts anywhere in log-uniform [1e-6, 10], the validation loss is a batch of its own, and no
curvature is told. `final_loss` is the noiseless ½ Σ h_i θ_i² after the last step. `ratio` is that over the best linear decay to
zero, whose expected final loss has a closed form (see `expected`), as a published constant lr has.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import hypergrad
from experiments import flops, results
from experiments.arguments import arg, command, parse
from experiments.sweep import sweep

DIM = 1000
METHODS: dict[str, dict[str, Any]] = {
    "untuned": {},  # lr stays at its start
    "best_decay": {"decay": True},  # the best linear decay itself, simulated from the same seeds
    "tuned": {"tune": ("lr",)},
}


class Quadratic(NamedTuple):
    """Curvatures i^−p, gradient noise of covariance s2·diag(h), T steps."""

    p: float
    s2: float
    T: int

    def __str__(self) -> str:
        return f"p={self.p:g}, s²={self.s2:g}, T={self.T}"


PROBLEMS = (
    Quadratic(1.0, 1.0, 500),
    Quadratic(1.0, 1.0, 2000),
    Quadratic(1.0, 1.0, 5000),
    Quadratic(0.5, 0.1, 2000),
    Quadratic(1.5, 1.0, 2000),
    Quadratic(1.0, 0.1, 2000),
)


@dataclass
class Args:
    """lr tuned online on six noisy quadratics, from any start. Finished runs are kept; call it again to go on."""

    methods: tuple = arg(("tuned",), f"any of {', '.join(METHODS)}")
    seeds: int = arg(20, "runs of each problem and method", quick=1)
    seed: int = arg(0, "first seed; the next ones count up from it")
    shorter: int = arg(1, "divide T of every problem by this number", quick=10)
    jobs: int = arg(os.cpu_count() or 1, "processes, each with one thread")
    out: str = arg("runs/noisy_quadratic", "folder of finished runs and result", quick="runs/noisy_quadratic_quick")
    quick: bool = arg(False, "one run of each problem, ten times shorter: a test of the machinery, under a minute")


# ---- what the best fixed settings reach


def curvatures(p: float) -> np.ndarray:
    return np.arange(1, DIM + 1, dtype=np.float64) ** -p


def linear_decay(t: int, total: int) -> float:
    return 1 - t / total


def expected(problem: Quadratic, lrs: Sequence[float], decay: bool) -> np.ndarray:
    """Expected final loss for each of ``lrs``, constant or decaying linearly to zero: E ½ Σ h_i θ_i² in closed form.

    A step θ ← θ − α (h θ + noise) takes E[θ²] to (1 − αh)² E[θ²] + α² h s², since the noise is independent of θ and has variance
    s² h; at the start E[θ²] = 1.
    """
    h, alpha = curvatures(problem.p), np.asarray(lrs, np.float64)[:, None]
    squares = np.ones((len(alpha), DIM))
    with np.errstate(over="ignore", invalid="ignore"):
        for t in range(problem.T):
            step = alpha * linear_decay(t, problem.T) if decay else alpha
            squares *= (1 - step * h) ** 2
            squares += step * step * (h * problem.s2)
        loss = 0.5 * squares @ h
    return np.where(np.isfinite(loss), loss, np.inf)


@cache
def best(problem: Quadratic, decay: bool) -> tuple[float, float]:
    """(lr, expected final loss) of the best constant lr, or the best linear decay: a grid over [1e-3, 10], refined three times.

    At p = 1, s² = 1, T = 2000 these are 0.495 and 0.287, as published, with nothing normalised.
    """
    lrs = np.geomspace(1e-3, 10, 33)
    for _ in range(4):
        losses = expected(problem, lrs.tolist(), decay)
        at = int(losses.argmin())
        found = float(lrs[at]), float(losses[at])
        lrs = np.geomspace(lrs[max(at - 1, 0)], lrs[min(at + 1, len(lrs) - 1)], 9)
    return found


# ---- runs


class Model(nn.Module):
    """θ, the losses of batches, and the loss itself. With c = s ε / √h a batch's loss is ½ |√h θ − s ε|², ε ~ N(0, 1)."""

    def __init__(self, problem: Quadratic):
        super().__init__()
        h = torch.from_numpy(curvatures(problem.p)).float()
        self.theta = nn.Parameter(torch.randn(DIM))
        self.h, self.root, self.s = h, h.sqrt(), math.sqrt(problem.s2)

    def forward(self) -> Tensor:
        """The loss of a batch, drawn from torch's global random numbers."""
        residual = self.root * self.theta - self.s * torch.randn(DIM)
        return 0.5 * residual.dot(residual)

    @torch.no_grad()
    def noiseless(self) -> float:
        return 0.5 * float((self.h.double() * self.theta.double() ** 2).sum())


def start(seed: int) -> float:
    """The learning rate that a run starts from: log-uniform in [1e-6, 10]."""
    return float(10 ** np.random.default_rng(seed).uniform(-6, 1))


def fit(
    problem: Quadratic, seed: int, start_lr: float, method: str = "tuned", **tuner_options: Any
) -> tuple[Model, dict[str, Any]]:
    """Train once from ``start_lr``; returns the model, and what the run ended in and cost.

    Args:
        method: a name in METHODS; "best_decay" decays from ``start_lr``.
        tuner_options: arguments of `hypergrad.Tuner` that are to differ from this experiment's.
    """
    torch.manual_seed(seed)
    model = Model(problem)
    optimizer = torch.optim.SGD(model.parameters(), lr=start_lr)
    group = optimizer.param_groups[0]
    tuner = None
    if "tune" in METHODS[method]:
        options = {"tune": METHODS[method]["tune"], "total_steps": problem.T, "every": 10, "seed": seed} | tuner_options
        tuner = hypergrad.Tuner(model, optimizer, model, **options)
    backward = tuner.backward if tuner else Tensor.backward
    decay = METHODS[method].get("decay", False)

    began = time.perf_counter()
    for t in range(problem.T):
        if decay:
            group["lr"] = start_lr * linear_decay(t, problem.T)
        loss = model()
        optimizer.zero_grad()
        backward(loss)
        optimizer.step()
    row: dict[str, Any] = {"start_lr": start_lr, "end_lr": tuner.values["lr"].item() if tuner else start_lr}
    row["final_loss"] = model.noiseless()
    row["gradient_evaluations"] = flops.gradient_evaluations(tuner.stats) if tuner else problem.T
    row["seconds"] = round(time.perf_counter() - began, 3)
    if tuner:
        tuner.close()
    return model, row


def run(item: dict[str, Any]) -> dict[str, Any]:
    """One item of the sweep: its row is the item's own fields, then what was measured."""
    problem, method = Quadratic(item["p"], item["s2"], item["T"]), item["method"]
    (_, constant), (lr, decayed) = best(problem, False), best(problem, True)
    _, row = fit(problem, item["seed"], lr if method == "best_decay" else start(item["seed"]), method)
    row |= {"ratio": row["final_loss"] / decayed, "best_decay_loss": decayed, "best_decay_lr": lr}
    return item | row | {"best_constant_loss": constant, "diverged": not math.isfinite(row["final_loss"])}


def ratio(rows: list[dict[str, Any]]) -> float:
    """Mean final loss of ``rows`` over that of the best linear decay; infinite where a run diverged."""
    return float(np.mean([math.inf if row["diverged"] else row["ratio"] for row in rows]))


def main(args: Args) -> list[dict[str, Any]]:
    unknown = [name for name in args.methods if name not in METHODS]
    if unknown:
        raise SystemExit(f"--methods: unknown {', '.join(unknown)}; choose from {', '.join(METHODS)}")
    if min(args.seeds, args.shorter, args.jobs) < 1:
        raise SystemExit("--seeds, --shorter and --jobs are at least 1")
    problems = [problem._replace(T=max(problem.T // args.shorter, 1)) for problem in PROBLEMS]
    todo = [
        {"method": method, **problem._asdict(), "seed": seed}
        for seed in range(args.seed, args.seed + args.seeds)
        for problem in problems
        for method in args.methods
    ]
    out = Path(args.out)
    rows = sweep(run, todo, out / "noisy_quadratic.jsonl", min(args.jobs, len(todo)))
    rows.sort(key=lambda row: (row["method"], row["p"], row["s2"], row["T"], row["seed"]))
    results.write(out / "noisy_quadratic.json", command(args), rows)

    head = (
        f"{'best constant':>14}{'best decay':>11}{'runs':>6}{'mean ratio':>11}{'median':>8}{'worst':>8}{'s a run':>9}"
    )
    for method in args.methods:
        print(f"\n{method + ': final loss over the best linear decay':<48}\n{'':<22}{head}")
        for problem in problems:
            own = results.select(rows, {"method": method, **problem._asdict()})
            each = sorted(ratio([row]) for row in own)
            print(
                f"{problem!s:<22}{best(problem, False)[1]:>14.4f}{best(problem, True)[1]:>11.4f}{len(own):>6}{ratio(own):>11.4g}"
                f"{np.median(each):>8.4g}{each[-1]:>8.4g}{np.mean([row['seconds'] for row in own]):>9.2f}"
            )
    print(
        f"\n{sum(row['diverged'] for row in rows)} diverged (their ratio counts as infinite). {out / 'noisy_quadratic.json'}"
    )
    return rows


if __name__ == "__main__":
    main(parse(Args))
