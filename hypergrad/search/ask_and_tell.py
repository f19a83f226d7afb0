"""`optimize`: trials one after the other, or several at once, until the budget is spent."""

from __future__ import annotations

import json
import tempfile
import time
import warnings
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hypergrad.search.budget import Budget, Cost, as_budget
from hypergrad.search.convert.optuna_spaces import encode, suggest
from hypergrad.search.extras import need
from hypergrad.search.logs import record_trial
from hypergrad.search.objective import Left, Objective, Outcome, Trial, name_of, seed_of, takes_trial
from hypergrad.search.ray_population import population_runner
from hypergrad.search.ray_workers import Cluster, as_cluster, check_sendable, ray_runner
from hypergrad.search.space import Space, Values, as_space
from hypergrad.search.storage import NAME, alone, open_storage, open_study, quiet
from hypergrad.search.strategies import make
from hypergrad.search.strategies.base import Strategy
from hypergrad.search.strategies.population_based import PBT
from hypergrad.search.study import NoTrialCompleted, Study, record
from hypergrad.search.workers import WORKERS, Runner, check_picklable, runner

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
    workers: str = "processes",
    options: Mapping[str, Any] | None = None,
    cluster: Cluster | Mapping[str, Any] | None = None,
    log_dir: str | Path | None = None,
    progress: bool | None = None,
) -> Study:
    """Minimise a validation loss over a space of hyperparameters, p* = argmin f(p).

    Args:
        objective: `f(params)` or `f(params, trial)`, params a dict of the entries that are there. It returns the validation loss,
            a float; infinity is the worst there is, NaN is a failure. Or it returns the training run, a `hypergrad.Run`, with the
            optimizer made of these values: strategies with hypergradients need that, all others train it.
        space: name → Float, Int, Categorical, a list of choices or a constant.
        strategy: "grid", "random", "tpe", "gp", "cma", "hyperopt", "hyperband", "asha", "hypergradient" or "hybrid" (descents
            over whole runs), "hypergradient-online" or "hybrid-online" (a Tuner in every run), or, with backend "ray", "pbt".
        budget: a `Budget`, a dict such as {"trials": 64} or {"seconds": 600}, or a number of trials. None: all of a finite grid.
        seed: of everything that is drawn.
        storage: path of a journal file, from which a call with the same arguments goes on; a URL or a storage of Optuna. None: in
            memory. What counts as the same study is objective's name, space, strategy, options and seed.
        n_jobs: trials at a time. With more than one, which trials a sampler has seen when it chooses depends on the clock.
        backend: "local", or "ray": n_jobs trials at a time on the workers of a Ray cluster (docs/ray.md). It needs a storage. The
            trial of a worker that dies is run again.
        workers: what n_jobs > 1 runs in: "processes", for which the objective must be importable (a module's function), or
            "threads", which share random number generators: they are not seeded for each trial then.
        options: of the strategy: arguments of its class in Optuna, or steps, step_size and mode of hypergradients; online, every,
            hyper_lr, average, warm_start and curvature of the Tuner; for hybrids also sampler.
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
    space, limit = as_space(space), as_budget(budget)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed must be a whole number from 0, got {seed!r}.")
    speaks = takes_trial(objective)
    need("optuna", "a search")
    chosen = make(strategy, space, seed, options or {})
    _check_how(limit, chosen, strategy, speaks, n_jobs, backend, workers)
    on = as_cluster(cluster)
    if backend == "ray":
        check_sendable(objective, storage)
    elif cluster is not None:
        raise ValueError("cluster describes a Ray cluster: pass backend='ray' with it.")
    study = {
        "objective": name_of(objective),
        "space": space.describe(),
        "strategy": strategy,
        "options": json.loads(json.dumps(dict(options or {}), default=str)),
        "seed": seed,
    }
    with ExitStack() as stack:
        stack.enter_context(alone(storage))
        stack.enter_context(quiet())
        in_processes = backend == "local" and n_jobs > 1 and workers == "processes"
        passing = in_processes and storage is None
        if in_processes:
            check_picklable(objective)
        if passing:  # processes speak through a file
            storage = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "study.journal"
        asked = open_study(open_storage(storage), study, chosen.pruner())
        loop = Loop(objective, space, chosen, limit, seed, asked, Path(log_dir) if log_dir else None)
        at_a_time = n_jobs
        if isinstance(chosen, PBT):  # all members at once
            at_a_time = loop.left()
            where = population_runner(n_jobs, at_a_time, chosen, on, seed)
        elif backend == "ray":
            where = ray_runner(n_jobs, storage, chosen, on)
        else:
            where = runner(n_jobs, workers, storage)
        loop.run(stack.enter_context(where), at_a_time, progress)
        result = Study(_in_memory(asked) if passing else asked, space, objective, seed, loop.interrupted)
    if not any(each.state == "complete" for each in result.trials):
        if loop.interrupted:
            raise KeyboardInterrupt
        raise NoTrialCompleted(result)
    if loop.interrupted:
        warnings.warn(f"interrupted: the study has what was done until then, {result}.", stacklevel=2)
    return result


class Loop:
    """Asks for trials, has them run, and tells how they ended.

    Args:
        asked: the Optuna study.
    """

    def __init__(
        self,
        objective: Objective,
        space: Space,
        strategy: Strategy,
        budget: Budget | None,
        seed: int,
        asked: Any,
        log_dir: Path | None,
    ):
        self.objective, self.space, self.strategy, self.budget = objective, space, strategy, budget
        self.seed, self.asked, self.log_dir = seed, asked, log_dir
        self.earlier, self.began = float(asked.user_attrs.get("seconds", 0.0)), time.perf_counter()

        self.running: dict[Future[Outcome], tuple[Any, Values]] = {}
        self.interrupted = False
        finished = [each for each in self._frozen() if each.state.is_finished()]
        self.spent = Cost.total(record(each, space).cost for each in finished)
        self.left_open = [each for each in self._frozen() if not each.state.is_finished()]

    def _frozen(self) -> list[Any]:
        return self.asked.get_trials(deepcopy=False)

    def left(self) -> int:
        """Trials that the budget leaves."""
        return max(0, int((self.budget and self.budget.trials) or 0) - int(self.spent.trials))

    def run(self, executor: Runner, n_jobs: int, progress: bool | None) -> None:
        """Until the budget is spent, or Ctrl-C."""
        total = min((x for x in (self.strategy.size, self.budget and self.budget.trials) if x), default=None)
        disable = None if progress is None else not progress
        bar = tqdm(total=total, initial=self.spent.trials, desc="search", unit="trial", disable=disable)
        try:
            while True:
                while len(self.running) < n_jobs and not self._done():
                    self._begin(executor)
                if not self.running:
                    break
                for future in wait(self.running, return_when=FIRST_COMPLETED).done:
                    self._end(future)
                    bar.update()
                    best = min((x.value for x in self._frozen() if x.state.name == "COMPLETE"), default=None)
                    bar.set_postfix({} if best is None else {"best": f"{best:.5g}"})
        except KeyboardInterrupt:
            self.interrupted = True
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a worker process died (killed, or out of memory). What had ended is kept; with a storage in a file, the same "
                "call goes on and runs again what was cut off."
            ) from error
        finally:
            bar.close()

    def _clock(self) -> Cost:
        return replace(self.spent, seconds=self.earlier + time.perf_counter() - self.began)

    def _done(self) -> bool:
        if self.left_open:
            return self.budget is not None and self.budget.reached(self._clock())
        n = self.spent.trials + len(self.running)
        if self.strategy.size is not None and n >= self.strategy.size:
            return True
        return self.budget is not None and self.budget.reached(replace(self._clock(), trials=n))

    def _begin(self, executor: Runner) -> None:
        trial = self._ask()
        values = suggest(self.space, trial)
        own = Trial(trial.number, values, seed_of(self.seed, trial.number), None, Left(self.budget, self._clock()))
        self.running[executor.submit(self.objective, self.strategy, own, trial)] = trial, values

    def _ask(self) -> Any:
        """The next trial of Optuna: one that an earlier call left open, or a new one."""
        optuna = need("optuna", "a search")
        if self.left_open:
            frozen = self.left_open.pop(0)
            self.asked.sampler = self.strategy.sampler(frozen.number)
            if frozen.state.name == "RUNNING":
                return optuna.Trial(self.asked, frozen._trial_id)
            return self.asked.ask()  # Optuna hands out waiting trials in their order
        number = len(self._frozen())
        self.asked.sampler, point = self.strategy.sampler(number), self.strategy.point(number)
        if point is not None:
            self.asked.enqueue_trial(encode(self.space, self.space.check(point)))
        return self.asked.ask()

    def _end(self, future: Future[Outcome]) -> None:
        outcome = future.result()
        trial, values = self.running.pop(future)
        optuna = need("optuna", "a search")
        trial.set_user_attr("cost", asdict(outcome.cost))
        if outcome.notes:
            trial.set_user_attr("notes", outcome.notes)
        if outcome.error:
            trial.set_user_attr("error", outcome.error)
        if outcome.retries:
            trial.set_user_attr("retries", outcome.retries)
        state = {"complete": "COMPLETE", "pruned": "PRUNED", "failed": "FAIL"}[outcome.state]
        self.asked.tell(trial, outcome.value, state=getattr(optuna.trial.TrialState, state))
        self.spent += outcome.cost
        self.asked.set_user_attr("seconds", self._clock().seconds)
        if self.log_dir is not None:
            record_trial(self.log_dir, trial.number, values | outcome.notes.get("learned", {}), outcome)
        self._check_counted(outcome)

    def _check_counted(self, outcome: Outcome) -> None:
        """A first trial that counts nothing would be followed by others without end."""
        if outcome.state != "complete":
            return
        units = self.budget.limits if self.budget else {}
        if units and self.strategy.size is None and not any(getattr(self._clock(), unit) for unit in units):
            raise ValueError(
                f"the budget is in {' and '.join(units)}, but the objective counts none: call trial.report(value, step) for "
                "epochs, trial.count(n) for gradient evaluations, or set a budget in trials or seconds."
            )
        if self.strategy.needs_reports and not outcome.curve:
            raise ValueError(
                "this strategy gives trials up early by what they report, and the objective reports nothing: call "
                "trial.report(value, step), and raise hypergrad.search.Pruned() where trial.should_prune()."
            )


def _in_memory(asked: Any) -> Any:
    """A copy of a study whose file is about to go."""
    optuna = need("optuna", "a search")
    memory = optuna.storages.InMemoryStorage()
    optuna.copy_study(from_study_name=NAME, from_storage=asked._storage, to_storage=memory)
    return optuna.load_study(study_name=NAME, storage=memory)


def _check_how(
    budget: Budget | None, strategy: Strategy, name: str, speaks: bool, n_jobs: int, backend: str, workers: str
) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}.")
    if workers not in WORKERS:
        raise ValueError(f"workers must be one of {', '.join(WORKERS)}, got {workers!r}.")
    if isinstance(n_jobs, bool) or not isinstance(n_jobs, int) or n_jobs < 1:
        raise ValueError(f"n_jobs must be a whole number from 1, got {n_jobs!r}.")
    if budget is None and name != "grid":
        raise ValueError(f"strategy {name!r} has no end of its own: pass a budget, such as budget={{'trials': 64}}.")
    if budget is not None and set(budget.limits) == {"epochs"} and not speaks:
        raise ValueError(
            "a budget in epochs counts what trials report: let the objective be f(params, trial), with trial.report."
        )
    if isinstance(strategy, PBT) and backend != "ray":
        raise ValueError(
            f"strategy {name!r} trains a population side by side, which only Ray Tune does: pass backend='ray' and a storage."
        )
    if isinstance(strategy, PBT) and not (
        speaks and budget and set(budget.limits) == {"trials"} and (budget.trials or 0) > 1
    ):
        raise ValueError(
            f"strategy {name!r} takes a budget in trials, the population, of 2 or more; and an objective f(params, trial), which "
            "says how long it trains and calls trial.restore, trial.checkpoint and trial.report."
        )
    if strategy.needs_run and n_jobs > 1 and workers == "threads" and backend == "local":
        raise ValueError(f"strategy {name!r} seeds torch's generator, which threads share: use workers='processes'.")
