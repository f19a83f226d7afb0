"""Where trials run: in this thread, in other threads, or in processes that share the study through its storage."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch

from hypergrad.search.extras import need
from hypergrad.search.objective import Objective, Outcome, Reports, Trial, evaluate, name_of
from hypergrad.search.storage import open_storage, quiet_optuna
from hypergrad.search.strategies.base import Strategy

WORKERS = ("processes", "threads")


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
    optuna = need("optuna", "a search")
    with quiet_optuna():
        sampler = optuna.samplers.RandomSampler(seed=0)
        study = optuna.load_study(
            study_name=name, storage=open_storage(storage), sampler=sampler, pruner=strategy.pruner()
        )
        trial.reports = Reports(optuna.Trial(study, trial_id))
        return evaluate(partial(strategy.run, objective), trial)


@contextmanager
def local_runner(n_jobs: int, workers: str, storage: Any) -> Iterator[Runner]:
    """Workers on this machine, as long as the context lasts."""
    if n_jobs == 1:
        yield Runner(None, storage, isolated=True)
        return
    if workers == "threads":
        pool: Executor = ThreadPoolExecutor(n_jobs)
    else:
        threads = max(1, (os.cpu_count() or 1) // n_jobs)
        pool = ProcessPoolExecutor(n_jobs, get_context("spawn"), initializer=torch.set_num_threads, initargs=(threads,))
    try:
        yield Runner(pool, storage, isolated=workers == "processes")
    finally:
        pool.shutdown(cancel_futures=True)


def check_picklable(objective: Objective) -> None:
    try:
        pickle.dumps(objective)
    except Exception as error:
        raise ValueError(
            f"n_jobs > 1 sends the objective to other processes, and {name_of(objective)} cannot be sent: define it at the "
            "top of a module, or use workers='threads'."
        ) from error
