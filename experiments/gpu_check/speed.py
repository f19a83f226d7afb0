"""The checks of `speed`: seconds and memory of tuned runs, of tuned steps and of `hypergradient` over those of plain steps."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import hypergrad
from experiments.gpu_check.models import WORKLOADS, Workload
from experiments.gpu_check.rows import Check, Place, Row
from hypergrad.policies import DEFAULT, LrWarmStart, Phases, replaced, without

BLOCKS = (3, 7)  # at least, and at most, of plain and of other steps by turns
SECONDS = 12.0  # of a row, after which no further pair of blocks begins once there are the least


class Device:
    """Time and memory of blocks of steps. Memory is None where torch does not count it."""

    def __init__(self, place: Place):
        self.cuda = place.cuda
        if self.cuda:  # cuBLAS's workspace, which would count as the first block's
            x = torch.ones(64, 64, device=place.device, requires_grad=True)
            x.mm(x).sum().backward()

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def allocated(self) -> int:
        self.wait()
        return torch.cuda.memory_allocated() if self.cuda else 0

    def block(self, work: Callable[[], None]) -> tuple[float, int]:
        """Seconds of a piece of work, and the peak of allocated memory in it."""
        self.wait()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - began, torch.cuda.max_memory_allocated() if self.cuda else 0


class Training:
    """A training loop of its own, plain or in one of the forms. `step_all(n)` takes n steps."""

    def __init__(self, workload: Workload, place: Place, form: str = "plain", run: int = 0, cost: float | None = None):
        """run: the length of a whole run, tuned by the defaults at that cost."""
        self.form = form
        self.model, self.loss, self.val_loss = workload.build(place.device, place.quick)
        self.optimizer = workload.optimizer(self.model.parameters())
        self.tuner: hypergrad.Tuner | None = None
        if run:  # validated on the batch that it trains on, as made-up data has nothing to generalise
            self.tuner = hypergrad.Tuner(self.model, self.optimizer, self.loss, total_steps=run, cost=cost)
        if form in ("tuned", "resting"):  # far from its end, lr alone is tuned: one product a step; or nothing is
            policies = without(DEFAULT, LrWarmStart)
            if form == "resting":
                policies = replaced(policies, Phases(0.0, 0.0, 0.0))
            self.tuner = hypergrad.Tuner(
                self.model, self.optimizer, self.val_loss, total_steps=100_000, policies=policies, cost=None
            )

    def step_all(self, n: int) -> None:
        if self.form == "hypergradient":
            hypergrad.hypergradient(self.model, self.optimizer, self._loss_of, [None] * n, self.val_loss)
            return
        for _ in range(n):
            self.plain_step() if self.tuner is None else self.tuned_step(self.tuner)

    def _loss_of(self, model: nn.Module, batch: Any) -> Tensor:
        return self.loss()

    def plain_step(self) -> None:
        loss = self.loss()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def tuned_step(self, tuner: hypergrad.Tuner) -> None:
        loss = self.loss()
        self.optimizer.zero_grad()
        tuner.backward(loss)
        self.optimizer.step()

    def products(self) -> int:
        return self.tuner.stats["hessian_products"] if self.tuner else 0


def measure(place: Place, name: str, form: str, steps: int = 0) -> Row:
    """Blocks of plain steps and of the form's steps by turns. steps: of one long block; 0: short ones."""
    began, workload, device = time.perf_counter(), WORKLOADS[name], Device(place)
    n = steps or (workload.steps if form == "hypergradient" else workload.block)
    n = min(n, 4) if place.quick else n
    least, most = (1, 1) if steps else (2, 2) if place.quick else BLOCKS
    empty = device.allocated()
    plain = Training(workload, place)
    plain.step_all(3)
    beside = device.allocated()  # what stays of the plain loop while the other runs
    other = Training(workload, place, form)
    for _ in range(3):  # the optimizer's state is there, as in the middle of a run
        other.plain_step() if other.tuner is None else other.tuned_step(other.tuner)
    if form == "hypergradient":
        other.step_all(min(n, workload.steps))
    present, products = device.allocated() - beside, other.products()
    blocks: list[tuple[float, int, float, int]] = []
    while len(blocks) < least or (len(blocks) < most and time.perf_counter() - began < SECONDS):
        resting = device.allocated() - beside  # the other loop's
        seconds, peak = device.block(partial(plain.step_all, n))
        seconds_other, peak_other = device.block(partial(other.step_all, n))
        blocks.append((seconds, peak - resting - empty, seconds_other, peak_other - beside))
    plain_ms, ms = (1000 * median(block[i] for block in blocks) / n for i in (0, 2))
    plain_bytes, most_bytes = (max(block[i] for block in blocks) for i in (1, 3))
    row: Row = {
        "workload": name,
        "form": form,
        "blocks": len(blocks),
        "steps_a_block": n,
        "plain_ms": round(plain_ms, 4),
        "ms": round(ms, 4),
        "ratio": round(median(block[2] / block[0] for block in blocks), 3),
        "plain_bytes": plain_bytes if place.cuda else None,
        "bytes": most_bytes if place.cuda else None,
        "resting_bytes": present if place.cuda else None,
        "memory_ratio": round(most_bytes / plain_bytes, 3) if place.cuda else None,
    }
    if other.tuner is not None:
        row["products_a_step"] = (other.products() - products) / (n * len(blocks))
        stats = other.tuner.stats
        row["passed_over"] = stats["rollbacks"] + stats["spikes"] + stats["nonfinite_steps"]
    if not all(bool(torch.isfinite(p).all()) for p in other.model.parameters()):
        raise AssertionError("weights are not finite")
    memory = f", memory {row['memory_ratio']:.2f} times" if place.cuda else ""
    line = f"a step {ms:.3g} ms, plain {plain_ms:.3g} ms: {row['ratio']:.2f} times{memory}"
    return {"detail": line, **row}


def whole_run(place: Place, name: str, cost: float) -> Row:
    """A run tuned by the defaults at a cost, from its first step to its last; blocks of plain steps before it."""
    workload, device = WORKLOADS[name], Device(place)
    n, block = (40, 4) if place.quick else (workload.run, workload.block)
    empty = device.allocated()
    plain = Training(workload, place)
    plain.step_all(3)
    blocks = [device.block(partial(plain.step_all, block)) for _ in range(BLOCKS[0])]
    plain_ms, plain_bytes = 1000 * median(seconds for seconds, _ in blocks) / block, max(x for _, x in blocks) - empty
    del plain
    beside = device.allocated()
    other = Training(workload, place, f"cost={cost:g}", n, cost)
    tuner = other.tuner
    assert tuner is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # blow-ups, which the row counts
        seconds, peak = device.block(partial(other.step_all, n))
    ratio, stats, plan = 1000 * seconds / n / plain_ms, tuner.stats, tuner.plan
    row: Row = {
        "workload": name,
        "form": other.form,
        "steps": n,
        "plain_ms": round(plain_ms, 4),
        "ms": round(1000 * seconds / n, 4),
        "ratio": round(ratio, 3),
        "plain_bytes": plain_bytes if place.cuda else None,
        "bytes": peak - beside if place.cuda else None,
        "memory_ratio": round((peak - beside) / plain_bytes, 3) if place.cuda else None,
        "products_a_step": stats["hessian_products"] / n,
        "plan": None if plan is None else plan.state_dict(),
        "rollbacks": stats["rollbacks"],
        "backtracks": stats["backtracks"],
        "passed_over": stats["spikes"] + stats["nonfinite_steps"],
    }
    tuner.close()
    memory = f", memory {row['memory_ratio']:.2f} times" if place.cuda else ""
    return {"detail": f"{n} steps took {ratio:.2f} times the seconds of plain ones of {plain_ms:.3g} ms{memory}", **row}


# by value: whole runs as users have them, on large nets; single steps and hypergradients, most used first; then the rest
ORDER = (
    ("MLP, SGD with momentum", "tuned"),
    ("ResNet-18, bf16", "tuned"),
    ("GPT of 124 M weights, bf16", "tuned"),
    ("GPT of 124 M weights, bf16", "resting"),
    ("ResNet-18, bf16", "hypergradient"),
    ("MLP, SGD with momentum", "hypergradient"),
    ("GPT of 124 M weights, bf16", "hypergradient"),
    ("ResNet-18, bf16", "resting"),
    ("MLP, AdamW", "tuned"),
    ("MLP, AdamW", "hypergradient"),
    ("MLP, AdamW", "resting"),
    ("MLP, SGD with momentum", "resting"),
)
RUNS = (
    ("GPT of 124 M weights, bf16", 2.0),
    ("ResNet-18, bf16", 2.0),
    ("ResNet-18, bf16", 1.15),
    ("GPT of 124 M weights, bf16", 1.15),
)
SMALL_RUNS = (("MLP, AdamW", 2.0), ("MLP, AdamW", 1.15))
LONG = 200  # steps of the hypergradient of a whole run


def _runs(pairs: tuple[tuple[str, float], ...]) -> dict[str, Check]:
    return {f"{name}: cost={cost:g}": partial(whole_run, name=name, cost=cost) for name, cost in pairs}


CHECKS: dict[str, Check] = {
    **_runs(RUNS),
    f"ResNet-18, bf16: hypergradient over {LONG} steps": partial(
        measure, name="ResNet-18, bf16", form="hypergradient", steps=LONG
    ),
    **_runs(SMALL_RUNS),
    **{f"{name}: {form}": partial(measure, name=name, form=form) for name, form in ORDER},
}
