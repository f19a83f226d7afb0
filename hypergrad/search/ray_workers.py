"""Trials on Ray: the loop asks and tells here, workers run what they are sent.

Only two processes write to the study's storage, and neither runs a trial: the loop, and one actor on its node, the clerk, which
takes down what trials report and asks the pruner for them. So a storage in a file need not be shared with the workers' machines,
and a worker that is killed cannot leave the file locked. Its trial, which nobody has told the end of, is sent to another worker:
same number, values and seed.
"""

from __future__ import annotations

import math
import os
import time
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
from hypergrad.search.storage import NAME, open_storage, quiet
from hypergrad.search.strategies.base import Strategy
from hypergrad.search.workers import Runner

WHAT = "backend 'ray'"


@dataclass(frozen=True)
class Cluster:
    """Where trials run, and what each of them needs.

    Args:
        address: of a cluster, "auto" for the one this machine is in; None: the Ray that is initialised already, or the one in
            RAY_ADDRESS, or else one that is started on this machine for `n_jobs` trials and shut down at the end.
        num_cpus, num_gpus: of one trial; 0.25 GPUs let four trials share one.
        retries: how often a trial is run again because its worker died; then it has failed.
        storage_path: of strategy "pbt", where Ray Tune keeps checkpoints: a folder that all machines share, or a URL such as
            "s3://bucket/study"; None: a temporary folder, which does for one machine.

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
    pickle = need("ray", WHAT).cloudpickle
    try:
        pickle.dumps(objective)
    except Exception as error:
        raise ValueError(
            f"backend 'ray' sends the objective to its workers, and {name_of(objective)} cannot be sent ({error}): let it make "
            "or open inside what it needs (files, locks, generators)."
        ) from error
    optuna = need("optuna", "a search")
    if storage is None or isinstance(storage, optuna.storages.InMemoryStorage):
        raise ValueError(
            "backend 'ray' needs a storage outside this process's memory, so that nothing is lost with a process: "
            "storage='study.journal', or the URL of a database."
        )


class Clerk:
    """Takes down what trials report. Reports are known by their step, so one that is sent twice counts once."""

    def __init__(self, storage: Any, strategy: Strategy):
        optuna = need("optuna", "a search")
        with quiet():
            sampler = optuna.samplers.RandomSampler(seed=0)
            self.study = optuna.load_study(
                study_name=NAME, storage=open_storage(storage), sampler=sampler, pruner=strategy.pruner()
            )

    def _trial(self, trial_id: int) -> Reports:
        return Reports(need("optuna", "a search").Trial(self.study, trial_id))

    def report(self, trial_id: int, value: float, step: int) -> None:
        with quiet():
            self._trial(trial_id).report(value, step)

    def should_prune(self, trial_id: int) -> bool:
        with quiet():
            return self._trial(trial_id).should_prune()


class ByClerk:
    """What a trial on a worker reports to."""

    def __init__(self, clerk: Any, trial_id: int):
        self.clerk, self.trial_id = clerk, trial_id

    def report(self, value: float, step: int) -> None:
        need("ray", WHAT).get(self.clerk.report.remote(self.trial_id, value, step))

    def should_prune(self) -> bool:
        return need("ray", WHAT).get(self.clerk.should_prune.remote(self.trial_id))


def _on_worker(sent: tuple[Objective, Strategy], own: Trial, clerk: Any, trial_id: int) -> Outcome:
    objective, strategy = sent
    own.asked = ByClerk(clerk, trial_id)
    return evaluate(partial(strategy.run, objective), own)


class RayRunner(Runner):
    """Sends trials to workers; a thread for each of them waits for its end."""

    def __init__(self, pool: ThreadPoolExecutor, cluster: Cluster, clerk: Any):
        super().__init__(pool, None, isolated=True)
        self.ray, self.cluster, self.clerk = need("ray", WHAT), cluster, clerk
        self.task = self.ray.remote(max_retries=0, **cluster.resources)(_on_worker)
        self.sent: Any = None
        self.refs: set[Any] = set()
        self.closing = False

    def submit(self, objective: Objective, strategy: Strategy, own: Trial, asked: Any) -> Future[Outcome]:
        assert self.executor is not None
        self.sent = self.ray.put((objective, strategy)) if self.sent is None else self.sent
        return self.executor.submit(self._until_it_ends, own, asked._trial_id)

    def _until_it_ends(self, own: Trial, trial_id: int) -> Outcome:
        errors, began = self.ray.exceptions, time.perf_counter()
        for attempt in range(int(self.cluster.retries) + 1):
            ref = self.task.remote(self.sent, own, self.clerk, trial_id)
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
        said = f"the worker of this trial died {tries} times (killed, or out of memory).\n{why}"
        cost = Cost(1, 0.0, 0.0, time.perf_counter() - began)
        return Outcome("failed", None, cost, {}, [], said, retries=tries - 1)

    def close(self) -> None:
        self.closing = True
        for ref in list(self.refs):
            self.ray.cancel(ref, force=True)
        assert self.executor is not None
        self.executor.shutdown(cancel_futures=True)
        self.ray.kill(self.clerk)


@contextmanager
def ray_runner(n_jobs: int, storage: Any, strategy: Strategy, cluster: Cluster) -> Iterator[RayRunner]:
    ray = need("ray", WHAT)
    with connected(n_jobs, cluster):
        place = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        kept = str(Path(storage).absolute()) if is_path(storage) else storage
        made = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=place)(Clerk)
        runner = RayRunner(ThreadPoolExecutor(n_jobs), cluster, made.remote(kept, strategy))
        try:
            yield runner
        finally:
            runner.close()


def is_path(storage: Any) -> bool:
    return isinstance(storage, os.PathLike) or (isinstance(storage, str) and "://" not in storage)


@contextmanager
def connected(n_jobs: int, cluster: Cluster) -> Iterator[None]:
    """Ray, as it is initialised already, or by the cluster's address, or started here for this time.

    Raises:
        ValueError: a Ray that is started here has no GPU, and trials want one: Ray would wait for it without end.
    """
    ray = need("ray", WHAT)
    if ray.is_initialized():
        yield
        return
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    quietly = {"log_to_driver": False, "logging_level": "ERROR"}
    if address:
        ray.init(address=address, **quietly)
    else:
        cpus = max(1, math.ceil(n_jobs * cluster.num_cpus))
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quietly)
    try:
        if not address and cluster.num_gpus > (found := ray.cluster_resources().get("GPU", 0)):
            raise ValueError(f"cluster: a trial wants {cluster.num_gpus} GPUs, and this machine has {found:g}.")
        yield
    finally:
        ray.shutdown()
