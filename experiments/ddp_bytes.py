"""What tuning adds to what DistributedDataParallel sends: collectives and bytes of each kind of step, counted on two processes.

    python -m experiments.ddp_bytes [--quick]

Two gloo processes train an MLP (rows "counted") tuned by a plan with products in one step of three. Every collective is counted
as it goes through torch's dispatcher, those that DistributedDataParallel starts in C++ too; bytes are those of the tensors that a
rank hands to it. Kinds of steps: "resting" (no product, no reading), "product", "reading" (of the validation loss; alone or with
a product), "plain" (the same loop without a tuner). Of a kind the row has the largest numbers of its steps:

    gradient_bytes                  DistributedDataParallel's own: 4 n for n weights
    buffer_bytes                    its copies of rank 0's buffers, before every forward pass, those of val_loss too
    vectors, vector_bytes           hypergrad's collectives of tangents: 4 k n, k numbers tuned
    scalar_calls, scalar_bytes      its collectives of numbers in float64

Rows "written out" are of a ring all-reduce, in which each of N processes sends 2 (N − 1)/N times the bytes, for nets whose
weights are counted: nothing was run on so many.
"""

from __future__ import annotations

import datetime
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import hypergrad
from experiments import bench_gpt, results
from experiments.arguments import arg, command, parse
from experiments.gpu_check.models import resnet18
from hypergrad.online.plan import Plan

Row = dict[str, Any]
Call = tuple[str, int]  # whose and what, and its bytes
PLAN = Plan(cost=2.0, product=1.0, validation=1.0, every=5, resting=5, stride=3)
STEPS, ROWS, SCALARS = 100, 16, 1000  # a collective of more numbers is one of tangents
PROCESSES = (8, 64)
STRIDE = 5  # of a plan for cost=2 where a product costs 2.7 plain steps, see plan.py


@dataclass
class Args:
    """Count what two processes send to each other in tuned steps, and write it out for more."""

    width: int = arg(256, "of the MLP's hidden layer", quick=64)
    out: str = arg("runs/ddp_bytes", "folder of the result", quick="runs/ddp_bytes_quick")
    quick: bool = arg(False, "a smaller net")


class Traffic(TorchDispatchMode):
    """Notes every collective while active: hypergrad's, called from Python, and DistributedDataParallel's."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.own = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            whose = "hypergrad" if self.own else "DDP"
            tensors = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
            size = sum(x.numel() * x.element_size() for x in tensors)
            vector = sum(x.numel() for x in tensors) > SCALARS
            kind = func.name().removeprefix("c10d::").rstrip("_")
            self.calls.append((f"{whose} {kind}{' vector' if self.own and vector else ''}", size))
        return func(*args, **(kwargs or {}))

    def take(self) -> list[Call]:
        """Those since the last call."""
        found, self.calls = self.calls, []
        return found


@contextmanager
def counted() -> Iterator[Traffic]:
    """What is inside, with collectives called from Python told apart."""
    saved, traffic = dist.all_reduce, Traffic()

    def all_reduce(*args: Any, **options: Any) -> Any:
        traffic.own = True
        try:
            return saved(*args, **options)
        finally:
            traffic.own = False

    dist.all_reduce = all_reduce
    try:
        with traffic:
            yield traffic
    finally:
        dist.all_reduce = saved


def net(width: int, norm: bool) -> nn.Sequential:
    between = [nn.BatchNorm1d(width)] if norm else []
    return nn.Sequential(nn.Linear(20, width), *between, nn.Tanh(), nn.Linear(width, 10))


def measure(width: int, norm: bool, both: bool, tuned: bool = True) -> list[Row]:
    """On every rank: one row for each kind of step.

    Args:
        norm: with BatchNorm, which has buffers.
        both: without `total_steps`, so that lr and weight decay are tuned at once, to the end; else one at a time, then none.
        tuned: False: a plain loop.
    """
    torch.manual_seed(0)
    model = DistributedDataParallel(net(width, norm))
    n = sum(p.numel() for p in model.parameters())
    opt = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    torch.manual_seed(1 + dist.get_rank())
    x, y = torch.randn(STEPS + 1, ROWS, 20), torch.randint(10, (STEPS + 1, ROWS))
    loss = lambda i: nn.functional.cross_entropy(model(x[i]), y[i])  # noqa: E731
    tuner = None
    if tuned:
        total = None if both else STEPS
        tuner = hypergrad.Tuner(model, opt, lambda: loss(STEPS), total_steps=total, plan=PLAN, warm_start=False)
    found: dict[str, Row] = {}
    with warnings.catch_warnings(), counted() as traffic:
        warnings.simplefilter("ignore")  # that validation batches of 16 rows are small
        for t in range(STEPS):
            before = {} if tuner is None else tuner.stats
            value = loss(t)
            opt.zero_grad()
            value.backward() if tuner is None else tuner.backward(value)
            opt.step()
            calls = traffic.take()
            if t < 5 or (tuner is not None and tuner.stats["backtracks"] > before["backtracks"]):
                continue  # DistributedDataParallel's buckets are made anew, and what is read once in a run
            kind = "plain" if tuner is None else kind_of(before, tuner.stats, t)
            row = {"kind": kind, "steps": 1, **summed(calls)}
            old = found.get(kind)
            found[kind] = row if old is None else largest(old, row)
    if tuner is not None:
        tuner.close()
    same = {"rows": "counted", "processes": dist.get_world_size(), "weights": n, "norm": norm, "numbers": 1 + both}
    return [same | row for row in found.values()]


def kind_of(before: dict[str, int], after: dict[str, int], t: int) -> str:
    product = after["hessian_products"] > before["hessian_products"]
    reading = (t + 1) % PLAN.every == 0
    return " and ".join(name for name, is_so in (("product", product), ("reading", reading)) if is_so) or "resting"


def summed(calls: list[Call]) -> Row:
    """What a step's collectives come to."""

    def of(name: str) -> list[int]:
        return [size for what, size in calls if what == name]

    assert {what for what, _ in calls} <= {
        "DDP allreduce",
        "DDP broadcast",
        "hypergrad allreduce",
        "hypergrad allreduce vector",
    }
    vectors, scalars = of("hypergrad allreduce vector"), of("hypergrad allreduce")
    return {
        "gradient_bytes": sum(of("DDP allreduce")),
        "buffer_bytes": sum(of("DDP broadcast")),
        "vectors": len(vectors),
        "vector_bytes": sum(vectors),
        "scalar_calls": len(scalars),
        "scalar_bytes": sum(scalars),
    }


def largest(one: Row, other: Row) -> Row:
    numbers = {key: max(one[key], x) for key, x in other.items() if key not in ("kind", "steps")}
    return {"kind": one["kind"], "steps": one["steps"] + 1, **numbers}


def written_out() -> Iterator[Row]:
    """Bytes that each of many processes sends in a step: gradients, a product of one number, and that in the mean of a plan."""
    with torch.device("meta"):
        nets = {"GPT of 124 M weights": bench_gpt.GPT(bench_gpt.FULL), "ResNet-18": resnet18()}
    for name, model in nets.items():
        n = sum(p.numel() for p in model.parameters())
        for processes in PROCESSES:
            factor = 2 * (processes - 1) / processes
            sent = factor * 4 * n
            yield {
                "rows": "written out", "net": name, "weights": n, "processes": processes, "factor": factor,
                "gradient_bytes": sent, "vector_bytes": sent, "stride": STRIDE, "mean_vector_bytes": sent / STRIDE,
            }  # fmt: skip


def _serve(rank: int, store: str, width: int, folder: str) -> None:
    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=wait)
    rows = [
        row
        for norm, both, tuned in ((False, False, False), (False, False, True), (False, True, True), (True, False, True))
        for row in measure(width, norm, both, tuned)
    ]
    torch.save(rows, Path(folder, str(rank)))
    dist.destroy_process_group()


def main(args: Args) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        spawn(_serve, (str(Path(folder, "store")), args.width, folder), nprocs=2)
        one, other = (torch.load(Path(folder, str(rank))) for rank in range(2))
    if one != other:
        raise SystemExit("the two processes counted different collectives")
    rows = [*one, *written_out()]
    results.write(Path(args.out, "ddp_bytes.json"), command(args), rows)
    for row in rows:
        print(row)
    return rows


if __name__ == "__main__":
    main(parse(Args))
