"""Does a tuned run survive what goes wrong? Starts far too high, spikes of the loss, NaN batches, wrong targets.

    python -m experiments.robustness [--workloads mlp_digits diabetes] [--family small] [--cases spikes nan] [--quick]

Every workload is tuned with the defaults once for each row of CASES and seed; after every step all weights and buffers are
looked at. A summary row for each workload and case has, with the L*, σ and L0 of `pools.json` (see experiments.invariance),

    excess, bound            the mean loss over seeds, less L*, and max(0.06 (L0 − L*), 2σ), what that may be
    nonfinite_weight_steps   steps after which a weight or buffer was not finite, over all its runs
    rollbacks, passed_over   what the tuner did about it

and an overall row for each case the largest excess in units of its bound. From seed 1000 on these are test losses, on seeds
below it validation losses.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiments import results
from experiments.arguments import arg, command, parse
from experiments.invariance import UNSEEN, check, summary
from experiments.pools import summaries
from experiments.sweep import sweep
from experiments.workloads import WORKLOADS, Batch, Task, chosen, train_tuned

Row = dict[str, Any]
Disturbed = tuple[Batch, float]  # a batch, and the factor on its loss
SPIKE = 1e4
SHORTEST = 50  # steps in which every disturbance has a step of its own


def spike(batch: Batch, step: int) -> Disturbed:
    """A loss, and a gradient, far too large and finite."""
    return batch, SPIKE


def not_a_number(batch: Batch, step: int) -> Disturbed:
    """Inputs that are NaN; where they are codes and cannot be, the loss is."""
    x, y = batch
    return ((torch.full_like(x, math.nan), y), 1.0) if x.is_floating_point() else (batch, math.nan)


def shuffled(batch: Batch, step: int) -> Disturbed:
    """The batch's targets in another order."""
    x, y = batch
    return (x, y[torch.randperm(len(y), generator=torch.Generator().manual_seed(step))]), 1.0


@dataclass(frozen=True)
class Case:
    """What is wrong with a run.

    Attributes:
        events: (how, when, how many batches in a row); when is the share of the run that is done, or (an int) the step.
    """

    lr: float = 1e-3
    weight_decay: float = 1e-4
    events: tuple[tuple[Callable[[Batch, int], Disturbed], float, int], ...] = ()

    def at(self, steps: int) -> dict[int, Callable[[Batch, int], Disturbed]]:
        """Step, counted from 1, → how it is disturbed, in a run of so many."""
        firsts = [(how, when if isinstance(when, int) else round(when * steps), n) for how, when, n in self.events]
        return {first + i: how for how, first, n in firsts for i in range(n)}


CASES = {
    "undisturbed": Case(),  # what the others are compared with
    "lr_10": Case(lr=10.0),
    "lr_100": Case(lr=100.0),
    "spikes": Case(events=((spike, 0.1, 1), (spike, 0.5, 1), (spike, 0.9, 1))),
    "nan": Case(
        events=((not_a_number, 0.1, 1), (not_a_number, 0.4, 1), (not_a_number, 0.9, 1), (not_a_number, 0.6, 2))
    ),
    "first_steps": Case(events=((not_a_number, 1, 1), (spike, 4, 1), (not_a_number, 6, 1))),  # while lr is first found
    "shuffled": Case(events=((shuffled, 0.2, 5), (shuffled, 0.6, 20))),
}


@dataclass
class Args:
    """Tune every workload through every case. Finished runs are kept; call it again to go on."""

    workloads: tuple = arg((), "any of one family (default: the family's)")
    family: str = arg("main", "the workloads that are run without --workloads: main or small")
    cases: tuple = arg(tuple(CASES), "any of them")
    seeds: int = arg(3, "runs of each case", quick=1)
    seed: int = arg(0, "the first of the seeds; test losses are read from 1000 on")
    steps: int = arg(0, "training steps of a run; 0: the workload's own", quick=SHORTEST)
    full: bool = arg(False, "the larger version of each workload")
    jobs: int = arg(os.cpu_count() or 1, "processes, each with one thread", quick=1)
    pools: str = arg("", "folder of pools.json (default: experiments/results)")
    out: str = arg("runs/robustness", "folder of finished runs and result", quick="runs/robustness_quick")
    quick: bool = arg(False, "a few steps of two workloads: a test of the machinery")


def tuned(task: Task, case: Case) -> Row:
    """The run of one case; what `train_tuned` returns, and how often a weight or buffer was not finite."""
    events, count = case.at(task.steps), 0

    def disturb(step: int, batch: Batch) -> Disturbed:
        return events[step](batch, step) if step in events else (batch, 1.0)

    def after_step() -> None:
        nonlocal count
        count += not all_finite(task.model)

    row = train_tuned(task, case.lr, case.weight_decay, disturb=disturb, after_step=after_step)
    return row | {"nonfinite_weight_steps": count}


def all_finite(model: torch.nn.Module) -> bool:
    """Whether every weight and buffer is a number."""
    return all(bool(torch.isfinite(x).all()) for x in (*model.parameters(), *model.buffers()))


def run(item: Row) -> Row:
    """One item of the sweep."""
    case, task = CASES[item["case"]], WORKLOADS[item["workload"]].build(item["seed"], item["full"], item["steps"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # roll-backs and steps passed over are counted
        row = tuned(task, case)
    if item["seed"] < UNSEEN:
        del row["test"]
    return item | {"start_lr": case.lr, "start_weight_decay": case.weight_decay} | row


COUNTS = ("runs", "rollbacks", "passed_over", "nonfinite_weight_steps")


def of_case(workload: str, case: str, rows: list[Row], pool: Row | None) -> Row:
    """The summary row of one workload and case."""
    ended = summary(workload, rows, pool)
    kept = ("split", "mean", "l_star", "excess", "excess_over_floor", "regret")
    counts = {"runs": len(rows)} | {name: sum(row[name] for row in rows) for name in COUNTS[1:]}
    row = {"workload": workload, "case": case, "kind": "summary"} | {name: ended[name] for name in kept}
    return row | {"bound": ended["floor"]} | counts


def overall(case: str, rows: list[Row]) -> Row:
    """The row of all workloads of a case; null where one of them has no excess."""
    over = [row["excess_over_floor"] for row in rows]
    known = all(x is not None and math.isfinite(x) for x in over)
    out = {"workload": "all", "case": case, "kind": "overall", "split": rows[0]["split"]}
    out |= {name: sum(row[name] for row in rows) for name in COUNTS}
    return out | {"excess_over_floor": max(over) if known else None}


def main(args: Args) -> list[Row]:
    family, names = chosen(args)
    check(args)
    unknown = [name for name in args.cases if name not in CASES]
    if unknown:
        raise SystemExit(f"--cases: unknown {', '.join(unknown)}; choose from {', '.join(CASES)}")
    if args.steps and args.steps < SHORTEST:
        raise SystemExit(f"--steps: 0, or at least {SHORTEST}, so that every disturbance has a step of its own")
    todo = [
        {
            "workload": name,
            "case": case,
            "seed": seed,
            "steps": WORKLOADS[name].length(args.full, args.steps),
            "full": args.full,
        }
        for name in names
        for case in args.cases
        for seed in range(args.seed, args.seed + args.seeds)
    ]
    out, file = Path(args.out), results.stem("robustness", family)
    kept = sweep(run, todo, out / f"{file}.jsonl", min(args.jobs, len(todo)))
    rows = [row for item in todo for row in kept if item.items() <= row.items()]

    pools = summaries(Path(args.pools) if args.pools else results.FOLDER, args.full, family)
    ends = []
    for case in args.cases:
        mine = {name: [r for r in rows if (r["workload"], r["case"]) == (name, case)] for name in names}
        of_workloads = [of_case(name, case, mine[name], pools.get(name)) for name in names]
        ends += [*of_workloads, overall(case, of_workloads)]
    rows = [*ends, *({"kind": "run"} | row for row in rows)]
    results.write(out / f"{file}.json", command(args), rows, one_line_a_row=True)
    show(ends, len(todo))
    return rows


def show(ends: list[Row], runs: int) -> None:
    print(f"\n{ends[0]['split']} losses, {runs} runs: mean over seeds, its excess over L*, and what that may be")
    columns = ("mean", "l_star", "excess", "bound", "excess_over_floor", *COUNTS[1:])
    titles = ("mean", "L*", "excess", "bound", "ratio", "rolled", "passed", "not finite")
    print(f"{'case':<14}{'workload':<22}" + "".join(f"{title:>11}" for title in titles))
    for row in ends:
        numbers = (row.get(name) for name in columns)
        shown = "".join(f"{'–' if x is None else format(x, '.4g'):>11}" for x in numbers)
        print(f"{row['case']:<14}{row['workload']:<22}{shown}")


if __name__ == "__main__":
    main(parse(Args))
