"""What implicit differentiation costs, once, as a multiple of a plain step: ten iterations of a linear solve.

    python -m experiments.bench_implicit [--cases mlp_sgd] [--quick]

    dL/dw = −(∂L/∂θ) (∂²F/∂θ²)⁻¹ θ,      F = ℓ + w/2 ‖θ‖²

at one point, on one batch, for coupled weight decay w, by ten iterations of CG, or ten terms of the Neumann series with its step
size given. w = 10, so that ∂²F/∂θ² is positive definite where training begins, and CG is in its right. hypergrad's call takes a
plain step too (at lr 0: it ends where it began), and forms one product more, for `stats["solver_residual"]`; the others are the
solve alone. All run in turn in one process, one thread; `error` is from plain code with the same solver, both in float64.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hypergrad
from experiments import results
from experiments.arguments import arg, command, parse
from experiments.bench_case import Case
from experiments.bench_modes import by_turns, installed, keep_memory, plain, times
from hypergrad.solvers import Solve, cg, neumann

Row = dict[str, Any]
ITERATIONS, DECAY = 10, 10.0  # the cases' losses have curvatures from −6.4 to 21.3
SCALE = 0.05  # of the Neumann series: below 2 / λ_max


@dataclass
class Args:
    """Time of implicit hypergradients by hypergrad, TorchOpt and plain code."""

    cases: tuple = arg(("mlp_sgd", "mlp_adam", "cnn_sgd"), "any of them")
    rounds: int = arg(15, "rounds; the median is reported", quick=1)
    device: str = arg("cpu", "cpu or cuda")
    out: str = arg("runs/bench_implicit", "folder of bench_implicit.json", quick="runs/bench_implicit_quick")
    quick: bool = arg(False, "one round: a test of the machinery")


def implicit_case(name: str, device: str, dtype: torch.dtype = torch.float32) -> Case:
    """One batch, at lr 0."""
    case = Case(name, 1, device, dtype)
    case.lr = 0.0
    return case


def ours(solver: Solve) -> Callable[[Case], Callable[[], float]]:
    def of(case: Case) -> Callable[[], float]:
        optimizer = case.optimizer()
        optimizer.param_groups[0]["weight_decay"] = DECAY

        def val_loss() -> Tensor:
            return case.loss(case.model, case.held_out)

        def call() -> float:
            found = hypergrad.hypergradient(
                case.model, optimizer, case.loss, case.batches, val_loss, "weight_decay", "implicit", solver=solver
            )
            return float(found.gradients["weight_decay"])

        return call

    return of


def plain_code(solver: Solve) -> Callable[[Case], Callable[[], float]]:
    """The gradient's graph kept, a Hessian product an iteration, one flat vector."""

    def of(case: Case) -> Callable[[], float]:
        def call() -> float:
            flat = lambda parts: torch.cat([x.reshape(-1) for x in parts])  # noqa: E731
            g = flat(torch.autograd.grad(case.loss(case.model, case.batches[0]), case.params, create_graph=True))

            def product(v: Tensor) -> Tensor:
                return flat(torch.autograd.grad(g, case.params, v, retain_graph=True)) + DECAY * v

            b = flat(torch.autograd.grad(case.loss(case.model, case.held_out), case.params))
            theta = flat([p.detach() for p in case.params])
            return -float(solver(product, b) @ theta)

        return call

    return of


def torchopt(case: Case) -> Callable[[], float]:
    """TorchOpt 0.7.3: custom_root with its own CG, on the gradient of F."""
    implicit, solvers = (import_module(name) for name in ("torchopt.diff.implicit", "torchopt.linear_solve"))

    def objective(theta: Any, wd: Tensor) -> Tensor:
        return case.loss_at(theta, case.batches[0]) + 0.5 * wd * sum((p * p).sum() for p in theta)

    def optimality(theta: Any, wd: Tensor) -> Any:
        return torch.func.grad(objective)(theta, wd)

    solve = solvers.solve_cg(maxiter=ITERATIONS, rtol=0.0, atol=0.0)

    @implicit.custom_root(optimality, argnums=1, solve=solve)
    def at_minimum(theta: Any, wd: Tensor) -> Any:
        return tuple(p.detach().clone().requires_grad_() for p in theta)

    def call() -> float:
        wd = case.params[0].new_tensor(DECAY).requires_grad_()
        theta = at_minimum(tuple(p.detach().clone().requires_grad_() for p in case.params), wd)
        return float(torch.autograd.grad(case.loss_at(theta, case.held_out), wd)[0])

    return call


SOLVERS: dict[str, Solve] = {
    "CG": partial(cg, max_iter=ITERATIONS, tol=0.0),
    "Neumann": partial(neumann, terms=ITERATIONS, scale=SCALE),
}
METHODS: dict[str, tuple[str, Callable[[Case], Callable[[], Any]]]] = {  # its solver, and (case) -> a call
    "plain code, CG": ("CG", plain_code(SOLVERS["CG"])),
    "TorchOpt, CG": ("CG", torchopt),
    "implicit, CG": ("CG", ours(SOLVERS["CG"])),
    "plain code, Neumann": ("Neumann", plain_code(SOLVERS["Neumann"])),
    "implicit, Neumann": ("Neumann", ours(SOLVERS["Neumann"])),
}


def error_of(method: str, name: str, device: str) -> float:
    """The relative difference of an answer from plain code's with the same solver, both in float64."""
    solver, of = METHODS[method]
    truth, found = (f(implicit_case(name, device, torch.float64))() for f in (plain_code(SOLVERS[solver]), of))
    return abs(found - truth) / abs(truth)


def measure(args: Args, name: str) -> list[Row]:
    case = implicit_case(name, args.device)
    methods = [m for m in METHODS if not m.startswith("TorchOpt") or installed("TorchOpt")]
    calls = {"plain": plain(case)} | {method: METHODS[method][1](case) for method in methods}
    seconds = {m: spent[1:] for m, spent in by_turns(calls, case, args.rounds, args.device).items()}
    rows = []
    for method in methods:
        row = {
            "case": name,
            "method": method,
            "iterations": ITERATIONS,
            "times_plain": times(seconds[method], seconds["plain"]),
        }
        row |= {"ms": round(1e3 * statistics.median(seconds[method]), 3), "error": error_of(method, name, args.device)}
        rows.append(row)
        print(f"{name:9} {method:22} {row['times_plain']:7.2f}   error {row['error']:.1e}", flush=True)
    return rows


def main(args: Args) -> list[Row]:
    torch.set_num_threads(1)
    rows = [row for name in args.cases for row in measure(args, name)]
    results.write(Path(args.out, "bench_implicit.json"), command(args), rows, args.device)
    return rows


if __name__ == "__main__":
    given = parse(Args)
    keep_memory()
    main(given)
