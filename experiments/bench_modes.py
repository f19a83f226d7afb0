"""What an exact hypergradient of lr and weight decay costs, beside other libraries: time and memory of every mode.

    python scripts/bench_modes.py [--device cuda] [--quick]

Each method computes the same numbers: dL/dlr and dL/dwd of a validation loss after K training steps, from the same model,
state and batches. All methods of a case run in turn in one process with one thread, round after round; time is the median over
rounds of (seconds a step) / (seconds of a plain `torch.optim` step in the same round). Memory is the growth of the peak in a
fresh process. Peers take weight decay as a penalty in their loss, which for coupled decay is the same.

On a GPU a GPT of 124 million parameters is added, for up to 20 steps; a method that runs out of memory there has a row with a
null time. What implicit differentiation costs is in `experiments/bench_implicit.py`.

With `--compiled` it is the methods with compile=True that run, beside the same ones without, and `bench_compiled.json` is
written. They are compiled before the rounds; the seconds of that are a field of the row.

`bench_modes.json` has a row for every method, case and K. `error` is the largest relative difference of the two numbers from
those of plain code, all of it in float64, where rounding does not hide a mistake (K = 5 at most; the GPT's on a tiny one).
"""

from __future__ import annotations

import gc
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import hypergrad
from experiments import results
from experiments.arguments import arg, command, parse
from experiments.bench_case import Answer, Call, Case
from experiments.bench_peers import flag, higher, plain_unrolled, torchopt

Row = dict[str, Any]
# Times: freed memory stays with the process, as in a long one; the page faults of taking it anew cost more here than the work.
KEPT = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_TOP_PAD_": str(2**28)}
# Memory: freed memory goes back at once, so that the peak is what was in use.
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
CHECKED = 5  # steps; in float64
MIB = 2**20


@dataclass
class Args:
    """Time and memory of hypergradients by hypergrad, other libraries and plain code."""

    cases: tuple = arg(("mlp_sgd", "mlp_adam", "cnn_sgd"), "any of them")
    lengths: tuple = arg((1, 5, 20, 100), "K, numbers of training steps", quick=(1, 5))
    rounds: int = arg(7, "rounds of every length; the median is reported", quick=1)
    methods: tuple = arg((), "any methods (default: all that the machine has)")
    device: str = arg("cpu", "cpu or cuda")
    compiled: bool = arg(False, "the methods with compile=True and the same without (default of methods)")
    no_memory: bool = arg(False, "do not measure memory, each in a fresh process")
    memory_of: str = arg("", "print the growth of memory of METHOD:CASE:K, and do nothing else")
    out: str = arg("runs/bench_modes", "folder of bench_modes.json", quick="runs/bench_modes_quick")
    quick: bool = arg(False, "one round of short lengths: a test of the machinery")


# ---- the methods: (case) -> a call that computes the answer


def plain(case: Case) -> Call:
    """The steps alone, by torch.optim."""
    optimizer = case.optimizer()

    def call() -> None:
        for batch in case.batches:
            optimizer.zero_grad()
            case.loss(case.model, batch).backward()
            optimizer.step()

    return call


def ours(mode: str, **options: Any) -> Callable[[Case], Call]:
    """hypergrad.hypergradient."""

    def of(case: Case) -> Call:
        optimizer = case.optimizer()

        def call() -> Answer:
            found = hypergrad.hypergradient(
                case.model,
                optimizer,
                case.loss,
                case.batches,
                lambda: case.loss(case.model, case.held_out),
                mode=mode,
                **options,
            )
            case.compile_seconds += found.stats.get("compile_seconds", 0.0)
            return float(found.gradients["lr"]), float(found.gradients["weight_decay"])

        return call

    return of


def method_of(name: str) -> Callable[[Case], Call]:
    return COMPILED[name] if name in COMPILED else METHODS[name]


def suits(method: str, case: str) -> bool:
    """Whether the method is right in this case."""
    return method != FLAG or case.endswith("_adam")


GPT_CASE, GPT_STEPS = "gpt_adam", 20  # added on a GPU; its longest run
FLAG = "torch.optim, differentiable=True"
METHODS: dict[str, Callable[[Case], Call]] = {
    "plain": plain,
    "plain code, graph kept": plain_unrolled,
    "TorchOpt": torchopt,
    "higher": higher,
    FLAG: flag,
    "unrolled, a snapshot every step": ours("unrolled", every=1),
    "unrolled, every √K": ours("unrolled", graph_memory=0),
    "unrolled, graph kept": ours("unrolled", graph_memory=2**40),
    "forward": ours("forward"),
}
EVERY = (2, 4, 20, 50, 100)  # more steps between snapshots, for the curve of time over memory
METHODS |= {f"unrolled, every {c} steps": ours("unrolled", every=c) for c in EVERY}
COMPILED = {
    "unrolled, a snapshot every step, compiled": ours("unrolled", every=1, compile=True),
    "unrolled, every √K, compiled": ours("unrolled", graph_memory=0, compile=True),
    "forward, compiled": ours("forward", compile=True),
}
PACKAGES = {"TorchOpt": "torchopt", "higher": "higher"}


# ---- measuring


def measure(args: Args, name: str, steps: int, methods: Sequence[str]) -> list[Row]:
    """Interleaved rounds of all methods on one case."""
    case = Case(name, steps, args.device)
    calls = {method: method_of(method)(case) for method in methods}
    errors = {method: error_of(method, name, min(steps, CHECKED), args.device) for method in methods}
    compile_seconds = {method: compiling(calls[method], case) for method in methods if method in COMPILED}
    seconds = {m: spent[1:] for m, spent in by_turns(calls, case, args.rounds, args.device).items()}
    rows = []
    for method in methods:
        row = {"case": name, "steps": steps, "method": method, "times_plain": times(seconds[method], seconds["plain"])}
        row["ms_a_step"] = round(1e3 * statistics.median(seconds[method]) / steps, 3)
        row["error"] = errors[method]
        if method in COMPILED:
            row["compile_seconds"] = round(compile_seconds[method], 1)
        rows.append(row)
        error = "" if row["error"] is None else f"   error {row['error']:.1e}"
        print(f"{name:9} K={steps:<4} {method:34} {row['times_plain']:7.2f}{error}", flush=True)
    return rows


def by_turns(calls: Mapping[str, Call], case: Case, rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each call, by turns, from the same weights: once to warm up, then `rounds` times; inf: out of memory."""
    start = [p.detach().clone() for p in case.params]
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            with torch.no_grad():
                for p, x in zip(case.params, start, strict=True):
                    p.copy_(x)
                    p.grad = None
            gc.collect()
            began = clock(device)
            try:
                call()
                seconds[name].append(clock(device) - began)
            except torch.OutOfMemoryError:
                seconds[name].append(math.inf)
    return seconds


def times(seconds: Sequence[float], plain: Sequence[float]) -> float:
    """The median over rounds of seconds over a plain call's in the same round."""
    return round(statistics.median(a / b for a, b in zip(seconds, plain, strict=True)), 3)


def compiling(call: Call, case: Case) -> float:
    """Compile on a few steps, and the seconds that took: of the wall, as the compiler is another process."""
    before, batches, case.batches = case.compile_seconds, case.batches, case.batches[:6]
    call()
    case.batches = batches
    return case.compile_seconds - before


@cache
def error_of(method: str, name: str, steps: int, device: str) -> float | None:
    """The largest relative difference of an answer from plain code's, both in float64."""
    if method == "plain":
        return None
    small = name.replace("gpt", "tinygpt") if name == GPT_CASE else name
    truth, found = (
        method_of(m)(Case(small, steps, device, torch.float64))() for m in ("plain code, graph kept", method)
    )
    assert truth is not None
    assert found is not None
    return max(abs(a - b) / abs(b) for a, b in zip(found, truth, strict=True))


def curve(steps: int) -> list[str]:
    return [f"unrolled, every {c} steps" for c in EVERY if c <= steps]


def clock(device: str) -> float:
    """Seconds: of the processor on CPU, where one thread works and the machine may be shared; of the wall on a GPU."""
    if not device.startswith("cuda"):
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def growth(method: str, name: str, steps: int, device: str) -> float:
    """MiB by which the peak grows over that of a few plain steps, here and now."""
    case = Case(name, steps, device)
    short = Case(name, 2, device)
    plain(short)()
    if method != "plain":
        method_of(method)(short)()
    call = method_of(method)(case)
    gc.collect()
    before = peak(device)
    call()
    return (peak(device) - before) / MIB


def peak(device: str, reset: bool = False) -> int:
    """Bytes: the largest memory so far. reset: begin at what is in use now, where that can be done."""
    if device.startswith("cuda"):
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    try:  # ru_maxrss begins at that of the parent process
        status = Path("/proc/self/status").read_text()
        return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def growth_of(method: str, name: str, steps: int, device: str) -> float:
    """The same in a process of its own."""
    words = [sys.executable, "-m", "experiments.bench_modes", "--memory-of", f"{method}:{name}:{steps}"]
    done = subprocess.run(
        [*words, "--device", device], env=os.environ | RETURNED, capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def main(args: Args) -> list[Row]:
    torch.set_num_threads(1)
    if args.memory_of:
        method, name, steps = args.memory_of.split(":")
        print(growth(method, name, int(steps), args.device))
        return []
    siblings = [sibling for m in COMPILED for sibling in (m.removesuffix(", compiled"), m)]
    methods = args.methods or (siblings if args.compiled else [m for m in METHODS if m not in curve(10**9)])
    methods = [m for m in methods if installed(m)]
    methods = ["plain", *(m for m in methods if m != "plain")]
    rows = []
    for name in (*args.cases, *((GPT_CASE,) if args.device.startswith("cuda") and GPT_CASE not in args.cases else ())):
        lengths = [k for k in args.lengths if name != GPT_CASE or k <= GPT_STEPS]
        for steps in lengths:
            whole = steps == max(lengths) and not (args.methods or args.compiled)
            at_length = [*methods, *(curve(steps) if whole else ())]
            rows += measure(args, name, steps, [m for m in at_length if suits(m, name)])
        for row in () if args.no_memory else rows:
            if row["case"] == name and row["steps"] == max(lengths) and math.isfinite(row["times_plain"]):
                row["memory_mib"] = round(growth_of(row["method"], name, row["steps"], args.device), 1)
                print(f"{name:9} K={row['steps']:<4} {row['method']:34} {row['memory_mib']:7.1f} MiB", flush=True)
        file = "bench_compiled.json" if args.compiled else "bench_modes.json"
        results.write(Path(args.out, file), command(args), rows, args.device)  # a case at a time
    return rows


def installed(method: str) -> bool:
    package = PACKAGES.get(method)
    if package is None or find_spec(package):
        return True
    print(f"{method} is not installed (pip install -e '.[bench]'): left out.")
    return False


def keep_memory() -> None:
    """Begin again as a process whose malloc keeps what is freed."""
    if not all(os.environ.get(name) == value for name, value in KEPT.items()):
        os.execve(sys.executable, sys.orig_argv, os.environ | KEPT)


def start() -> None:
    """The command."""
    args = parse(Args)
    if not args.memory_of:
        keep_memory()
    main(args)


if __name__ == "__main__":
    start()
