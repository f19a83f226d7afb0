"""A population of trials inside one run of Ray Tune.

`AskAndTell` submits all members at once; after the last one Tune trains them. Every result is written to the study's storage when
it arrives. Tune keeps checkpoints in a folder of its own; a member whose worker dies goes on from its last checkpoint.
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
from hypergrad.search.entries import stored
from hypergrad.search.extras import need
from hypergrad.search.objective import Objective, Outcome, Reports, Trial, WrongType
from hypergrad.search.ray_tune import Trainable, number_of
from hypergrad.search.ray_workers import Cluster, connected
from hypergrad.search.strategies.population_based import PBT
from hypergrad.search.workers import Runner

NEEDED_BY = "strategy 'pbt'"
CHECKPOINTS = 4  # kept of a member: others may still be copying one that is no longer the last


@dataclass
class Member:
    """One trial of the study, and the results that Tune has given for it."""

    trial: Trial
    reports: Reports
    future: Future[Outcome] = field(default_factory=Future)
    cost: Cost = field(default_factory=Cost)
    path: list[dict[str, Any]] = field(default_factory=list)
    last: tuple[float, dict[str, Any]] | None = None  # the value reported last, and the values that it was trained with
    notes: dict[str, Any] = field(default_factory=dict)

    def receive(self, result: dict[str, Any], retries: int) -> None:
        """Take one result of Tune. Results after the last one, which ends the trial, are ignored."""
        if self.future.done():
            return
        if result.get("wrong"):
            self.future.set_exception(WrongType(result["wrong"]))
            return
        self.cost += Cost(0, result.get("epochs_more", 0.0), result.get("gradients_more", 0.0))
        self.notes |= result.get("notes", {})
        if not result.get("done"):
            value = self.trial.sign * result["loss"]
            self.path.append(
                {"epoch": result["epoch"], "value": value if math.isfinite(value) else None} | result["config"]
            )
            self.last = value, result["config"]
            self.reports.report(value, result["epoch"])
            return
        error = result.get("error")
        # A member that copied another's weights at its last report ends with values that nothing was trained with: its result is
        # that of the last report.
        value, config = self.last or (self.trial.sign * result["loss"], result["config"])
        self.end(None if error else value, error, config, result["time_total_s"], retries)

    def end(self, value: float | None, error: str | None, config: dict[str, Any], seconds: float, retries: int) -> None:
        if self.future.done():
            return
        cost = self.cost + Cost(1, seconds=seconds)
        notes = self.notes | {"learned": dict(config), "path": self.path}
        curve = [(i + 1, point["value"]) for i, point in enumerate(self.path) if point["value"] is not None]
        self.future.set_result(Outcome("failed" if error else "complete", value, cost, notes, curve, error, retries))


class PopulationRunner(Runner):
    """Trains the population in a thread, once all of its members are submitted."""

    def __init__(self, size: int, strategy: PBT, cluster: Cluster, seed: int):
        super().__init__(None, None, isolated=True)
        self.size, self.strategy, self.cluster, self.seed = size, strategy, cluster, seed
        self.members: list[Member] = []
        self.thread, self.closed = threading.Thread(), threading.Event()

    def submit(self, objective: Objective, strategy: Any, trial: Trial, optuna_trial: Any) -> Future[Outcome]:
        self.members.append(Member(trial, Reports(optuna_trial)))
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
        tune, search = need("ray.tune", NEEDED_BY), need("ray.tune.search.basic_variant", NEEDED_BY)
        space, numbers = self.strategy.space, [each.trial.number for each in self.members]
        sign = self.members[0].trial.sign
        trains = Trainable(objective, self.seed, for_pbt=True, numbers=numbers, space=space, sign=sign)

        def objective_of_the_search(config: dict[str, Any]) -> None:
            trains(config)

        resources = {"cpu": self.cluster.num_cpus, "gpu": self.cluster.num_gpus}
        return tune.Tuner(
            tune.with_resources(objective_of_the_search, resources),
            param_space=self.strategy.param_space,
            tune_config=tune.TuneConfig(
                scheduler=self.strategy.scheduler(),
                search_alg=search.BasicVariantGenerator(
                    points_to_evaluate=[
                        {name: stored(space[name], x) for name, x in each.trial.params.items()} for each in self.members
                    ]
                ),
                num_samples=len(self.members),
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                storage_path=folder,
                verbose=0,
                stop=_stopper(tune, self.closed),
                callbacks=[_result_callback(tune, self)],
                failure_config=tune.FailureConfig(max_failures=int(self.cluster.retries)),
                checkpoint_config=tune.CheckpointConfig(num_to_keep=CHECKPOINTS),
            ),
        )

    def close(self) -> None:
        self.closed.set()
        if self.thread.is_alive():
            self.thread.join()


def _stopper(tune: Any, closed: threading.Event) -> Any:
    """Ends Tune's run once the runner is closed."""

    class StopWhenClosed(tune.Stopper):
        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            return False

        def stop_all(self) -> bool:
            return closed.is_set()

        def __reduce__(self) -> Any:  # Tune pickles its arguments
            return str, ()

    return StopWhenClosed()


def _result_callback(tune: Any, runner: PopulationRunner) -> Any:
    """Hands Tune's results to the members."""

    class ResultCallback(tune.Callback):
        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
            runner.member(trial).receive(result, trial.num_failures)

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            seconds = float((trial.last_result or {}).get("time_total_s", 0.0))
            why = str(trial.get_error() or "the worker of this trial died (killed, or out of memory).")
            runner.member(trial).end(None, why, trial.config, seconds, max(trial.num_failures - 1, 0))

        def __reduce__(self) -> Any:
            return str, ()

    return ResultCallback()


@contextmanager
def population_runner(n_jobs: int, size: int, strategy: PBT, cluster: Cluster, seed: int) -> Iterator[PopulationRunner]:
    """A runner of `size` members, as long as the context lasts."""
    with connected(n_jobs, cluster), quiet_tune():
        runner = PopulationRunner(size, strategy, cluster, seed)
        try:
            yield runner
        finally:
            runner.close()


# no logs of every result (CSV, JSON, TensorBoard), and no banner that names a temporary folder: the study keeps all results
QUIET = {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0"}


@contextmanager
def quiet_tune() -> Iterator[None]:
    """Within this context Ray Tune neither writes logs nor prints tables."""
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
