"""A study on a local Ray cluster whose workers are killed while it runs: what is lost, what is counted twice, what it costs.

    python -m experiments.ray_study [--quick]

The same small trials (a linear regression, whose validation loss is reported after each epoch) run on Ray with workers killed,
on Ray undisturbed, in the local process pool, and one after the other in this process. The killer sends SIGKILL, from outside,
to the process whose trial began last, as soon as the log in which every trial writes its number and process has grown to the
next of evenly spaced lengths. Counts are made from the journal file, line by line: a trial is lost if no line ends it, and a
duplicate is a further line that ends it. Overhead is what a trial takes of one worker beyond its own seconds: workers × wall time
/ trials − mean seconds. Then, apart from any study: how many entries a second go into a journal file from 1, 2, 4 and 8 processes
at once, and how many reports a second Ray's workers get through the actor that writes them.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import statistics
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from experiments import results
from experiments.arguments import arg, command, parse
from hypergrad.search import Float, Trial, optimize
from hypergrad.search.ray_workers import Cluster, RemoteReports, ReportActor, connected
from hypergrad.search.records import Record
from hypergrad.search.space import Space
from hypergrad.search.storage import open_storage, open_study, quiet_optuna
from hypergrad.search.strategies import make

Row = dict[str, Any]
SPACE = {"lr": Float(1e-3, 0.3, "log"), "weight_decay": Float(1e-6, 1e-1, "log")}
FINISHED = (1, 2, 3)  # Optuna's states complete, pruned, failed
SET_STATE = 6  # the code of the journal's lines that set a state
NO_PRUNER = make("random", Space(SPACE), 0, {})


@dataclass
class Args:
    """A study on a local Ray cluster whose workers are killed while it runs."""

    trials: int = arg(200, "trials of a study", quick=20)
    workers: int = arg(2, "worker processes")
    kills: int = arg(4, "workers killed", quick=1)
    epochs: int = arg(5, "reports of a trial")
    seconds: float = arg(3.0, "of each measurement of writing", quick=0.3)
    seed: int = arg(0, "of the study")
    quick: bool = arg(False, "a smaller form of all of it")
    out: str = arg("runs/ray_study", "folder for the result")


def regression(folder: str, epochs: int, p: dict[str, Any], trial: Trial) -> float:
    """Validation loss of a linear regression after some epochs of SGD; its number and process go into a log first."""
    with open(Path(folder) / "begun", "a") as file:
        file.write(f"{trial.number} {os.getpid()}\n")
    x = torch.randn(256, 32)
    y = x[:, :1] + 0.5 * torch.randn(256, 1)
    model = torch.nn.Linear(32, 1)
    sgd = torch.optim.SGD(model.parameters(), lr=p["lr"], weight_decay=p["weight_decay"])
    value = float("inf")
    for epoch in range(1, epochs + 1):
        for i in torch.randperm(128).split(4):
            sgd.zero_grad()
            ((model(x[i]) - y[i]) ** 2).mean().backward()
            sgd.step()
        with torch.no_grad():
            value = float(((model(x[128:]) - y[128:]) ** 2).mean())
        trial.report(value, epoch)
    return value


class Killer(threading.Thread):
    """Kills the process of the trial that began last, whenever the log has grown to the next of some lengths."""

    def __init__(self, log: Path, at: list[int]):
        super().__init__(daemon=True)
        self.log, self.at, self.killed, self.over = log, at, 0, threading.Event()

    def run(self) -> None:
        for length in self.at:
            while len(lines := self._lines()) < length:
                if self.over.wait(0.001):
                    return
            os.kill(int(lines[-1].split()[1]), signal.SIGKILL)
            self.killed += 1

    def _lines(self) -> list[str]:
        return (
            [x for x in self.log.read_text().splitlines(keepends=True) if x.endswith("\n")] if self.log.exists() else []
        )


def study_row(name: str, args: Args, kills: int, **how: Any) -> tuple[Row, list[Record]]:
    """One study, and what its journal file says of it."""
    with tempfile.TemporaryDirectory() as folder:
        storage, log = Path(folder) / "study.journal", Path(folder) / "begun"
        killer = Killer(log, [round(args.trials * (i + 1) / (kills + 1)) for i in range(kills)])
        killer.start()
        began = time.perf_counter()
        objective = partial(regression, folder, args.epochs)
        study = optimize(objective, SPACE, "random", args.trials, args.seed, storage, **how)
        wall = time.perf_counter() - began
        killer.over.set()
        killer.join()
        ends = endings(storage)
        begun, trials = len(log.read_text().splitlines()), study.trials
    seconds = [each.cost.seconds for each in trials]
    workers = how.get("n_jobs", 1)
    row = {
        "kind": "study",
        "run": name,
        "trials": len(trials),
        "lost": args.trials - len(ends),
        "duplicates": sum(ends.values()) - len(ends),
        "failed": sum(each.state != "complete" for each in trials),
        "killed": killer.killed,
        "begun": begun,
        "retries": sum(each.retries for each in trials),
        "epochs_counted": sum(each.cost.epochs for each in trials),
        "wall_seconds": wall,
        "trial_seconds": statistics.fmean(seconds),
        "overhead_seconds": workers * wall / args.trials - statistics.fmean(seconds),
    }
    return row, trials


def endings(journal: Path) -> Counter[int]:
    """Trial → how many lines of the journal end it."""
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    return Counter(x["trial_id"] for x in lines if x["op_code"] == SET_STATE and x["state"] in FINISHED)


def studies(args: Args) -> list[Row]:
    cluster = Cluster(num_cpus=1)
    with connected(args.workers, cluster):  # workers that have imported torch are there before the clock runs
        warm = study_row("warm", Args(trials=2 * args.workers, epochs=1), 0, backend="ray", n_jobs=args.workers)
        assert warm[0]["lost"] == 0
        killed, trials = study_row("ray, workers killed", args, args.kills, backend="ray", n_jobs=args.workers)
        calm, _ = study_row("ray", args, 0, backend="ray", n_jobs=args.workers)
    pool, _ = study_row("processes", args, 0, n_jobs=args.workers)
    alone, reference = study_row("one process", args, 0)
    same = [(a.params, a.value) == (b.params, b.value) for a, b in zip(trials, reference, strict=True)]
    killed["values_differ"] = same.count(False)
    return [killed, calm, pool, alone]


def _append(path: str, seconds: float, start: Any, counts: Any) -> None:
    import optuna

    backend = optuna.storages.journal.JournalFileBackend(path)  # type: ignore[attr-defined]
    start.wait()
    n, until = 0, time.perf_counter() + seconds
    while time.perf_counter() < until:
        backend.append_logs([{"op_code": 7, "worker_id": "w", "trial_id": 1, "step": n, "intermediate_value": 0.5}])
        n += 1
    counts.put(n)


def journal_row(writers: int, seconds: float) -> Row:
    """Entries a second into one journal file, from several processes at once."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        start, counts = context.Barrier(writers), context.Queue()
        path = str(Path(folder) / "j")
        them = [context.Process(target=_append, args=(path, seconds, start, counts)) for _ in range(writers)]
        for each in them:
            each.start()
        total = sum(counts.get() for _ in them)
        for each in them:
            each.join()
    return {"kind": "journal", "run": f"{writers} writers", "writers": writers, "per_second": total / seconds}


def clerk_row(workers: int, seconds: float) -> Row:
    """Reports a second through the actor that writes them, from several workers at once."""
    import ray

    def reports(clerk: Any, trial_id: int, seconds: float) -> int:
        n, until, to = 0, time.perf_counter() + seconds, RemoteReports(clerk, trial_id)
        while time.perf_counter() < until:
            n += 1
            to.report(0.5, n)
        return n

    with tempfile.TemporaryDirectory() as folder, connected(workers, Cluster()), quiet_optuna():
        path = str(Path(folder) / "j")
        study = open_study(open_storage(path), {}, NO_PRUNER.pruner())
        trials = [study.ask()._trial_id for _ in range(workers)]
        clerk, remote = ray.remote(num_cpus=0)(ReportActor).remote(path, NO_PRUNER), ray.remote(reports)
        ray.get([remote.remote(clerk, trial, 0.2) for trial in trials])  # workers are started
        total = sum(ray.get([remote.remote(clerk, study.ask()._trial_id, seconds) for _ in trials]))
    return {"kind": "reports", "run": f"{workers} workers", "writers": workers, "per_second": total / seconds}


def main(argv: list[str] | None = None) -> list[Row]:
    args = parse(Args, argv)
    rows = studies(args)
    rows += [journal_row(writers, args.seconds) for writers in ((1, 2) if args.quick else (1, 2, 4, 8))]
    rows += [clerk_row(workers, args.seconds) for workers in range(1, args.workers + 1)]
    for row in rows:
        print(
            ", ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            )
        )
    results.write(Path(args.out) / "ray_study.json", command(args), rows)
    return rows


if __name__ == "__main__":
    main()
