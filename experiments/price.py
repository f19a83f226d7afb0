"""What does tuning cost, in seconds and bytes, and what is it worth at that price?

    python -m experiments.price [--costs 1.15 1.5 2 3] [--workloads cnn_fashion] [--family realistic] [--form open] [--quick]

kind "run": a tuned run with `Tuner(cost=...)` and a plain run of the same workload, start and seed, by turns in blocks of 50
steps in one process on one thread: CPU seconds of the one over those of the other, each as a whole, with all that happens in it
(the measuring of the first steps, readings of the validation loss), and the loss at its end. `cost` null: no bound. `form`
"open": without `total_steps`; "scheduler": lr decays by a CosineAnnealingLR of the loop's own, in both runs; else "default".

kind "summary": the geometric means over workloads, and of loss over L* (the best of a grid of plain runs, pools.json), where it
is known; those of workloads whose plain step takes less than 2 ms apart, since there Python's share rules.

kind "family": the same of a whole family, with the regret of its best and of its worst seed.

kind "resting": a ResNet-18 of 5 million weights on images of 32×32: steps in which nothing is tuned and no validation loss read,
over plain steps, less 1: median of 7 turns of 4 steps.

kind "tangents": the same of steps in which one number is tuned and no product is formed.

kind "bytes": the largest sum of tensors alive at once (counted at every operation, inside the backward pass too; not what a
kernel takes for itself) in 24 tuned steps, less that of 24 plain ones, of the same net with a batch of 2, in units of 4 n
bytes, n its number of weights; "late" is the same in the 24 steps after the fiftieth.
"""

from __future__ import annotations

import math
import statistics
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import hypergrad
from experiments import results
from experiments.arguments import arg, command, parse
from experiments.gpu_check.models import resnet18
from experiments.invariance import UNSEEN
from experiments.sweep import sweep
from experiments.workloads import FAMILIES, WORKLOADS, chosen
from hypergrad.policies import DEFAULT, LrWarmStart, Phases, replaced, without

Row = dict[str, Any]
BLOCK = 50  # steps
SHORT_MS = 2.0  # of a plain step
WIDTH = 43  # of the ResNet-18 of 5 million weights
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD with momentum": lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9, weight_decay=1e-4),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-4),
}
FORMS = {"default": 1000, "no total_steps": None, "cost=1.15": 1000}


@dataclass
class Args:
    """Seconds, bytes and losses of tuned runs beside plain ones."""

    costs: tuple = arg((1.15, 1.5, 2.0, 3.0), "bounds; 0 for none", quick=(2.0,))
    workloads: tuple = arg((), "any of one family (default: the family's)")
    family: str = arg("main", "main, small or realistic")
    starts: tuple = arg((1e-5, 0.1), "learning rates; weight decay is 1e-4", quick=(1e-3,))
    seed: int = arg(0, "the first of the seeds; test losses are read from 1000 on")
    seeds: int = arg(1, "runs of each start")
    form: str = arg("default", "default, open or scheduler")
    steps: int = arg(0, "training steps of a run; 0: the workload's own", quick=60)
    parts: tuple = arg(
        ("run", "resting", "tangents", "bytes"), "kinds of rows that are made; the others stay as the result has them"
    )
    out: str = arg("runs/price", "folder of finished runs and result", quick="runs/price_quick")
    quick: bool = arg(False, "a few steps: a test of the machinery")


# ---- whole runs


class Loop:
    """A run that goes on block by block, and its CPU seconds."""

    def __init__(self, item: Row, tuned: bool):
        task = WORKLOADS[item["workload"]].build(item["seed"], False, item["steps"])
        self.task, self.seconds = task, 0.0
        began = time.process_time()
        self.optimizers = task.make_optimizers(item["start_lr"], item["start_weight_decay"])
        shaped = self.optimizers if item["form"] == "scheduler" else ()
        self.schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(opt, task.steps) for opt in shaped]
        total = None if item["form"] == "open" else task.steps
        self.tuner: hypergrad.Tuner | None = None
        if tuned:
            self.tuner = hypergrad.Tuner(
                task.model, self.optimizers, task.val_loss, total_steps=total, seed=task.seed, cost=item["cost"]
            )
        self.seconds += time.process_time() - began
        self.batches = task.batches()

    def block(self) -> bool:
        """Train for a block. False: the run was over."""
        batches = list(islice(self.batches, BLOCK))
        began = time.process_time()
        for batch in batches:
            loss = self.task.loss(self.task.model, batch)
            for opt in self.optimizers:
                opt.zero_grad()
            loss.backward() if self.tuner is None else self.tuner.backward(loss)
            for stepping in (*self.optimizers, *self.schedulers):
                stepping.step()
        self.seconds += time.process_time() - began
        return bool(batches)


def run(item: Row) -> Row:
    """One item of the sweep."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # roll-backs
        plain, tuned = Loop(item, False), Loop(item, True)
        while plain.block() and tuned.block():
            pass
    tuner = tuned.tuner
    assert tuner is not None
    split = "test" if item["seed"] >= UNSEEN else "val"
    plan = (
        {}
        if tuner.plan is None
        else {f"plan_{name}": x for name, x in tuner.plan.state_dict().items() if name != "cost"}
    )
    row = {
        "plain_ms": 1000 * plain.seconds / tuned.task.steps, "seconds": tuned.seconds / plain.seconds, "split": split,
        "loss": tuned.task.evaluate(split), "plain_loss": plain.task.evaluate(split), **plan,
        "products_a_step": tuner.stats["hessian_products"] / tuned.task.steps, "end_lr": float(tuner.values["lr"].mean()),
    }  # fmt: skip
    tuner.close()
    return item | row


def items(args: Args) -> Iterator[Row]:
    for seed in range(args.seed, args.seed + args.seeds):
        for cost in args.costs:
            for name in chosen(args)[1]:
                for lr in args.starts:
                    yield {
                        "workload": name, "cost": cost or None, "start_lr": lr, "start_weight_decay": 1e-4, "seed": seed,
                        "form": args.form, "steps": WORKLOADS[name].length(False, args.steps),
                    }  # fmt: skip


def best_of_grid(name: str, split: str) -> float | None:
    """L* of a workload; None where it is not known."""
    for pools in map(results.load, ("pools.json", "pools_small.json", "pools_realistic.json")):
        for row in pools["rows"] if pools else ():
            if row.get("kind") == "summary" and row["workload"] == name:
                return row["l_star" if split == "test" else "val_l_star"]
    return None


def summaries(rows: list[Row]) -> Iterator[Row]:
    """For each bound one row of workloads whose plain step is short, and one of the others."""
    for cost in dict.fromkeys(row["cost"] for row in rows):
        for short in (True, False):
            mine = [row for row in rows if row["cost"] == cost and (row["plain_ms"] < SHORT_MS) is short]
            names = list(dict.fromkeys(row["workload"] for row in mine))
            if not names:
                continue
            found = regrets(mine)
            yield {
                "kind": "summary", "cost": cost, "short_steps": short, "workloads": len(names), "runs": len(mine),
                "seconds": geometric_mean(row["seconds"] for row in mine), "largest": max(row["seconds"] for row in mine),
                "regret": geometric_mean(found.values()) if found else None, "regret_of": len(found),
            }  # fmt: skip


def regrets(rows: list[Row]) -> dict[str, float]:
    """For each workload whose L* is known, the mean loss of its runs over L*."""
    found = {}
    for name in dict.fromkeys(row["workload"] for row in rows):
        best = best_of_grid(name, rows[0]["split"])
        losses = [row["loss"] for row in rows if row["workload"] == name]
        if best is not None and all(x is not None and math.isfinite(x) for x in losses):
            found[name] = fmean(losses) / best
    return found


def families(rows: list[Row]) -> Iterator[Row]:
    """For each bound, split and family of which every workload was run, seconds and regret, with the least and most of a seed."""
    for family, names in FAMILIES.items():
        for cost, split in dict.fromkeys((row["cost"], row["split"]) for row in rows):
            mine = [row for row in rows if (row["cost"], row["split"]) == (cost, split) and row["workload"] in names]
            found = regrets(mine) if mine else {}
            if len(found) < len(names):
                continue
            seeds = {row["seed"] for row in mine}
            of_seed = [geometric_mean(regrets([row for row in mine if row["seed"] == x]).values()) for x in seeds]
            worst = max(found, key=lambda name: found[name])
            yield {
                "kind": "family", "family": family, "cost": cost, "split": split, "seeds": len(seeds), "runs": len(mine),
                "seconds": geometric_mean(row["seconds"] for row in mine), "regret": geometric_mean(found.values()),
                "low": min(of_seed), "high": max(of_seed), "worst": found[worst], "worst_workload": worst,
            }  # fmt: skip


# ---- steps in which nothing is due, and bytes


def net(width: int, batch: int) -> tuple[nn.Module, Callable[[], Tensor]]:
    torch.manual_seed(0)
    model = resnet18(width)
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    return model, lambda: cross_entropy(model(x), y)


def stepper(model: nn.Module, loss: Callable[[], Tensor], optimizer: str, **options: Any) -> Callable[[], None]:
    """A step of a plain loop, or, with options, of a tuned one."""
    opt = OPTIMIZERS[optimizer](model.parameters())
    tuner = hypergrad.Tuner(model, opt, loss, **options) if options else None

    def step() -> None:
        opt.zero_grad()
        value = loss()
        value.backward() if tuner is None else tuner.backward(value)
        opt.step()

    return step


NOTHING_TUNED: Row = {
    "every": 10**6,
    "policies": replaced(without(DEFAULT, LrWarmStart), Phases(step_share=0.0, longest_share=0.0, last_share=0.0)),
}
# one number, without products and readings once the plan rules
NO_PRODUCTS: Row = {"tune": "lr", "warm_start": False, "plan": hypergrad.Plan(2.0, 2.0, 1.0, 10**6, 10**6, 10**6)}
WITHOUT: dict[str, tuple[Row, int]] = {"resting": (NOTHING_TUNED, 2), "tangents": (NO_PRODUCTS, 30)}  # and steps before


def steps_without(kind: str, optimizer: str, quick: bool) -> Row:
    """Seconds of steps of a kind in WITHOUT."""
    width, batch = (4, 2) if quick else (WIDTH, 16)
    options, before = WITHOUT[kind]
    (one, loss), (other, other_loss) = net(width, batch), net(width, batch)
    plain = stepper(one, loss, optimizer)
    tuned = stepper(other, other_loss, optimizer, total_steps=10**6, **options)
    seconds: dict[str, list[float]] = {"plain": [], "tuned": []}
    for step in (plain, plain, *[tuned] * before):
        step()
    for _ in range(2 if quick else 7):
        for name, step in (("plain", plain), ("tuned", tuned)):
            began = time.process_time()
            for _ in range(4):
                step()
            seconds[name].append((time.process_time() - began) / 4)
    more = statistics.median(b / a for a, b in zip(seconds["plain"], seconds["tuned"], strict=True)) - 1
    n = sum(p.numel() for p in one.parameters())
    return {
        "kind": kind,
        "optimizer": optimizer,
        "weights": n,
        "batch": batch,
        "plain_ms": 1000 * statistics.median(seconds["plain"]),
        "more": more,
    }


class Alive(TorchDispatchMode):
    """Sums up the bytes of tensors that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def note(self, x: Any) -> None:
        if not isinstance(x, Tensor):
            return
        storage = x.untyped_storage()
        if id(storage) in self.known:
            return
        self.known.add(id(storage))
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, id(storage), storage.nbytes())

    def _gone(self, which: int, size: int) -> None:
        self.known.discard(which)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map(self.note, out)
        return out


def peaks(form: str, optimizer: str, quick: bool) -> tuple[int, int, int]:
    """The most bytes alive in the first 24 steps, and in 24 after fifty, and n."""
    with Alive() as alive:
        model, loss = net(4 if quick else WIDTH, 2)
        length, late = (3, 6) if quick else (24, 50)
        options: Row = {}
        if form != "plain":
            options = {"total_steps": FORMS[form], "cost": 1.15 if form == "cost=1.15" else 2.0}
        step, found = stepper(model, loss, optimizer, **options), []
        for t in range(late + length):
            if t in (0, late):
                alive.peak = alive.now
            step()
            if t + 1 in (length, late + length):
                found.append(alive.peak)
    return found[0], found[1], sum(p.numel() for p in model.parameters())


def bytes_of(optimizer: str, quick: bool) -> Iterator[Row]:
    """A row for each form."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # roll-backs
        found = {form: peaks(form, optimizer, quick) for form in ("plain", *FORMS)}
    for form in FORMS:
        n, plain = found[form][2], found["plain"]
        early, late = ((a - b) / (4 * n) for a, b in zip(found[form][:2], plain[:2], strict=True))
        yield {"kind": "bytes", "form": form, "optimizer": optimizer, "weights": n, "more": early, "late": late}


def main(args: Args) -> list[Row]:
    torch.set_num_threads(1)
    if args.form not in ("default", "open", "scheduler"):
        raise SystemExit(f"--form: default, open or scheduler, not {args.form}")
    out = Path(args.out)
    before = results.load("price.json", out) or {"rows": []}
    parts = {"summary": "run", "family": "run"}  # kinds whose part has another name
    rows: list[Row] = [row for row in before["rows"] if parts.get(row["kind"], row["kind"]) not in args.parts]
    if "run" in args.parts:
        todo = list(items(args))
        kept = sweep(run, todo, out / "price.jsonl")
        mine = [row for row in kept if any(item.items() <= row.items() for item in todo)] if args.quick else kept
        default = [row for row in mine if row["form"] == "default"]
        rows += [*summaries(default), *families(default)]
        rows += [{"kind": "run", "family": WORKLOADS[row["workload"]].family, **row} for row in mine]
    for optimizer in OPTIMIZERS:
        rows += [steps_without(kind, optimizer, args.quick) for kind in WITHOUT if kind in args.parts]
        rows += list(bytes_of(optimizer, args.quick)) if "bytes" in args.parts else []
    results.write(out / "price.json", command(args), rows, one_line_a_row=True)
    for row in rows:
        if row["kind"] != "run":
            print({name: round(x, 3) if isinstance(x, float) else x for name, x in row.items()})
    return rows


if __name__ == "__main__":
    main(parse(Args))
