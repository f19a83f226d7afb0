"""The loop of a search: ask Optuna for trials, have them run, and tell it how they ended."""

from __future__ import annotations

import time
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hypergrad.core.user_warnings import warn_user
from hypergrad.search.budget import Budget, Cost
from hypergrad.search.convert.optuna_spaces import encode, suggest
from hypergrad.search.extras import need
from hypergrad.search.logs import record_trial
from hypergrad.search.objective import Objective, Outcome, RemainingBudget, Trial, seed_of
from hypergrad.search.records import record
from hypergrad.search.space import Space, Values
from hypergrad.search.storage import sign_of
from hypergrad.search.strategies.base import Strategy
from hypergrad.search.strategies.tuned_entries import NotDifferentiated
from hypergrad.search.workers import Runner


class AskAndTell:
    """Trials of one study, as many at a time as there are workers, until the budget is spent.

    Args:
        objective, space, strategy, budget, seed: as of `optimize`.
        study: of Optuna; the trials that it has already are counted, and those that were cut off are run again.
        log_dir: folder for TensorBoard, or None.

    Attributes:
        interrupted: whether Ctrl-C ended it.
    """

    def __init__(
        self,
        objective: Objective,
        space: Space,
        strategy: Strategy,
        budget: Budget | None,
        seed: int,
        study: Any,
        log_dir: Path | None,
    ):
        self.objective, self.space, self.strategy, self.budget = objective, space, strategy, budget
        self.seed, self.study, self.log_dir, self.sign = seed, study, log_dir, sign_of(study)
        self.seconds_before, self.began = float(study.user_attrs.get("seconds", 0.0)), time.perf_counter()

        self.running: dict[Future[Outcome], tuple[Any, Values]] = {}
        self.interrupted = False
        finished = [each for each in self._frozen() if each.state.is_finished()]
        self.spent = Cost.total(record(each, space).cost for each in finished)
        self.unfinished = [each for each in self._frozen() if not each.state.is_finished()]

    def _frozen(self) -> list[Any]:
        return self.study.get_trials(deepcopy=False)

    def trials_left(self) -> int:
        """How many trials the budget allows besides those that have ended."""
        return max(0, int((self.budget and self.budget.trials) or 0) - int(self.spent.trials))

    def run(self, executor: Runner, n_jobs: int, progress: bool | None) -> None:
        """Run trials, `n_jobs` at a time, until the budget is spent or Ctrl-C is pressed."""
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
                    best = min(
                        (self.sign * x.value for x in self._frozen() if x.state.name == "COMPLETE"), default=None
                    )
                    bar.set_postfix({} if best is None else {"best": f"{self.sign * best:.5g}"})
        except KeyboardInterrupt:
            self.interrupted = True
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a worker process died (killed, or out of memory). The trials that had ended are kept; with a storage in a file, "
                "the same call of optimize goes on and runs again the trials that were cut off."
            ) from error
        finally:
            bar.close()

    def _spent_now(self) -> Cost:
        return replace(self.spent, seconds=self.seconds_before + time.perf_counter() - self.began)

    def _done(self) -> bool:
        if self.unfinished:
            return self.budget is not None and self.budget.reached(self._spent_now())
        n = self.spent.trials + len(self.running)
        if self.strategy.size is not None and n >= self.strategy.size:
            return True
        return self.budget is not None and self.budget.reached(replace(self._spent_now(), trials=n))

    def _begin(self, executor: Runner) -> None:
        trial = self._ask()
        values = suggest(self.space, trial)
        remaining = RemainingBudget(self.budget, self._spent_now())
        own = Trial(trial.number, values, seed_of(self.seed, trial.number), remaining=remaining, sign=self.sign)
        self.running[executor.submit(self.objective, self.strategy, own, trial)] = trial, values

    def _ask(self) -> Any:
        """The next trial of Optuna: one that an earlier call did not finish, or a new one."""
        optuna = need("optuna", "a search")
        if self.unfinished:
            frozen = self.unfinished.pop(0)
            self.study.sampler = self.strategy.sampler(frozen.number)
            if frozen.state.name == "RUNNING":
                return optuna.Trial(self.study, frozen._trial_id)
            return self.study.ask()  # which returns waiting trials in their order
        number = len(self._frozen())
        self.study.sampler, point = self.strategy.sampler(number), self.strategy.point(number)
        if point is not None:
            self.study.enqueue_trial(encode(self.space, self.space.check(point)))
        return self.study.ask()

    def _end(self, future: Future[Outcome]) -> None:
        outcome = future.result()
        trial, values = self.running.pop(future)
        optuna = need("optuna", "a search")
        for sentence in outcome.warnings:
            warn_user(sentence, NotDifferentiated)
        trial.set_user_attr("cost", asdict(outcome.cost))
        if outcome.notes:
            trial.set_user_attr("notes", outcome.notes)
        if outcome.error:
            trial.set_user_attr("error", outcome.error)
        if outcome.retries:
            trial.set_user_attr("retries", outcome.retries)
        state = {"complete": "COMPLETE", "pruned": "PRUNED", "failed": "FAIL"}[outcome.state]
        self.study.tell(trial, outcome.value, state=getattr(optuna.trial.TrialState, state))
        self.spent += outcome.cost
        self.study.set_user_attr("seconds", self._spent_now().seconds)
        if self.log_dir is not None:
            record_trial(self.log_dir, trial.number, values | outcome.notes.get("learned", {}), outcome)
        self._check_counted(outcome)

    def _check_counted(self, outcome: Outcome) -> None:
        """Refuse an objective that counts nothing of what the budget is in: trials would follow each other without end."""
        if outcome.state != "complete":
            return
        units = self.budget.limits if self.budget else {}
        if units and self.strategy.size is None and not any(getattr(self._spent_now(), unit) for unit in units):
            raise ValueError(
                f"the budget is in {' and '.join(units)}, but the objective counts none: call trial.report(value, step) for "
                "epochs, trial.count(n) for gradient evaluations, or set a budget in trials or seconds."
            )
        if self.strategy.needs_reports and not outcome.curve:
            raise ValueError(
                "this strategy gives trials up early by what they report, and the objective reports nothing: call "
                "trial.report(value, step), and raise hypergrad.search.Pruned() where trial.should_prune()."
            )
