"""Population-based training, Jaderberg et al. 2017 (arXiv 1711.09846): Ray Tune's scheduler.

A population trains side by side. Every few reports a member among the worst takes over weights and values of one among the best,
and its values are perturbed: times 1.2 or 0.8, or a neighbouring choice, or drawn anew; kept between the bounds. The
result is a schedule of values, in `notes["path"]`; a trial's `value` is the last one reported, `params` the values in force then.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, ClassVar

from hypergrad.search.convert import to_ray
from hypergrad.search.entries import Categorical, Entry, labels
from hypergrad.search.extras import made
from hypergrad.search.space import Space, Values
from hypergrad.search.strategies.grid import Random


class PBT(Random):
    """Options are those of `ray.tune.schedulers.PopulationBasedTraining`; intervals are counted in reports.

    The budget, in trials, is the population. The objective decides how long it trains; it must call `trial.checkpoint(state)`
    before each `trial.report`, and begin with `trial.restore()`.
    """

    fixed: ClassVar[dict[str, Any]] = {"time_attr": "training_iteration", "perturbation_interval": 2}

    def __init__(self, space: Space, seed: int, options: Mapping[str, Any]):
        super().__init__(space, seed, {})
        self.given = self.fixed | dict(options)
        self.size = None  # members may begin at the same point
        named = {
            n: Categorical(labels(x)) if isinstance(x, Categorical) and not x.when else x for n, x in space.items()
        }
        self.param_space = to_ray(named)  # Ray flattens choices that are dicts: it gets a name of each
        self.mutations = {name: _draws(entry) for name, entry in named.items() if _varies(entry)}
        if not self.mutations:
            raise ValueError("no entry of the space varies: population-based training has nothing to perturb.")
        self.scheduler()

    def scheduler(self) -> Any:
        return made(
            "ray.tune.schedulers",
            "PopulationBasedTraining",
            "strategy 'pbt'",
            metric="loss",
            mode="min",
            hyperparam_mutations=self.mutations,
            custom_explore_fn=self.inside,
            log_config=False,
            **self.given,
        )

    def inside(self, config: Values) -> Values:
        """Values back between their bounds."""
        for name in self.mutations:
            entry = self.space[name]
            if not isinstance(entry, Categorical):
                config[name] = min(max(config[name], entry.low), entry.high)
        return config


def _varies(entry: Entry) -> bool:
    return len(entry.choices) > 1 if isinstance(entry, Categorical) else entry.low < entry.high


def _draws(entry: Entry) -> Any:
    """What Ray perturbs from: a list, along which it steps, or a function that draws, whose numbers it multiplies."""
    if isinstance(entry, Categorical) or entry.step not in (None, 1):
        return entry.grid()
    return lambda: entry.from_unit(random.random())
