"""Where trials run: in this thread, in other threads, or in processes that share the study through its storage."""

from __future__ import annotations

import ast
import linecache
import os
import pickle
import sys
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch

from hypergrad.search.extras import need
from hypergrad.search.objective import Objective, Outcome, Reports, Trial, evaluate, name_of
from hypergrad.search.storage import opened_again, quiet_optuna
from hypergrad.search.strategies.base import Strategy

WORKERS = ("processes", "threads")
FORKSERVER = sys.platform == "linux"  # elsewhere a process that has imported much is not safe to fork, or cannot be
IMPORTED = ("hypergrad.search.workers", "optuna")  # by the process that workers are forks of
ALSO = ("pandas", "scipy", "sklearn")  # where this process has them: strategies send them, and objectives use them


class Runner:
    """Runs trials in an executor.

    Args:
        executor: None: trials run in `submit` itself.
        storage: from which processes open the study.
        isolated: whether the global random number generators are seeded for each trial.
    """

    def __init__(self, executor: Executor | None, storage: Any, isolated: bool):
        self.executor, self.storage, self.isolated = executor, storage, isolated

    def submit(self, objective: Objective, strategy: Strategy, trial: Trial, optuna_trial: Any) -> Future[Outcome]:
        if isinstance(self.executor, ProcessPoolExecutor):
            ids = optuna_trial.study.study_name, optuna_trial._trial_id
            return self.executor.submit(_in_process, self.storage, *ids, objective, strategy, trial)
        trial.reports = Reports(optuna_trial)
        work = partial(evaluate, partial(strategy.run, objective), trial, self.isolated)
        if self.executor is not None:
            return self.executor.submit(work)
        done: Future[Outcome] = Future()
        done.set_result(work())
        return done


def _in_process(
    storage: Any, name: str, trial_id: int, objective: Objective, strategy: Strategy, trial: Trial
) -> Outcome:
    with quiet_optuna():
        study = opened_again(storage, name, strategy.pruner())
        trial.reports = Reports(need("optuna", "a search").Trial(study, trial_id))
        return evaluate(partial(strategy.run, objective), trial)


@contextmanager
def local_runner(n_jobs: int, workers: str, storage: Any) -> Iterator[Runner]:
    """Workers on this machine, as long as the context lasts."""
    if n_jobs == 1:
        yield Runner(None, storage, isolated=True)
        return
    pool = ThreadPoolExecutor(n_jobs) if workers == "threads" else process_pool(n_jobs)
    try:
        yield Runner(pool, storage, isolated=workers == "processes")
    finally:
        pool.shutdown(cancel_futures=True)


def process_pool(n_jobs: int) -> ProcessPoolExecutor:
    """Processes that begin as Python's "spawn" has it, with nothing of this one but its path, folder and environment.

    To import torch, Optuna and this package takes a processor some two seconds. On Linux one process does so for all of them, a
    fork server of `multiprocessing`, and workers are its forks. It runs nothing of the user's, is ready for later calls, and ends
    with this process. What it found on Python's path must be what this process has; otherwise every worker imports by itself.
    Environment variables that are read during these imports are those of the first call.

    Raises:
        RuntimeError: they cannot start.
    """
    failed: Exception | None = None
    for method in ("forkserver", "spawn") if FORKSERVER else ("spawn",):
        context = get_context(method)
        if method == "forkserver":
            context.set_forkserver_preload(_imported())
        threads = max(1, (os.cpu_count() or 1) // n_jobs)
        pool = ProcessPoolExecutor(n_jobs, context, initializer=_begin_worker, initargs=(threads, dict(os.environ)))
        try:
            if pool.submit(_origins).result() == _origins() or method == "spawn":
                return pool
        except (BrokenProcessPool, OSError) as error:
            failed = error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        pool.shutdown()
    raise RuntimeError(
        "n_jobs > 1: worker processes cannot start, for the reason printed above. A script that calls optimize must do so under "
        "if __name__ == '__main__':, because every worker imports it. Or use workers='threads'."
    ) from failed


def check_main_module() -> None:
    """Refuse a call from the top of a script, under no `if`: every worker imports the script, and would make the call again.

    Raises:
        RuntimeError: it is such a call.
    """
    file = getattr(sys.modules.get("__main__"), "__file__", None)
    frame = sys._getframe()
    while frame is not None and (frame.f_code.co_filename != file or frame.f_code.co_name != "<module>"):
        frame = frame.f_back
    if file is None or frame is None or not (source := "".join(linecache.getlines(file))):
        return
    line, body = frame.f_lineno, ast.parse(source).body
    at = [
        x
        for node in body
        for x in ast.walk(node)
        if isinstance(x, ast.stmt) and x.lineno <= line <= (x.end_lineno or 0)
    ]
    if not any(isinstance(x, ast.If) for x in at):
        raise RuntimeError(
            f"{file}, line {line}: n_jobs > 1 starts worker processes, every one of which imports this script and would make "
            "this call again. Put it under if __name__ == '__main__':, or use workers='threads'."
        )


def _imported() -> list[str]:
    """The modules that a fork server is to import."""
    also = [name for name in list(sys.modules) if name.count(".") < 2 and name.partition(".")[0] in ALSO]
    return [*IMPORTED, *also]


def _begin_worker(threads: int, environment: dict[str, str]) -> None:
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(environment)


def _origins() -> dict[str, str | None]:
    """Where the packages that workers share were imported from."""
    return {name: need(name, "a search").__file__ for name in ("hypergrad", "torch", "numpy", "optuna")}


def check_picklable(objective: Objective) -> None:
    try:
        pickle.dumps(objective)
    except Exception as error:
        raise ValueError(
            f"n_jobs > 1 sends the objective to other processes, and {name_of(objective)} cannot be sent: define it at the "
            "top of a module, or use workers='threads'."
        ) from error
