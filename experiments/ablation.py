"""What is each policy of the online method worth? Every suite that a policy was written for, tuned with it and without.

    python -m experiments.ablation [--suites workloads small] [--policies NewtonClimb Phases] [--seed 0] [--quick]

A run is one workload from one start, on one seed, in one suite (see SUITES); it is made with `hypergrad.policies.DEFAULT` and
once without each policy. With ρ = log of the validation loss at the end without the policy over that with it, of the same start
and seed, a summary row for each policy and suite has

    mean, upper              mean of ρ over runs, and the upper end of its 95 % interval (Student's t), both as exp(·)
    worst, worst_workload    the largest mean over a workload's runs
    lost                     runs that end without a number without the policy, and with one otherwise; the means leave them out

and a row for each policy over all suites that it was left out in. `removable` is true where upper < 1.005, worst < 1.03 and no
run is lost: without such a policy the method would be no worse. Seeds are below 1000, so test losses are not read. For the noisy
quadratic (see `experiments.noisy_quadratic`), which has no validation set, the loss is the one without noise.
"""

from __future__ import annotations

import math
import os
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t as student

from experiments import noisy_quadratic, results
from experiments.arguments import arg, command, parse
from experiments.invariance import UNSEEN
from experiments.robustness import CASES, Disturbed
from experiments.sweep import sweep
from experiments.workloads import COMPARED, FAMILIES, WORKLOADS, Batch, train_tuned
from hypergrad.policies import DEFAULT, AdamOnPhi, without

Row = dict[str, Any]
REMOVABLE = {type(policy).__name__: type(policy) for policy in DEFAULT if not isinstance(policy, AdamOnPhi)}
NOTHING = "nothing"  # is left out
UPPER, WORST = 1.005, 1.03


@dataclass(frozen=True)
class Suite:
    """Runs of one kind.

    Attributes:
        workloads: names in WORKLOADS or QUADRATICS.
        starts: (lr, weight decay).
        steps: training steps of a run; 0: the workload's own.
        known: whether the tuner is told how many.
        optimizer: a name in the workloads' table of optimizers, in place of the workload's own.
        policies: those left out in it, where it is for them alone; empty: all.
    """

    workloads: tuple[str, ...]
    starts: tuple[tuple[float, float], ...]
    tune: tuple[str, ...] = ("lr", "weight_decay")
    case: str = "undisturbed"
    steps: int = 0
    known: bool = True
    optimizer: str = ""
    policies: tuple[str, ...] = ()

    def without(self, policies: tuple[str, ...]) -> tuple[str, ...]:
        """Those of `policies` that are left out in it."""
        return tuple(name for name in policies if not self.policies or name in self.policies)


QUADRATICS = {f"p{q.p:g}_s{q.s2:g}_T{q.T}": q for q in noisy_quadratic.PROBLEMS if q.T <= 2000}
ABOUT_OTHERS = ("MomentumStart", "LrMomentumCoupling", "WeightDecaySizing", "LrDecayCoupling")  # than lr
FEW = ("mlp_digits", "diabetes", "friedman", "cnn_mnist1d")
BY_SGD = ("logistic_fashion", "mlp_fashion", "cnn_mnist1d", "diabetes")
SUITES = {
    "workloads": Suite(tuple(COMPARED), ((1e-5, 1e-5), (0.1, 1e-3))),
    "small": Suite(tuple(FAMILIES["small"]), ((1e-5, 1e-2), (1e-2, 1e-2))),
    "hot": Suite(FEW, ((10.0, 1e-4), (100.0, 1e-4))),
    "spikes": Suite(FEW, ((1e-3, 1e-4),), case="spikes"),
    "nan": Suite(FEW, ((1e-3, 1e-4),), case="nan"),
    "shuffled": Suite(FEW, ((1e-3, 1e-4),), case="shuffled"),
    "momentum": Suite(BY_SGD, ((1e-4, 1e-4), (0.1, 1e-4)), ("lr", "weight_decay", "momentum")),
    "low_momentum": Suite(
        BY_SGD,
        ((1e-4, 1e-4), (0.1, 1e-4)),
        ("lr", "weight_decay", "momentum"),
        optimizer="SGD, momentum 0.5",
        policies=("MomentumStart", "LrMomentumCoupling"),
    ),
    "open": Suite(FEW, ((1e-4, 1e-4), (1e-2, 1e-4)), known=False),
    "short": Suite(FEW, ((1e-4, 1e-4), (1e-2, 1e-4)), steps=120),
    "quadratic": Suite(
        tuple(QUADRATICS),
        ((1e-5, 0.0), (10.0, 0.0)),
        ("lr",),
        policies=tuple(name for name in REMOVABLE if name not in ABOUT_OTHERS),
    ),
}


@dataclass
class Args:
    """Tune with every policy left out in turn. Finished runs are kept; call it again to go on."""

    suites: tuple = arg(tuple(SUITES), "any of them", quick=("short",))
    policies: tuple = arg(tuple(REMOVABLE), "any of them", quick=("NewtonClimb", "Phases"))
    seeds: int = arg(1, "runs of each start")
    seed: int = arg(0, "the first of the seeds, below 1000")
    steps: int = arg(0, "training steps of a run; 0: the suite's", quick=40)
    jobs: int = arg(os.cpu_count() or 1, "processes, each with one thread", quick=1)
    out: str = arg("runs/ablation", "folder of finished runs and result", quick="runs/ablation_quick")
    quick: bool = arg(False, "a few steps of one suite: a test of the machinery")


def items(args: Args) -> Iterator[Row]:
    """What is to be run: seed by seed, so that an interrupted sweep has whole seeds."""
    for seed in range(args.seed, args.seed + args.seeds):
        for name in args.suites:
            suite = SUITES[name]
            left_outs = suite.without(args.policies)
            for left_out in (NOTHING, *left_outs) if left_outs else ():
                for workload in suite.workloads:
                    for lr, wd in suite.starts:
                        steps = args.steps or suite.steps or own_steps(workload)
                        yield {
                            "suite": name, "workload": workload, "seed": seed, "steps": steps,
                            "start_lr": lr, "start_weight_decay": wd, "without": left_out,
                        }  # fmt: skip


def own_steps(workload: str) -> int:
    return QUADRATICS[workload].T if workload in QUADRATICS else WORKLOADS[workload].steps


def run(item: Row) -> Row:
    """One item of the sweep."""
    left_out = [] if item["without"] == NOTHING else [REMOVABLE[item["without"]]]
    options: Row = {"cost": None, "policies": without(DEFAULT, *left_out)}  # every hypergradient is whole
    if not SUITES[item["suite"]].known:
        options["total_steps"] = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # roll-backs are counted
        return item | (run_quadratic if item["workload"] in QUADRATICS else run_workload)(item, options)


def run_workload(item: Row, options: Row) -> Row:
    suite, workload = SUITES[item["suite"]], WORKLOADS[item["workload"]]
    task = replace(workload, optimizer=suite.optimizer or workload.optimizer).build(item["seed"], False, item["steps"])
    events = CASES[suite.case].at(task.steps)

    def disturb(step: int, batch: Batch) -> Disturbed:
        return events[step](batch, step) if step in events else (batch, 1.0)

    row = train_tuned(task, item["start_lr"], item["start_weight_decay"], suite.tune, disturb, **options)
    return {name: row[name] for name in ("val", "end_lr", "end_weight_decay", "rollbacks", "seconds")}


def run_quadratic(item: Row, options: Row) -> Row:
    problem = QUADRATICS[item["workload"]]._replace(T=item["steps"])
    _, row = noisy_quadratic.fit(problem, item["seed"], item["start_lr"], **options)
    return {"val": row["final_loss"], "end_lr": row["end_lr"], "seconds": row["seconds"]}


def summary(policy: str, suite: str, pairs: list[tuple[str, float | None, float | None]]) -> Row:
    """pairs: workload, validation loss without the policy, with it."""
    ratios: dict[str, list[float]] = defaultdict(list)
    for workload, one, other in pairs:
        if one and other:
            ratios[workload].append(math.log(one / other))
    lost = sum(one is None and other is not None for _, one, other in pairs)
    every = [x for xs in ratios.values() for x in xs]
    if not every:
        nothing = dict.fromkeys(("mean", "upper", "worst", "worst_workload"))
        counts = {"runs": len(pairs), "lost": lost, "removable": False}
        return {"kind": "summary", "without": policy, "suite": suite, **nothing, **counts}
    worst = max(ratios, key=lambda workload: fmean(ratios[workload]))
    margin = (
        float(student.ppf(0.975, len(every) - 1)) * stdev(every) / math.sqrt(len(every)) if len(every) > 1 else math.inf
    )
    row = {
        "kind": "summary", "without": policy, "suite": suite, "runs": len(pairs), "mean": math.exp(fmean(every)),
        "upper": math.exp(fmean(every) + margin) if margin < math.inf else None,
        "worst": math.exp(fmean(ratios[worst])), "worst_workload": worst, "lost": lost,
    }  # fmt: skip
    upper = row["upper"]
    return row | {"removable": upper is not None and upper < UPPER and row["worst"] < WORST and not lost}


def summarised(args: Args, rows: list[Row]) -> list[Row]:
    """A row for each policy and suite, and one for each policy over all suites."""
    key = ("suite", "workload", "seed", "steps", "start_lr", "start_weight_decay")
    found = {(row["without"], *(row[name] for name in key)): row["val"] for row in rows}
    out = []
    for policy in args.policies:
        of_policy = []
        for suite in args.suites:
            if not SUITES[suite].without((policy,)):
                continue
            pairs = [
                (item["workload"], found.get((policy, *place)), found.get((NOTHING, *place)))
                for item in items(args)
                if item["suite"] == suite and item["without"] == policy
                for place in [tuple(item[name] for name in key)]
            ]
            out.append(summary(policy, suite, pairs))
            of_policy += [(f"{suite}/{workload}", one, other) for workload, one, other in pairs]
        if of_policy:
            out.append(summary(policy, "all", of_policy))
    return out


def main(args: Args) -> None:
    for name in args.suites:
        if name not in SUITES:
            raise ValueError(f"no suite {name!r}: choose from {', '.join(SUITES)}.")
    for name in args.policies:
        if name not in REMOVABLE:
            raise ValueError(f"no policy {name!r} that can be left out: choose from {', '.join(REMOVABLE)}.")
    if args.seed + args.seeds > UNSEEN:
        raise ValueError(f"seeds from {UNSEEN} on are for reports: choose --seed and --seeds below.")
    out = Path(args.out)
    rows = sweep(run, list(items(args)), out / "ablation.jsonl", args.jobs)
    summaries = summarised(args, rows)
    results.write(out / "ablation.json", command(args), summaries, one_line_a_row=True)
    print("validation loss without a policy over that with it: mean, upper end of 95 %, worst workload")
    for row in summaries:
        if row["suite"] == "all":
            verdict = "removable" if row["removable"] else ""
            numbers = (math.nan if row[name] is None else row[name] for name in ("mean", "upper", "worst"))
            shown = "".join(f"{x:8.3f}" for x in numbers)
            print(f"{row['without']:22s}{shown} {row['worst_workload'] or '':32s}{row['lost']:4d} lost  {verdict}")


if __name__ == "__main__":
    main(parse(Args))
