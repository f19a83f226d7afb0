"""`optimize`: arguments checked, the study opened, and trials run until the budget is spent."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from hypergrad.core.user_warnings import warn_user
from hypergrad.search.ask_and_tell import AskAndTell
from hypergrad.search.budget import Budget, as_budget
from hypergrad.search.extras import need
from hypergrad.search.objective import Objective, as_sign, name_of, takes_trial
from hypergrad.search.ray_population import population_runner
from hypergrad.search.ray_workers import Cluster, as_cluster, check_sendable, ray_runner
from hypergrad.search.space import Space, as_space
from hypergrad.search.storage import locked, open_storage, open_study, quiet_optuna
from hypergrad.search.strategies import make
from hypergrad.search.strategies.base import Strategy
from hypergrad.search.strategies.population_based import PBT
from hypergrad.search.study import NoTrialCompleted, Study
from hypergrad.search.workers import WORKERS, check_main_module, check_picklable, local_runner

BACKENDS = ("local", "ray")


def optimize(
    objective: Objective,
    space: Space | Mapping[str, Any],
    strategy: str = "tpe",
    budget: Budget | Mapping[str, float] | int | None = None,
    seed: int = 0,
    storage: Any = None,
    n_jobs: int = 1,
    backend: str = "local",
    *,
    n_trials: int | None = None,
    timeout: float | None = None,
    direction: str = "minimize",
    aliases: Mapping[str, str] | None = None,
    workers: str = "processes",
    options: Mapping[str, Any] | None = None,
    cluster: Cluster | Mapping[str, Any] | None = None,
    log_dir: str | Path | None = None,
    progress: bool | None = None,
) -> Study:
    """Minimise a validation loss over a space of hyperparameters, p* = argmin f(p); or maximise a score.

    Args:
        objective: `f(params)` or `f(params, trial)`, params a dict of the entries that are there. It returns the validation loss,
            a float, of which infinity is the worst there is, or a score, of which minus infinity is; NaN is a failure. Or it
            returns the training run, a `hypergrad.Run`, with the optimizer made of these values: strategies with hypergradients
            need that, all others train it.
        space: name → Float, Int, Categorical, a list of choices or a constant.
        strategy: "grid", "random", "tpe", "gp", "cma", "hyperopt", "hyperband", "asha", "hypergradient" or "hybrid" (descents
            over whole runs), "hypergradient-online" or "hybrid-online" (a Tuner in every run), or, with backend "ray", "pbt".
        budget: a `Budget`, a dict such as {"trials": 64} or {"seconds": 600}, or a number of trials. None: all of a finite grid.
        seed: of everything that is drawn.
        storage: path of a journal file, from which a call with the same arguments goes on; a URL or a storage of Optuna. None: in
            memory. What counts as the same study is objective's name, direction, strategy, options and seed; the space may have
            become wider.
        n_trials, timeout: trials and seconds of the budget, by Optuna's names. Those of earlier calls that the storage has count,
            so that the same call goes on after an interruption.
        direction: "minimize", or "maximize" where the objective returns a score, or a Run whose val_loss is one.
        aliases: entry → the hyperparameter of the run that it is, such as {"wd": "weight_decay"}, where names differ. Strategies
            without hypergradients need none.
        n_jobs: trials at a time. With more than one, which trials a sampler has seen when it chooses depends on the clock.
        backend: "local", or "ray": n_jobs trials at a time on the workers of a Ray cluster (docs/ray.md). It needs a storage. The
            trial of a worker that dies is run again.
        workers: what n_jobs > 1 runs in: "processes", for which the objective must be importable (a module's function), or
            "threads", which share random number generators: they are not seeded for each trial then.
        options: of the strategy: arguments of its class in Optuna, or steps, step_size and mode of hypergradients; online, every,
            hyper_lr, average, warm_start and cost of the Tuner; for hybrids also sampler.
        cluster: of backend "ray": a dict with some of address, num_cpus and num_gpus of one trial, retries, storage_path.
        log_dir: folder for TensorBoard; every trial is a run with HParams.
        progress: True or False: a progress bar or none; None: one where stderr is a terminal.

    Returns:
        Study. Trials that raise are recorded with their traceback and do not end it. After Ctrl-C it has what is done, and
        `interrupted` is True; the trial that was cut off is run again when a stored study goes on.

    Raises:
        ValueError: an empty space, an infinite grid, a budget of 0 or none where one is needed, an unknown strategy, the storage
            of another study, and, at the end, if no trial came to a value.
        TypeError: an objective that is none, or that returns None, a tensor that needs grad, or no number, at its first trial.
        ImportError: a missing extra, with the line for pip.

    Example:
        >>> study = optimize(lambda p: (p["x"] - 1) ** 2, {"x": [0, 1, 2, 3]}, strategy="grid", progress=False)
        >>> study.best_params, study.best_value, len(study.trials)
        ({'x': 1}, 0.0, 4)
    """
    space, limit = as_space(space), as_budget(budget, n_trials, timeout)
    as_sign(direction)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed must be a whole number from 0, got {seed!r}.")
    with_trial = takes_trial(objective)
    need("optuna", "a search")
    chosen = make(strategy, space, seed, options or {}, aliases)
    _check_execution(limit, chosen, strategy, with_trial, n_jobs, backend, workers)
    ray_cluster = as_cluster(cluster)
    if backend == "ray":
        check_sendable(objective, storage)
    elif cluster is not None:
        raise ValueError("cluster describes a Ray cluster: pass backend='ray' with it.")
    identity = {
        "objective": name_of(objective),
        "space": space.describe(),
        "direction": direction,
        "strategy": strategy,
        "options": json.loads(json.dumps(dict(options or {}) | ({"aliases": aliases} if aliases else {}), default=str)),
        "seed": seed,
    }
    with ExitStack() as stack:
        stack.enter_context(locked(storage))
        stack.enter_context(quiet_optuna())
        in_processes = backend == "local" and n_jobs > 1 and workers == "processes"
        temporary = in_processes and storage is None
        if in_processes:
            check_main_module()
            check_picklable(objective)
        if temporary:  # processes exchange reports through a file
            storage = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "study.journal"
        wider = space if chosen.size is None else None
        optuna_study = open_study(open_storage(storage), identity, chosen.pruner(), wider)
        loop = AskAndTell(objective, space, chosen, limit, seed, optuna_study, Path(log_dir) if log_dir else None)
        at_a_time = n_jobs
        if isinstance(chosen, PBT):  # all members at once
            at_a_time = loop.trials_left()
            workers_of_trials = population_runner(n_jobs, at_a_time, chosen, ray_cluster, seed)
        elif backend == "ray":
            workers_of_trials = ray_runner(n_jobs, storage, chosen, ray_cluster, optuna_study.study_name)
        else:
            workers_of_trials = local_runner(n_jobs, workers, storage)
        loop.run(stack.enter_context(workers_of_trials), at_a_time, progress)
        result = Study(
            _in_memory(optuna_study) if temporary else optuna_study, space, objective, seed, loop.interrupted
        )
    if not any(each.state == "complete" for each in result.trials):
        if loop.interrupted:
            raise KeyboardInterrupt
        raise NoTrialCompleted(result)
    if loop.interrupted:
        warn_user(f"interrupted: the study has what was done until then, {result}.")
    return result


def _in_memory(study: Any) -> Any:
    """A copy of a study in memory, for one whose temporary file is about to be deleted."""
    optuna = need("optuna", "a search")
    memory = optuna.storages.InMemoryStorage()
    optuna.copy_study(from_study_name=study.study_name, from_storage=study._storage, to_storage=memory)
    return optuna.load_study(study_name=study.study_name, storage=memory)


def _check_execution(
    budget: Budget | None, strategy: Strategy, name: str, with_trial: bool, n_jobs: int, backend: str, workers: str
) -> None:
    """Whether budget, strategy, objective and workers fit together.

    Args:
        name: of the strategy.
        with_trial: whether the objective takes a trial.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}.")
    if workers not in WORKERS:
        raise ValueError(f"workers must be one of {', '.join(WORKERS)}, got {workers!r}.")
    if isinstance(n_jobs, bool) or not isinstance(n_jobs, int) or n_jobs < 1:
        raise ValueError(f"n_jobs must be a whole number from 1, got {n_jobs!r}.")
    if budget is None and name != "grid":
        raise ValueError(
            f"strategy {name!r} has no end of its own: pass a budget, such as n_trials=64, timeout=600 or "
            "budget={'epochs': 500}."
        )
    if budget is not None and set(budget.limits) == {"epochs"} and not with_trial:
        raise ValueError(
            "a budget in epochs counts what trials report: let the objective be f(params, trial), with trial.report."
        )
    if isinstance(strategy, PBT) and backend != "ray":
        raise ValueError(
            f"strategy {name!r} trains a population side by side, which only Ray Tune does: pass backend='ray' and a storage."
        )
    if isinstance(strategy, PBT) and not (
        with_trial and budget and set(budget.limits) == {"trials"} and (budget.trials or 0) > 1
    ):
        raise ValueError(
            f"strategy {name!r} takes a budget in trials, the population, of 2 or more; and an objective f(params, trial), which "
            "decides how long it trains and calls trial.restore, trial.checkpoint and trial.report."
        )
    if strategy.needs_run and n_jobs > 1 and workers == "threads" and backend == "local":
        raise ValueError(f"strategy {name!r} seeds torch's generator, which threads share: use workers='processes'.")
