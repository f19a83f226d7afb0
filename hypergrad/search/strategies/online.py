r"""Hypergradients inside one training run: a `hypergrad.Tuner` moves the entries that have a derivative while it trains.

A trial is one run, at `cost` times the seconds of a plain one; more where steps are short beside the tuner's own Python. With r_g
the ratio that the run's param group g holds of an entry x, and x_g the number that the tuner has brought it to, the entry's
learned value is

    x = exp mean_g log(x_g / r_g)          over the groups in which r_g is not 0

and stands for the run in `best_params`. lr is the scale of a short warm-up and a linear decay to zero over the run
(`hypergrad.schedules.decay_to_zero`), and is trained so again by `Study.verify`. "hypergradient-online" begins the first trial at
the space's own start and the next ones at random; with "hybrid-online" a sampler of Optuna chooses every start, and what has no
derivative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, ClassVar

from torch import Tensor

from hypergrad.core.hyperparameters import Hyperparameter
from hypergrad.online.progress import gradient_evaluations
from hypergrad.online.tuner import Tuner
from hypergrad.online.tuner_arguments import check_cost, check_numbers
from hypergrad.optimizers.rule import PARTS
from hypergrad.search.objective import Objective, Trial
from hypergrad.search.space import Space, Values
from hypergrad.search.strategies.gradient import FromStart, HypergradientStrategy, Sampled
from hypergrad.search.strategies.tuned_entries import TunedEntry
from hypergrad.search.training import hypers_of, train

KINDS = {"linear": "free", "log": "positive", "logit": "unit"}  # of what the loss reads, by the entry's scale


class Online(HypergradientStrategy):
    """One trial is one run that is tuned while it trains.

    Options are arguments of `hypergrad.Tuner`: every, hyper_lr, average, warm_start, cost. Of beta1 and beta2 both are
    tuned, or none.
    """

    takes: ClassVar[tuple[str, ...]] = ("every", "hyper_lr", "average", "warm_start", "cost")
    defaults: ClassVar[dict[str, Any]] = {}  # those that are not the tuner's own

    def __init__(self, space: Space, seed: int, options: Mapping[str, Any]):
        super().__init__(space, seed, options)
        check_numbers("forward", 1, options.get("every", 10), options.get("hyper_lr", 0.1), None)
        check_cost(options.get("cost"), None, "forward")

    def run(self, objective: Objective, trial: Trial) -> float:
        """Train and tune a run; its validation loss. The values that the entries end at are noted as `learned`."""
        values = dict(trial.params)
        run = self._built(objective, trial, values)
        if run.schedules:
            raise ValueError("schedules of a run cannot be tuned online: use strategy 'hypergradient' or 'hybrid'.")
        tuned = _whole_tuples(self._tuned(run, values))
        self._say_what_stays(trial, run, values, tuned)
        trial.note("decay", True)
        if not tuned:
            return train(run, trial, decay=True)
        hypers = self._starts(values, tuned)
        tuner = Tuner(
            run.model,
            run.optimizer,
            run.val_loss if trial.sign > 0 else _negative(run.val_loss),
            tune=self._bounds(tuned),
            hypers=hypers or None,
            mode="forward",
            total_steps=len(list(run.batches)),
            seed=trial.seed,
            **{name: x for name, x in (self.defaults | self.options).items() if name in Online.takes},
        )
        try:
            value = train(run, trial, tuner.backward, hypers_of(run, values) | tuner.hypers)
            trial.count(gradient_evaluations(tuner.stats) - tuner.stats["steps"])
            trial.note("learned", _learned(tuner.values, tuned))
        finally:
            tuner.close()
        return value

    def _starts(self, values: Values, tuned: Mapping[str, TunedEntry]) -> dict[str, Hyperparameter]:
        out = {}
        for name in (n for n, each in tuned.items() if each.ratios is None):
            entry = self._float(name)
            out[name] = Hyperparameter(values[name], (entry.low, entry.high), KINDS[entry.scale])
        return out

    def _bounds(self, tuned: Mapping[str, TunedEntry]) -> dict[str, Hyperparameter]:
        """Bounds of each name in the param groups: the widest that its entry has in any group."""
        ends: dict[str, list[float]] = {}
        for name, each in tuned.items():
            entry = self._float(name)
            ends.setdefault(each.name, []).extend(
                r * x for r in each.ratios or () if r for x in (entry.low, entry.high)
            )
        return {name: Hyperparameter(bounds=(min(x), max(x))) for name, x in ends.items() if x}


class HypergradientOnline(FromStart, Online):
    """Runs from the start of the space, the next ones from random points."""

    fewest = 1


class HybridOnline(Sampled, Online):
    """Runs from points that a sampler chooses, each tuned while it trains, in 1.5 times the seconds of a plain run."""

    takes = (*Online.takes, "sampler")
    defaults: ClassVar[dict[str, Any]] = {"cost": 1.5}


def _negative(score: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """−score, a loss of the same arguments."""

    @wraps(score)
    def loss(*args: Any) -> Tensor:
        return -score(*args)

    return loss


def _whole_tuples(tuned: Mapping[str, TunedEntry]) -> dict[str, TunedEntry]:
    """The entries without those such as beta1 whose tuple has parts that are no entries: a tuner moves all parts of a tuple."""
    names = [each.name for each in tuned.values()]
    return {
        n: each for n, each in tuned.items() if each.part is None or names.count(each.name) == len(PARTS[each.name])
    }


def _learned(found: Mapping[str, Tensor], tuned: Mapping[str, TunedEntry]) -> Values:
    out: Values = {}
    for name, each in tuned.items():
        numbers = found[each.name]
        if each.ratios is None:
            out[name] = float(numbers)
            continue
        column = numbers if each.part is None else numbers[:, each.part]
        logs = [math.log(float(x) / r) for x, r in zip(column, each.ratios, strict=True) if r]
        out[name] = math.exp(sum(logs) / len(logs))
    return out
