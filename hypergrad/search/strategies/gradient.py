r"""Gradient descent on the validation loss of whole runs, in the hyperparameters that have a derivative.

In the coordinate u ∈ [0, 1] of each entry's own scale (`space`), with x = x(u),

    u ← u − α D(dL/du),      dL/du = dL/dx · dx/du = Σ_g r_g ∂L/∂x_g · dx/du

where x_g = r_g x is what the run's param group g makes of the entry x, L the validation loss of the run that the objective builds
at these values, its gradient `hypergrad.hypergradient`'s, and D Adam with step sizes that halve after a worse value
(`hypergrad.whole_run.step_rules`). Every step builds the run anew with the trial's seed. A trial is one descent: "hypergradient"
begins the first at the space's own start and the next ones at random; "hybrid" lets a sampler of Optuna choose every start, and
with it what has no derivative.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from hypergrad.core.user_warnings import warn_user
from hypergrad.differentiate.hypergradient import hypergradient
from hypergrad.search.entries import Float
from hypergrad.search.objective import Objective, Trial, WrongType, call_objective, seeded
from hypergrad.search.space import Space, Values
from hypergrad.search.strategies.base import Strategy
from hypergrad.search.strategies.grid import Random
from hypergrad.search.strategies.samplers import CMA, GP, TPE
from hypergrad.search.strategies.tuned_entries import (
    NotDifferentiated,
    TunedEntry,
    columns_of,
    may_move,
    not_moved,
    tuned_entries,
    unchanged,
)
from hypergrad.search.training import hypers_of, is_run, train
from hypergrad.whole_run.run import COST_OF_PRODUCT, Run
from hypergrad.whole_run.step_rules import OuterSteps, Point


class HypergradientStrategy(Strategy):
    """What all strategies share in which hypergradients move some entries of a trial."""

    needs_run = True
    fewest: ClassVar[int] = 0  # how many entries must have a derivative

    def __init__(self, space: Space, seed: int, options: Mapping[str, Any]):
        super().__init__(space, seed, options)
        if self.fewest and not any(may_move(entry) for entry in space.values()):
            raise ValueError(
                "no entry of the space can be tuned by a hypergradient: that takes a Float without a step and without "
                "differentiable=False. For this space use 'tpe', 'random' or 'grid'."
            )

    def _built(self, objective: Objective, trial: Trial, values: Values) -> Run:
        trial.params = dict(values)
        with seeded(trial.seed):
            run = call_objective(objective, trial)
        if not is_run(run):
            raise WrongType(
                f"this strategy differentiates the training run: the objective must return hypergrad.Run(model, optimizer, "
                f"batches, loss, val_loss), got {type(run).__name__}."
            )
        return run._replace(batches=list(run.batches))

    def _tuned(self, run: Run, values: Values) -> dict[str, TunedEntry]:
        tuned = tuned_entries(run, self.space, values, self.aliases)
        if len(tuned) < self.fewest:
            raise WrongType(
                f"no entry of the space is a hyperparameter of the run with a derivative: its param groups have "
                f"{sorted(columns_of(run))}. Name entries like these, say which they are, such as "
                "aliases={'wd': 'weight_decay'}, or read them from the loss's third argument."
            )
        return tuned

    def _say_what_stays(self, trial: Trial, run: Run, values: Values, tuned: Mapping[str, TunedEntry]) -> None:
        """Before a run is trained: what could be moved and is not."""
        names, sentence = not_moved(self.space, values, run, tuned)
        if names:
            trial.note("not differentiated", names)
            warn_user(sentence, NotDifferentiated)

    def _float(self, name: str) -> Float:
        entry = self.space[name]
        assert isinstance(entry, Float)
        return entry


class WholeRunDescent(HypergradientStrategy):
    """One trial is one descent over whole runs.

    Options:
        steps: runs of one trial; all but the last are differentiated.
        step_size: of the first step, as a share of each entry's range.
        mode: of `hypergrad.hypergradient`: "unrolled" or "forward".
    """

    takes: ClassVar[tuple[str, ...]] = ("steps", "step_size", "mode")
    defaults: ClassVar[dict[str, Any]]

    def __init__(self, space: Space, seed: int, options: Mapping[str, Any]):
        super().__init__(space, seed, options)
        given = self.defaults | dict(options)
        self.steps, self.step_size, self.mode = given["steps"], given["step_size"], given["mode"]
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 2:
            raise ValueError(f"options: steps must be a whole number from 2, got {self.steps!r}.")
        if not (isinstance(self.step_size, (int, float)) and 0 < self.step_size <= 1):
            raise ValueError(
                f"options: step_size must be a share of the range, above 0 and at most 1, got {self.step_size!r}."
            )
        if self.mode not in ("unrolled", "forward"):
            raise ValueError(f"options: mode must be 'unrolled' or 'forward', got {self.mode!r}.")

    def run(self, objective: Objective, trial: Trial) -> float:
        """Descend from the trial's values; the best validation loss. The values that gave it are noted as `learned`."""
        values, path = dict(trial.params), []
        run = self._built(objective, trial, values)
        tuned = self._tuned(run, values)
        self._say_what_stays(trial, run, values, tuned)
        if not tuned:
            return train(run, trial)
        rule, u = OuterSteps("adam", self.step_size, len(tuned)), self._coordinates(values, tuned)
        for step in range(self.steps):
            last = step == self.steps - 1 or trial.exhausted
            value, gradient = (
                (train(run, trial), [0.0] * len(tuned)) if last else self._slope(run, trial, values, tuned)
            )
            rule.take(Point(trial.sign * value, u, trial.sign * torch.tensor(gradient, dtype=torch.float64), step))
            path.append({"value": value if math.isfinite(value) else None} | {name: values[name] for name in tuned})
            if last:
                break
            u = (u / 2 if rule.best is None else rule.next()).clamp(
                0, 1
            )  # nothing finite yet: towards the lower bounds
            values |= {n: self._float(n).from_unit(float(x)) for n, x in zip(tuned, u)}
            run = self._built(objective, trial, values)
            tuned = unchanged(tuned_entries(run, self.space, values, self.aliases), tuned)
        trial.note("path", path)
        if rule.best is None:
            raise ValueError(f"none of the {len(path)} runs ended with a finite validation loss: {path}.")
        best = path[rule.best.step]
        trial.note("learned", {name: best[name] for name in tuned})
        return trial.sign * rule.best.value

    def _coordinates(self, values: Values, tuned: Mapping[str, TunedEntry]) -> torch.Tensor:
        return torch.tensor([self._float(name).to_unit(values[name]) for name in tuned], dtype=torch.float64)

    def _slope(
        self, run: Run, trial: Trial, values: Values, tuned: Mapping[str, TunedEntry]
    ) -> tuple[float, list[float]]:
        """Validation loss and dL/du of the run."""
        in_groups = {each.name for each in tuned.values() if each.ratios is not None}
        hypers = {name: x for name, x in hypers_of(run, values).items() if name not in in_groups}
        result = hypergradient(
            run.model,
            run.optimizer,
            run.loss,
            run.batches,
            run.val_loss,
            wrt=tuple(dict.fromkeys(each.name for each in tuned.values())),
            mode=self.mode,
            hypers=hypers or None,
            val_steps=run.val_steps,
            schedules=run.schedules,
        )
        trial.count(result.stats["gradient_evaluations"] + COST_OF_PRODUCT * result.stats["hessian_products"])
        slopes = []
        for name, each in tuned.items():
            g = result.gradients[each.name].double()
            if each.ratios is not None:  # dL/dx = Σ_g r_g ∂L/∂x_g
                g = (g if each.part is None else g[:, each.part]) @ torch.tensor(each.ratios, dtype=torch.float64).to(g)
            slopes.append(float(g) * self._float(name).slope(values[name]))
        return float(result.value), slopes


class FromStart(Strategy):
    """Trials begin at the space's start, the next ones at random."""

    def point(self, number: int) -> Values | None:
        return self.space.first() if number == 0 else Random(self.space, self.seed, {}).point(number)


class Sampled(Strategy):
    """A sampler of Optuna for starts and for what has no derivative. Option `sampler`: "tpe", "gp" or "cma"."""

    samplers: ClassVar[dict[str, type[TPE | GP | CMA]]] = {"tpe": TPE, "gp": GP, "cma": CMA}

    def __init__(self, space: Space, seed: int, options: Mapping[str, Any]):
        super().__init__(space, seed, options)
        name = options.get("sampler", "tpe")
        if name not in self.samplers:
            raise ValueError(f"options: sampler must be one of {', '.join(self.samplers)}, got {name!r}.")
        self.chooser = self.samplers[name](space, seed, {})

    def sampler(self, number: int) -> Any:
        return self.chooser.sampler(number)


class Hypergradient(FromStart, WholeRunDescent):
    """Descents from the start of the space, the next ones from random points."""

    fewest, defaults = 1, {"steps": 10, "step_size": 0.1, "mode": "unrolled"}


class Hybrid(Sampled, WholeRunDescent):
    """Descents from points that a sampler chooses."""

    takes = (*WholeRunDescent.takes, "sampler")
    defaults: ClassVar[dict[str, Any]] = {"steps": 4, "step_size": 0.1, "mode": "unrolled"}
