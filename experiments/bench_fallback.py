"""What it costs that an optimizer has no update rule: a step through the fallback, as a multiple of the optimizer's plain step.

    python -m experiments.bench_fallback [--quick]

dL/dlr and dL/dw after K steps of the benchmark's MLP, and of a deep one of many small tensors, by every mode, for Adam by its
rule, for Adam through its own step (a subclass with a `step` of its own, so that the rule does not see it) and for optimizers
of other packages. All run in turn in one process with one thread; time is the median over rounds of (seconds a step) / (seconds
of a plain step of the same optimizer in the same round).
`first_call_s` is what the first call takes beyond the later ones: the check by finite differences, made once.
`error` is the larger relative difference of Adam's two numbers from those by its rule, in float64.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from experiments import results
from experiments.arguments import arg, command, parse
from experiments.bench_case import EPS, WEIGHT_DECAY, Case
from experiments.bench_modes import by_turns, keep_memory, ours, plain, times

Row = dict[str, Any]
Made = Callable[[Sequence[torch.Tensor]], torch.optim.Optimizer]


@dataclass
class Args:
    """Time of a step through the fallback beside one by an update rule."""

    steps: int = arg(20, "K, number of training steps", quick=3)
    rounds: int = arg(7, "rounds; the median is reported", quick=1)
    cases: tuple = arg(("mlp_adam", "deep_adam"), "mlp_adam: 6 tensors, deep_adam: 32 small ones")
    optimizers: tuple = arg((), "any of the table (default: all that the machine has)")
    device: str = arg("cpu", "cpu or cuda")
    out: str = arg("runs/bench_fallback", "folder of bench_fallback.json", quick="runs/bench_fallback_quick")
    quick: bool = arg(False, "one round of few steps: a test of the machinery")


class OwnAdam(torch.optim.Adam):
    """Adam that the fallback sees."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


NUMBERS: dict[str, Any] = {"lr": 1e-3, "weight_decay": WEIGHT_DECAY, "eps": EPS}


def of_package(package: str, name: str, **numbers: Any) -> Made:
    return lambda params: getattr(import_module(package), name)(params, **NUMBERS | numbers)


RULE, OWN = "Adam, by its rule", "Adam, its own step"
OPTIMIZERS: dict[str, tuple[str, Made]] = {  # its package, and how it is made
    RULE: ("torch", lambda params: torch.optim.Adam(params, **NUMBERS)),
    OWN: ("torch", lambda params: OwnAdam(params, **NUMBERS)),
    "AdaBelief, of pytorch-optimizer": ("pytorch_optimizer", of_package("pytorch_optimizer", "AdaBelief")),
    "Prodigy, of prodigyopt": ("prodigyopt", of_package("prodigyopt", "Prodigy", lr=1.0)),
}
MODES = {
    "unrolled, a snapshot every step": ours("unrolled", every=1),
    "unrolled, every √K": ours("unrolled", graph_memory=0),
    "forward": ours("forward"),
}


class CaseOf(Case):
    """A case with one of these optimizers."""

    def __init__(self, name: str, make: Made, steps: int, device: str, dtype: torch.dtype = torch.float32):
        super().__init__(name, steps, device, dtype)
        self.make = make

    def optimizer(self) -> torch.optim.Optimizer:
        return self.make(self.params)


def error_of(mode: str, name: str, device: str, steps: int = 3) -> float:
    """Adam's own step against its rule."""
    by_rule, own = (MODES[mode](CaseOf(name, OPTIMIZERS[m][1], steps, device, torch.float64))() for m in (RULE, OWN))
    assert by_rule is not None
    assert own is not None
    return max(abs(a - b) / abs(b) for a, b in zip(own, by_rule, strict=True))


def measure(args: Args, case_name: str, name: str) -> list[Row]:
    case = CaseOf(case_name, OPTIMIZERS[name][1], args.steps, args.device)
    calls = {"plain": plain(case)} | {mode: of(case) for mode, of in MODES.items()}
    seconds = by_turns(calls, case, args.rounds, args.device)
    plain_ones = seconds["plain"][1:]
    rows = []
    for mode in MODES:
        first, *others = seconds[mode]
        usual = statistics.median(others)
        row: Row = {"case": case_name, "tensors": len(case.params), "optimizer": name, "mode": mode}
        row |= {"steps": args.steps, "times_plain": times(others, plain_ones)}
        row["ms_a_step"] = round(1e3 * usual / args.steps, 3)
        row["first_call_s"] = round(max(0.0, first - usual), 3)
        row["error"] = error_of(mode, case_name, args.device) if name == OWN else None
        rows.append(row)
        print(f"{case_name:10} {name:32} {mode:32} {row['times_plain']:7.2f}   {row['ms_a_step']:8.2f} ms", flush=True)
    return rows


def main(args: Args) -> list[Row]:
    torch.set_num_threads(1)
    rows = []
    for name in args.optimizers or OPTIMIZERS:
        if find_spec(OPTIMIZERS[name][0]) is None:
            print(f"{name} is not installed (pip install -e '.[bench]'): left out.")
            continue
        rows += [row for case in args.cases for row in measure(args, case, name)]
    results.write(Path(args.out, "bench_fallback.json"), command(args), rows, args.device)
    return rows


if __name__ == "__main__":
    given = parse(Args)
    keep_memory()
    main(given)
