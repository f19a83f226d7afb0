"""What it takes until the workers of `optimize(n_jobs=2)` run trials.

    python -m experiments.worker_start [--trials 12] [--seconds 0.7] [--quick]

Trials that only wait, in processes, again in processes, and in threads. A row each: seconds of the call; seconds until the first
trial begins; how many processes ran trials; and the processor seconds that each of these had used when its first trial began,
added up, which a busy machine changes little. What a process that they are forks of has used is not among these: it is part of
the seconds of the first row.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import results
from experiments.arguments import arg, command, parse
from hypergrad.search import Float, Trial, optimize

Row = dict[str, Any]
CALLS = (("processes", "processes"), ("processes, again", "processes"), ("threads", "threads"))


@dataclass
class Args:
    """Start-up of the workers of hypergrad.search.optimize."""

    trials: int = arg(12, "trials of a call", quick=4)
    seconds: float = arg(0.7, "of a trial", quick=0.1)
    n_jobs: int = arg(2, "trials at a time")
    strategy: str = arg("tpe", "of the search")
    out: str = arg("runs/worker_start", "folder of the result", quick="runs/worker_start_quick")
    quick: bool = arg(False, "four short trials: a test of the machinery")


def wait(params: dict[str, Any], trial: Trial) -> float:
    for name, value in (("began", time.time()), ("process", os.getpid()), ("cpu", time.process_time())):
        trial.note(name, value)
    time.sleep(params["seconds"])
    return params["x"]


def row(name: str, workers: str, args: Args) -> Row:
    space, began = {"x": Float(0, 1), "seconds": args.seconds}, time.time()
    study = optimize(wait, space, args.strategy, args.trials, n_jobs=args.n_jobs, workers=workers, progress=False)
    seconds, trials = time.time() - began, sorted((each.notes for each in study.trials), key=lambda x: x["began"])
    first = {each["process"]: each["cpu"] for each in reversed(trials)}
    return {
        "workers": name,
        "seconds": round(seconds, 2),
        "until_first_trial": round(trials[0]["began"] - began, 2),
        "processes": len(first),
        "cpu_before_trials": round(sum(first.values()), 2) if workers == "processes" else None,
    }


def main(argv: list[str] | None = None) -> list[Row]:
    args, rows = parse(Args, argv), []
    for name, workers in CALLS:
        rows.append(row(name, workers, args))
        print(", ".join(f"{key} {value}" for key, value in rows[-1].items()))
    results.write(Path(args.out) / "worker_start.json", command(args), rows)
    return rows


if __name__ == "__main__":
    main()
