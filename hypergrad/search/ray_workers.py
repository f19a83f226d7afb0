"""Trials on a Ray cluster.

Only two processes write to the study's storage, and neither runs a trial: the one that called `optimize`, and one actor on its
node, `ReportActor`, which stores what trials report and asks the pruner for them. So a storage in a file need not be shared with
the workers' machines, and a worker that is killed cannot leave the file locked. A trial whose worker died is sent to another
worker with the same number, values and seed.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from hypergrad.search.budget import Cost
from hypergrad.search.extras import need
from hypergrad.search.objective import Objective, Outcome, Reports, Trial, evaluate, name_of
from hypergrad.search.storage import NAME, is_path, opened_again, quiet_optuna
from hypergrad.search.strategies.base import Strategy
from hypergrad.search.strategies.tuned_entries import NotDifferentiated
from hypergrad.search.workers import Runner

NEEDED_BY = "backend 'ray'"


@dataclass(frozen=True)
class Cluster:
    """Where trials run, and what each of them needs.

    Args:
        address: of a cluster, "auto" for the one this machine is in; None: the Ray that is initialised already, or the one in
            RAY_ADDRESS, or else one that is started on this machine for `n_jobs` trials and shut down at the end.
        num_cpus, num_gpus: of one trial; 0.25 GPUs let four trials share one.
        retries: how often a trial is run again because its worker died; after that it has failed.
        storage_path: of strategy "pbt", where Ray Tune keeps checkpoints: a folder that all machines share, or a URL such as
            "s3://bucket/study"; None: a temporary folder, which is enough on one machine.

    Raises:
        ValueError: a number that is negative, or retries that are not whole.
    """

    address: str | None = None
    num_cpus: float = 1
    num_gpus: float = 0
    retries: int = 3
    storage_path: str | None = None

    def __post_init__(self) -> None:
        for name in ("num_cpus", "num_gpus", "retries"):
            x = getattr(self, name)
            if isinstance(x, bool) or not isinstance(x, (int, float)) or not (math.isfinite(x) and x >= 0):
                raise ValueError(f"cluster: {name} must be a number from 0, got {x!r}.")
        if self.retries != int(self.retries):
            raise ValueError(f"cluster: retries must be a whole number, got {self.retries}.")
        if self.num_gpus > 1 and self.num_gpus != int(self.num_gpus):
            raise ValueError(f"cluster: num_gpus above 1 must be a whole number, got {self.num_gpus}.")
        if not (self.num_cpus or self.num_gpus):
            raise ValueError(
                "cluster: a trial needs some of num_cpus or num_gpus, else Ray starts all of them at once."
            )

    @property
    def resources(self) -> dict[str, float]:
        return {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus}


def as_cluster(cluster: Cluster | Mapping[str, Any] | None) -> Cluster:
    if cluster is None or isinstance(cluster, Cluster):
        return cluster or Cluster()
    names = [f.name for f in fields(Cluster)]
    if not isinstance(cluster, Mapping):
        raise TypeError(f"cluster must be a dict with some of {', '.join(names)}, got {type(cluster).__name__}.")
    unknown = [name for name in cluster if name not in names]
    if unknown:
        raise ValueError(f"cluster has {', '.join(names)}, not {unknown[0]!r}.")
    return Cluster(**cluster)


def check_sendable(objective: Objective, storage: Any) -> None:
    """An objective that Ray can send, and a storage that a second process can open."""
    pickle = need("ray", NEEDED_BY).cloudpickle
    try:
        pickle.dumps(objective)
    except Exception as error:
        raise ValueError(
            f"backend 'ray' sends the objective to its workers, and {name_of(objective)} cannot be sent ({error}): make or "
            "open what it needs (files, locks, generators) inside it."
        ) from error
    optuna = need("optuna", "a search")
    if storage is None or isinstance(storage, optuna.storages.InMemoryStorage):
        raise ValueError(
            "backend 'ray' needs a storage outside this process's memory, so that nothing is lost with a process: "
            "storage='study.journal', or the URL of a database."
        )


class ReportActor:
    """Stores what trials on workers report. A report is identified by its step, so one that is sent twice counts once."""

    def __init__(self, storage: Any, strategy: Strategy, name: str = NAME):
        with quiet_optuna():
            self.study = opened_again(storage, name, strategy.pruner())

    def _trial(self, trial_id: int) -> Reports:
        return Reports(need("optuna", "a search").Trial(self.study, trial_id))

    def report(self, trial_id: int, value: float, step: int) -> None:
        with quiet_optuna():
            self._trial(trial_id).report(value, step)

    def should_prune(self, trial_id: int) -> bool:
        with quiet_optuna():
            return self._trial(trial_id).should_prune()


class RemoteReports:
    """The reports of a trial on a worker: sent to the actor."""

    def __init__(self, actor: Any, trial_id: int):
        self.actor, self.trial_id = actor, trial_id

    def report(self, value: float, step: int) -> None:
        need("ray", NEEDED_BY).get(self.actor.report.remote(self.trial_id, value, step))

    def should_prune(self) -> bool:
        return need("ray", NEEDED_BY).get(self.actor.should_prune.remote(self.trial_id))


def _on_worker(sent: tuple[Objective, Strategy], trial: Trial, actor: Any, trial_id: int) -> Outcome:
    objective, strategy = sent
    trial.reports = RemoteReports(actor, trial_id)
    with warnings.catch_warnings(record=True) as said:
        outcome = evaluate(partial(strategy.run, objective), trial)
    outcome.warnings = [str(each.message) for each in said if issubclass(each.category, NotDifferentiated)]
    return outcome


class RayRunner(Runner):
    """Sends trials to workers; for each of them a thread waits until it ends."""

    def __init__(self, pool: ThreadPoolExecutor, cluster: Cluster, actor: Any):
        super().__init__(pool, None, isolated=True)
        self.ray, self.cluster, self.actor = need("ray", NEEDED_BY), cluster, actor
        self.task = self.ray.remote(max_retries=0, **cluster.resources)(_on_worker)
        self.sent: Any = None
        self.refs: set[Any] = set()
        self.closing = False

    def submit(self, objective: Objective, strategy: Strategy, trial: Trial, optuna_trial: Any) -> Future[Outcome]:
        assert self.executor is not None
        self.sent = self.ray.put((objective, strategy)) if self.sent is None else self.sent
        return self.executor.submit(self._run, trial, optuna_trial._trial_id)

    def _run(self, trial: Trial, trial_id: int) -> Outcome:
        """Run a trial, again where its worker died."""
        errors, began = self.ray.exceptions, time.perf_counter()
        for attempt in range(int(self.cluster.retries) + 1):
            ref = self.task.remote(self.sent, trial, self.actor, trial_id)
            self.refs.add(ref)
            try:
                outcome = self.ray.get(ref)
                outcome.retries = attempt
                return outcome
            except errors.RayTaskError as error:  # what is wrong with the objective itself
                raise error.cause from None
            except (errors.WorkerCrashedError, errors.OutOfMemoryError, errors.NodeDiedError) as error:
                if self.closing:
                    raise
                why = f"{type(error).__name__}: {error}"
            finally:
                self.refs.discard(ref)
        tries = int(self.cluster.retries) + 1
        message = f"the worker of this trial died {tries} times (killed, or out of memory).\n{why}"
        cost = Cost(1, 0.0, 0.0, time.perf_counter() - began)
        return Outcome("failed", None, cost, {}, [], message, retries=tries - 1)

    def close(self) -> None:
        self.closing = True
        for ref in list(self.refs):
            self.ray.cancel(ref, force=True)
        assert self.executor is not None
        self.executor.shutdown(cancel_futures=True)
        self.ray.kill(self.actor)


@contextmanager
def ray_runner(n_jobs: int, storage: Any, strategy: Strategy, cluster: Cluster, study_name: str) -> Iterator[RayRunner]:
    """Workers on a Ray cluster, as long as the context lasts."""
    ray = need("ray", NEEDED_BY)
    with connected(n_jobs, cluster):
        this_node = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        reopened = str(Path(storage).absolute()) if is_path(storage) else storage
        made = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=this_node)(ReportActor)
        runner = RayRunner(ThreadPoolExecutor(n_jobs), cluster, made.remote(reopened, strategy, study_name))
        try:
            yield runner
        finally:
            runner.close()


@contextmanager
def connected(n_jobs: int, cluster: Cluster) -> Iterator[None]:
    """Within this context Ray is initialised: it was already, or by the cluster's address, or on this machine for this time.

    Raises:
        ValueError: a Ray that is started here has no GPU, and trials want one: Ray would wait for it without end.
    """
    ray = need("ray", NEEDED_BY)
    if ray.is_initialized():
        yield
        return
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    options = {"log_to_driver": False, "logging_level": "ERROR"}
    if address:
        ray.init(address=address, **options)
    else:
        cpus = max(1, math.ceil(n_jobs * cluster.num_cpus))
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, **options)
    try:
        if not address and cluster.num_gpus > (found := ray.cluster_resources().get("GPU", 0)):
            raise ValueError(f"cluster: a trial wants {cluster.num_gpus} GPUs, and this machine has {found:g}.")
        yield
    finally:
        ray.shutdown()
