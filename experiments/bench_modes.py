"""What an exact hypergradient of lr and weight decay costs, beside other libraries: time and memory of every mode.

    python scripts/bench_modes.py [--device cuda] [--quick]

Each method computes the same numbers: dL/dlr and dL/dwd of a validation loss after K training steps, from the same model,
state and batches. All methods of a case run in turn in one process with one thread, round after round; time is the median over
rounds of (seconds a step) / (seconds of a plain `torch.optim` step in the same round). Memory is the growth of the peak in a
fresh process. Peers take weight decay as a penalty in their loss, which for coupled decay is the same.

With `--compiled` it is the methods with compile=True that run, beside the same ones without, and `bench_compiled.json` is
written. They are compiled before the rounds; the seconds of that are a field of the row.

`bench_modes.json` has a row for every method, case and K. `error` is the largest relative difference of the two numbers from
those of plain code, all of it in float64, where rounding does not hide a mistake (K = 5 at most).
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
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hypergrad
from experiments import results
from experiments.arguments import arg, command, parse

Row = dict[str, Any]
Answer = tuple[float, float]  # dL/dlr, dL/dwd
Call = Callable[[], Answer | None]
# Times: freed memory stays with the process, as in a long one; the page faults of taking it anew cost more here than the work.
KEPT = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_TOP_PAD_": str(2**28)}
# Memory: freed memory goes back at once, so that the peak is what was in use.
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
CHECKED = 5  # steps; in float64
MIB = 2**20
MOMENTUM, WEIGHT_DECAY, EPS = 0.9, 1e-3, 1e-8


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


# ---- the work


class Case:
    """A model, an optimizer and K batches of random data; everything the same at every call."""

    def __init__(self, name: str, steps: int, device: str, dtype: torch.dtype = torch.float32):
        kind, self.rule = name.split("_")
        torch.manual_seed(0)
        self.model = MODELS[kind]().to(device, dtype)
        self.lr, self.steps = {"sgd": 0.02, "adam": 1e-3}[self.rule], steps
        shape = INPUTS[kind]
        x, y = torch.randn(*shape), torch.randint(0, 10, shape[:1])
        distinct = [(x.roll(i, -1), y.roll(i)) for i in range(min(steps, 20))]
        move = lambda a: a.to(device, dtype) if a.is_floating_point() else a.to(device)  # noqa: E731
        self.batches = [tuple(move(a) for a in distinct[i % len(distinct)]) for i in range(steps)]
        self.held_out = tuple(move(a) for a in (x.flip(0), y))
        self.params = list(self.model.parameters())
        self.compile_seconds = 0.0  # by all calls so far

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(model(batch[0]), batch[1])

    def loss_at(self, theta: Sequence[Tensor], batch: Any) -> Tensor:
        """The loss as a function of the parameters, for methods that are functional."""
        named = dict(zip((name for name, _ in self.model.named_parameters()), theta, strict=True))
        return self.loss(lambda x: torch.func.functional_call(self.model, named, (x,)), batch)  # type: ignore[arg-type]

    def leaves(self) -> tuple[Tensor, Tensor]:
        """lr and weight decay as tensors to be differentiated in."""
        p = self.params[0]
        lr, wd = (torch.tensor(x, dtype=p.dtype, device=p.device, requires_grad=True) for x in (self.lr, WEIGHT_DECAY))
        return lr, wd

    def optimizer(self) -> torch.optim.Optimizer:
        if self.rule == "sgd":
            return torch.optim.SGD(self.params, lr=self.lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
        return torch.optim.Adam(self.params, lr=self.lr, weight_decay=WEIGHT_DECAY, eps=EPS)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def _cnn() -> nn.Module:
    layers = nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
    more = nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
    return nn.Sequential(*layers, *more, nn.Flatten(), nn.Linear(32 * 49, 10))


MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": _mlp, "cnn": _cnn}
INPUTS = {"mlp": (128, 784), "cnn": (64, 1, 28, 28)}


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


def plain_unrolled(case: Case) -> Call:
    """The same steps in plain code whose whole graph autograd keeps."""
    loss = case.loss_at

    def call() -> Answer:
        lr, wd = case.leaves()
        theta = [p.detach().clone().requires_grad_() for p in case.params]
        m, v = ([torch.zeros_like(p) for p in theta] for _ in range(2))
        for t, batch in enumerate(case.batches, 1):
            g = torch.autograd.grad(loss(theta, batch), theta, create_graph=True)
            g = [x + wd * p for x, p in zip(g, theta, strict=True)]
            if case.rule == "sgd":
                m = [MOMENTUM * b + x for b, x in zip(m, g, strict=True)]
                theta = [p - lr * b for p, b in zip(theta, m, strict=True)]
                continue
            m = [0.9 * b + 0.1 * x for b, x in zip(m, g, strict=True)]
            v = [0.999 * b + 0.001 * x * x for b, x in zip(v, g, strict=True)]
            c1, c2 = 1 - 0.9**t, math.sqrt(1 - 0.999**t)
            # + tiny: the root has no derivative at exactly 0
            roots = [(b + 1e-30).sqrt() / c2 + EPS for b in v]
            theta = [p - (lr / c1) * b / r for p, b, r in zip(theta, m, roots, strict=True)]
        found = torch.autograd.grad(loss(theta, case.held_out), [lr, wd])
        return float(found[0]), float(found[1])

    return call


def higher(case: Case) -> Call:
    """higher 0.2.1: innerloop_ctx, with lr overridden and weight decay in the loss."""
    library = import_module("higher")

    def call() -> Answer:
        lr, wd = case.leaves()
        optimizer = case.optimizer()
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0
        with library.innerloop_ctx(case.model, optimizer, override={"lr": [lr]}) as (model, inner):
            for batch in case.batches:
                inner.step(case.loss(model, batch) + _penalty(wd, model.parameters()))
            found = torch.autograd.grad(case.loss(model, case.held_out), [lr, wd])
        return float(found[0]), float(found[1])

    return call


def torchopt(case: Case) -> Call:
    """TorchOpt 0.7.3: functional optimizers with a tensor for lr, weight decay in the loss."""
    library = import_module("torchopt")

    loss = case.loss_at

    def call() -> Answer:
        lr, wd = case.leaves()
        if case.rule == "sgd":
            rule = library.sgd(lr=lambda count: lr, momentum=MOMENTUM)
        else:
            rule = library.adam(lr=lambda count: lr, eps=EPS)
        theta: Any = tuple(p.detach().clone().requires_grad_() for p in case.params)
        state = rule.init(theta)
        for batch in case.batches:
            g = torch.autograd.grad(loss(theta, batch) + _penalty(wd, theta), theta, create_graph=True)
            updates, state = rule.update(g, state, inplace=False)
            theta = library.apply_updates(theta, updates, inplace=False)
        found = torch.autograd.grad(loss(theta, case.held_out), [lr, wd])
        return float(found[0]), float(found[1])

    return call


def _penalty(wd: Tensor, theta: Any) -> Tensor:
    return 0.5 * wd * sum((p * p).sum() for p in theta)


METHODS: dict[str, Callable[[Case], Call]] = {
    "plain": plain,
    "plain code, graph kept": plain_unrolled,
    "TorchOpt": torchopt,
    "higher": higher,
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
    calls = {method: (METHODS | COMPILED)[method](case) for method in methods}
    start = [p.detach().clone() for p in case.params]
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    errors = {method: error_of(method, name, min(steps, CHECKED), args.device) for method in methods}
    compile_seconds = {method: compiling(calls[method], case) for method in methods if method in COMPILED}
    for turn in range(args.rounds + 1):  # the first warms up
        for method in methods:
            with torch.no_grad():
                for p, x in zip(case.params, start, strict=True):
                    p.copy_(x)
                    p.grad = None
            gc.collect()
            began = clock(args.device)
            calls[method]()
            spent = clock(args.device) - began
            if turn:
                seconds[method].append(spent / steps)
    rows = []
    for method in methods:
        ratios = [a / b for a, b in zip(seconds[method], seconds["plain"], strict=True)]
        row = {"case": name, "steps": steps, "method": method, "times_plain": round(statistics.median(ratios), 3)}
        row["ms_a_step"] = round(1e3 * statistics.median(seconds[method]), 3)
        row["error"] = errors[method]
        if method in COMPILED:
            row["compile_seconds"] = round(compile_seconds[method], 1)
        rows.append(row)
        error = "" if row["error"] is None else f"   error {row['error']:.1e}"
        print(f"{name:9} K={steps:<4} {method:34} {row['times_plain']:7.2f}{error}", flush=True)
    return rows


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
    known = METHODS | COMPILED
    truth, found = (known[m](Case(name, steps, device, torch.float64))() for m in ("plain code, graph kept", method))
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
        (METHODS | COMPILED)[method](short)()
    call = (METHODS | COMPILED)[method](case)
    if method in COMPILED:
        compiling(call, case)
    gc.collect()
    before = peak(device, reset=method in COMPILED)
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
    methods = [m for m in methods if _installed(m)]
    methods = ["plain", *(m for m in methods if m != "plain")]
    rows = []
    for name in args.cases:
        for steps in args.lengths:
            whole = steps == max(args.lengths) and not (args.methods or args.compiled)
            at_length = [*methods, *(curve(steps) if whole else ())]
            rows += measure(args, name, steps, at_length)
        for row in () if args.no_memory else rows:
            if row["case"] == name and row["steps"] == max(args.lengths):
                row["memory_mib"] = round(growth_of(row["method"], name, row["steps"], args.device), 1)
                print(f"{name:9} K={row['steps']:<4} {row['method']:34} {row['memory_mib']:7.1f} MiB", flush=True)
        file = "bench_compiled.json" if args.compiled else "bench_modes.json"
        results.write(Path(args.out, file), command(args), rows, args.device)  # a case at a time
    return rows


def _installed(method: str) -> bool:
    package = PACKAGES.get(method)
    if package is None or find_spec(package):
        return True
    print(f"{method} is not installed (pip install -e '.[bench]'): left out.")
    return False


def start() -> None:
    """The command: in a process whose malloc keeps what is freed, but for measuring memory."""
    args = parse(Args)
    if not args.memory_of and not all(os.environ.get(name) == value for name, value in KEPT.items()):
        os.execve(sys.executable, sys.orig_argv, os.environ | KEPT)
    main(args)


if __name__ == "__main__":
    start()
