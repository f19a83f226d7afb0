"""What is minimised or maximised: an objective, and the trial to which it may report.

An objective is a function `f(params)`, or `f(params, trial)` where it reports while it runs. It returns the validation loss, or a
score, which is maximised; or the training run that leads to it, a `Run`. A run can be trained with the values it was built with,
which is all that samplers need; and it can be differentiated, which is what strategies "hypergradient" and "hybrid" need.
"""

from __future__ import annotations

import functools
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hypergrad.core.signatures import positional
from hypergrad.search.budget import Budget, Cost
from hypergrad.search.failures import explained

Objective = Callable[..., Any]
DIRECTIONS = {"minimize": 1.0, "maximize": -1.0}  # of a study, and the sign with which its values are least at the best


class Pruned(Exception):
    """Raised by an objective that ends early because `trial.should_prune()` says so."""


class Trial:
    """The second argument of an objective: the values to try, and where to report losses and costs.

    Attributes:
        number: of the trial, from 0.
        params: the values it is to try, a dict.
        sign: 1.0 where the study minimises, -1.0 where it maximises.
        decay: whether a `Run` is trained with lr times a linear decay to zero, because its values were learned in such a run.
        seed: a number of its own, the same in every run of the same study. The global generators of random, numpy and torch are
            seeded with it while the trial runs (where trials do not run in threads).
    """

    def __init__(
        self,
        number: int,
        params: dict[str, Any],
        seed: int,
        reports: Any = None,
        remaining: RemainingBudget | None = None,
        sign: float = 1.0,
    ):
        self.number, self.params, self.seed, self.sign, self.decay = number, dict(params), seed, sign, False
        self.notes: dict[str, Any] = {}
        self.curve: list[tuple[int, float]] = []
        self.reports, self._remaining = reports, remaining or RemainingBudget()
        self._epochs = self._gradients = 0.0
        self.began = time.perf_counter()

    def report(self, value: Any, step: int | None = None) -> None:
        """Report the validation loss during training.

        Args:
            value: the validation loss so far.
            step: epochs done so far, from 1; None: one more than at the last report. This is what a budget in epochs counts and
                what Hyperband and ASHA call a resource.
        """
        step = (self.curve[-1][0] if self.curve else 0) + 1 if step is None else int(step)
        if step < 1 or (self.curve and step <= self.curve[-1][0]):
            raise ValueError(
                f"trial.report: steps count up from 1, got {step} after {[s for s, _ in self.curve[-1:]]}."
            )
        self.record(value, step)
        self._epochs = float(step)

    def record(self, value: Any, step: int) -> None:
        """As `report`, except that a budget in epochs does not count the step."""
        number = as_number(value, "trial.report was given")
        self.curve.append((step, number))
        if self.reports is not None:
            self.reports.report(number, step)

    def should_prune(self) -> bool:
        """Whether the strategy ends this trial early: raise `Pruned()` then."""
        return self.reports is not None and bool(self.curve) and self.reports.should_prune()

    def checkpoint(self, state: Any) -> None:
        """Save the state from which training can go on; call it before `report`.

        Strategy "pbt" and `ray_trainable` keep it, and `restore` returns it, perhaps in another trial. Other strategies ignore
        it.

        Args:
            state: data, which torch.load reads with weights_only=True: {"model": model.state_dict(), "optimizer": …, "tuner":
                tuner.state_dict(), "epoch": 3}.
        """

    def restore(self) -> Any:
        """The state from which this trial goes on; None: it begins anew. Hyperparameters come from `params`, not from it."""
        return None

    def count(self, gradient_evaluations: float) -> None:
        """Add gradient evaluations, which a budget may limit."""
        self._gradients += gradient_evaluations

    def note(self, name: str, value: Any) -> None:
        """Keep something beside the result: a column of the study's table. A number, a string, or lists and dicts of them."""
        try:
            json.dumps(value)
        except TypeError:
            raise TypeError(
                f"trial.note({name!r}, …) keeps numbers, strings, lists and dicts, got {type(value).__name__}."
            ) from None
        self.notes[name] = value

    @property
    def exhausted(self) -> bool:
        """Whether the study's budget (not counting trials) has run out while this trial runs."""
        return self._remaining.reached(self.cost)

    @property
    def cost(self) -> Cost:
        return Cost(1, self._epochs, self._gradients, time.perf_counter() - self.began)


class Reports:
    """Passes reports on to an Optuna trial, each step once: a trial that was cut off and is run again has some already."""

    def __init__(self, trial: Any):
        self.trial = trial

    def report(self, value: float, step: int) -> None:
        if step not in self.trial.storage.get_trial(self.trial._trial_id).intermediate_values:
            self.trial.report(value, step)

    def should_prune(self) -> bool:
        return self.trial.should_prune()


@dataclass(frozen=True)
class RemainingBudget:
    """A budget, and what of it was spent when a trial began."""

    budget: Budget | None = None
    spent: Cost = field(default_factory=Cost)

    def reached(self, cost: Cost) -> bool:
        limits = {} if self.budget is None else {u: x for u, x in self.budget.limits.items() if u != "trials"}
        return any(getattr(self.spent, unit) + getattr(cost, unit) >= limit for unit, limit in limits.items())


@dataclass
class Outcome:
    """How a trial ended: state "complete", "pruned" or "failed"."""

    state: str
    value: float | None
    cost: Cost
    notes: dict[str, Any]
    curve: list[tuple[int, float]]
    error: str | None = None  # of one that failed: message, the user's line, and traceback
    retries: int = 0  # how often it was run again because its worker died
    warnings: list[str] = field(default_factory=list)  # what a worker of another machine could not say itself


def evaluate(run: Callable[[Trial], float], trial: Trial, isolated: bool = True) -> Outcome:
    """Run a trial; what it raises becomes part of its outcome, except Ctrl-C and `WrongType`.

    Args:
        run: gives the validation loss.
        isolated: seed the global random number generators while the trial runs, and restore them afterwards.
    """
    state, value, error = "complete", None, None
    trial.began = time.perf_counter()
    with seeded(trial.seed) if isolated else nullcontext():
        try:
            value = as_number(run(trial), "the objective returned")
        except WrongType:
            raise
        except Pruned:
            state = "pruned"
        except Exception as raised:
            state = "pruned" if type(raised).__name__ == "TrialPruned" else "failed"
            error = None if state == "pruned" else explained(raised)
    if value is not None and (math.isnan(value) or value == -trial.sign * math.inf):
        state, error, value = "failed", f"ValueError: the objective returned {value}.", None
    return Outcome(state, value, trial.cost, trial.notes, trial.curve, error)


class WrongType(TypeError):
    """The objective returned or reported something that is no loss: this ends the study, at its first trial."""


def as_number(value: Any, who: str) -> float:
    """A loss as a float.

    Raises:
        WrongType: None, a tensor that needs grad, several numbers, or no number at all.

    Example:
        >>> as_number(torch.tensor(0.5), "f returned")
        0.5
        >>> as_number(None, "f returned")
        Traceback (most recent call last):
        hypergrad.search.objective.WrongType: f returned None: return the validation loss, a float.
    """
    if value is None:
        raise WrongType(f"{who} None: return the validation loss, a float.")
    if isinstance(value, Tensor):
        if value.requires_grad:
            raise WrongType(
                f"{who} a tensor that needs grad: compute it under torch.no_grad(), and return loss.item()."
            )
        if value.numel() != 1:
            raise WrongType(f"{who} a tensor of shape {tuple(value.shape)}: return one number.")
        return float(value)
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.item()
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Real):
        raise WrongType(f"{who} {value!r} ({type(value).__name__}): return the validation loss, a float.")
    return float(value)


def as_sign(direction: Any) -> float:
    """The sign of a direction.

    Raises:
        ValueError: it is neither "minimize" nor "maximize".
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be 'minimize' or 'maximize', got {direction!r}.")
    return DIRECTIONS[direction]


def takes_trial(objective: Objective) -> bool:
    """Whether an objective has a second argument, or one called `trial`.

    Raises:
        TypeError: it is no function, or one that cannot be called with one or two arguments.
    """
    if not callable(objective):
        raise TypeError(f"objective must be a function of a dict of values, got {type(objective).__name__}.")
    takes = positional(objective)
    if takes is None:
        return False
    required = len(takes.required)
    if required > 2 or not (takes.parameters or takes.variadic):
        raise TypeError(f"objective must take f(params) or f(params, trial); {name_of(objective)} takes {required}.")
    return required == 2 or (len(takes.parameters) > 1 and takes.parameters[1].name == "trial")


def call_objective(objective: Objective, trial: Trial) -> Any:
    """What an objective returns for a trial's values."""
    params = dict(trial.params)
    return objective(params, trial) if takes_trial(objective) else objective(params)


def name_of(objective: Objective) -> str:
    """The name by which a stored study recognises its objective."""
    while isinstance(objective, functools.partial):
        objective = objective.func
    return getattr(objective, "__qualname__", type(objective).__qualname__)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within this context the global generators of random, numpy and torch are seeded; afterwards they are as before."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def seed_of(study: int, number: int) -> int:
    """The seed of a trial, from that of the study.

    Example:
        >>> seed_of(0, 0) == seed_of(0, 0), seed_of(0, 0) == seed_of(0, 1), seed_of(0, 1) < 2**31
        (True, False, True)
    """
    return int(np.random.SeedSequence([study, number]).generate_state(1)[0] >> 1)
