"""A population of trials inside one run of Ray Tune, as a runner of the search's loop.

The loop asks for all members at once; when the last one is there, Tune trains them. Results go to the study's storage as they
come. Tune keeps checkpoints in a folder of its own; a member whose worker dies goes on from its last one.
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from hypergrad.search.budget import Cost
from hypergrad.search.extras import need
from hypergrad.search.objective import Objective, Outcome, Reports, Trial, WrongType
from hypergrad.search.ray_tune import Trainable, number_of
from hypergrad.search.ray_workers import Cluster, connected
from hypergrad.search.strategies.population_based import PBT
from hypergrad.search.workers import Runner

WHAT = "strategy 'pbt'"
KEPT = 4  # checkpoints of a member: others may still be copying one that is no longer the last


@dataclass
class Member:
    """One trial of the study, and what Tune has said of it."""

    own: Trial
    reports: Reports
    future: Future[Outcome] = field(default_factory=Future)
    cost: Cost = field(default_factory=Cost)
    path: list[dict[str, Any]] = field(default_factory=list)
    last: tuple[float, dict[str, Any]] | None = None  # the loss reported last, and the values that it was trained with
    notes: dict[str, Any] = field(default_factory=dict)

    def hear(self, result: dict[str, Any], retries: int) -> None:
        """One result of Tune. It is told the end once: what comes after it does not count."""
        if self.future.done():
            return
        if result.get("wrong"):
            self.future.set_exception(WrongType(result["wrong"]))
            return
        self.cost += Cost(0, result.get("epochs_more", 0.0), result.get("gradients_more", 0.0))
        self.notes |= result.get("notes", {})
        if not result.get("done"):
            value = result["loss"] if math.isfinite(result["loss"]) else None
            self.path.append({"epoch": result["epoch"], "value": value} | result["config"])
            self.last = result["loss"], result["config"]
            self.reports.report(result["loss"], result["epoch"])
            return
        error = result.get("error")
        # One that took over another's weights at its last report ends with values that nothing was trained with: not theirs
        # is the result, but that of the last report.
        loss, config = self.last or (result["loss"], result["config"])
        self.end(None if error else loss, error, config, result["time_total_s"], retries)

    def end(self, value: float | None, error: str | None, config: dict[str, Any], seconds: float, retries: int) -> None:
        if self.future.done():
            return
        cost = self.cost + Cost(1, seconds=seconds)
        notes = self.notes | {"learned": dict(config), "path": self.path}
        curve = [(i + 1, point["value"]) for i, point in enumerate(self.path) if point["value"] is not None]
        self.future.set_result(Outcome("failed" if error else "complete", value, cost, notes, curve, error, retries))


class PopulationRunner(Runner):
    """Waits for the population to be complete, then trains it, in a thread."""

    def __init__(self, size: int, strategy: PBT, cluster: Cluster, seed: int):
        super().__init__(None, None, isolated=True)
        self.size, self.strategy, self.cluster, self.seed = size, strategy, cluster, seed
        self.members: list[Member] = []
        self.thread, self.over = threading.Thread(), threading.Event()

    def submit(self, objective: Objective, strategy: Any, own: Trial, asked: Any) -> Future[Outcome]:
        self.members.append(Member(own, Reports(asked)))
        if len(self.members) == self.size:
            self.thread = threading.Thread(target=self._train, args=(objective,), daemon=True)
            self.thread.start()
        return self.members[-1].future

    def member(self, trial: Any) -> Member:
        return self.members[0] if len(self.members) == 1 else self.members[number_of(trial.trial_id)]

    def _train(self, objective: Objective) -> None:
        try:
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                self._tuner(objective, self.cluster.storage_path or folder).fit()
            raise RuntimeError("Ray Tune ended before this trial did.")
        except Exception as error:
            for each in self.members:
                if not each.future.done():
                    each.future.set_exception(error)

    def _tuner(self, objective: Objective, folder: str) -> Any:
        tune, search = need("ray.tune", WHAT), need("ray.tune.search.basic_variant", WHAT)
        trains = Trainable(objective, self.seed, tells=True, numbers=[each.own.number for each in self.members])

        def objective_of_the_search(config: dict[str, Any]) -> None:
            trains(config)

        resources = {"cpu": self.cluster.num_cpus, "gpu": self.cluster.num_gpus}
        return tune.Tuner(
            tune.with_resources(objective_of_the_search, resources),
            param_space=self.strategy.param_space,
            tune_config=tune.TuneConfig(
                scheduler=self.strategy.scheduler(),
                search_alg=search.BasicVariantGenerator(points_to_evaluate=[each.own.params for each in self.members]),
                num_samples=len(self.members),
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                storage_path=folder,
                verbose=0,
                stop=_stopper(tune, self.over),
                callbacks=[_teller(tune, self)],
                failure_config=tune.FailureConfig(max_failures=int(self.cluster.retries)),
                checkpoint_config=tune.CheckpointConfig(num_to_keep=KEPT),
            ),
        )

    def close(self) -> None:
        self.over.set()
        if self.thread.is_alive():
            self.thread.join()


def _stopper(tune: Any, over: threading.Event) -> Any:
    class Over(tune.Stopper):
        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            return False

        def stop_all(self) -> bool:
            return over.is_set()

        def __reduce__(self) -> Any:  # Tune writes down its arguments
            return str, ()

    return Over()


def _teller(tune: Any, runner: PopulationRunner) -> Any:
    class Teller(tune.Callback):
        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
            runner.member(trial).hear(result, trial.num_failures)

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            seconds = float((trial.last_result or {}).get("time_total_s", 0.0))
            why = str(trial.get_error() or "the worker of this trial died (killed, or out of memory).")
            runner.member(trial).end(None, why, trial.config, seconds, max(trial.num_failures - 1, 0))

        def __reduce__(self) -> Any:
            return str, ()

    return Teller()


@contextmanager
def population_runner(n_jobs: int, size: int, strategy: PBT, cluster: Cluster, seed: int) -> Iterator[PopulationRunner]:
    with connected(n_jobs, cluster), quiet_tune():
        runner = PopulationRunner(size, strategy, cluster, seed)
        try:
            yield runner
        finally:
            runner.close()


# no logs of every result (CSV, JSON, TensorBoard), no banner that names a folder which will be gone: the study has it all
QUIET = {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0"}


@contextmanager
def quiet_tune() -> Iterator[None]:
    """Ray Tune without what it writes and prints by itself."""
    logger, before = logging.getLogger("ray.tune"), {name: os.environ.get(name) for name in QUIET}
    level = logger.level
    os.environ |= QUIET
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
