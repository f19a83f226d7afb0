"""An objective of this search inside Hyperopt's `fmin`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from hypergrad.search.convert.hyperopt_spaces import flat
from hypergrad.search.objective import Objective, Trial, as_sign, evaluate, seed_of, takes_trial
from hypergrad.search.space import Space, as_space
from hypergrad.search.training import result_of


def hyperopt_objective(
    objective: Objective, space: Space | Mapping[str, Any], seed: int = 0, direction: str = "minimize"
) -> Any:
    """An objective as the function that Hyperopt's `fmin` minimises over `to_hyperopt(space)`.

    Its n-th call gets the seed that trial n of `optimize` gets. A trial that raises or gives NaN has Hyperopt's status "fail",
    with its traceback under "error". A `Run` is trained. What the objective reports prunes nothing: `fmin` has no pruner.

    Args:
        objective: as `optimize` takes it.
        space: the space that `to_hyperopt` was given.
        seed: of the study.
        direction: "minimize", or "maximize": the loss is minus what the objective returns, as `fmin` minimises.

    Returns:
        A function point → {"loss", "status", "params", "notes", "cost"}; params are the values of the point.

    Example:
        >>> import hyperopt, numpy
        >>> from hypergrad.search import Float, hyperopt_objective, to_hyperopt
        >>> space = {"x": Float(-1.0, 1.0)}
        >>> f = hyperopt_objective(lambda p: (p["x"] - 0.5) ** 2, space)
        >>> f({"x": 0.0})["loss"], f({"x": float("nan")})["status"]
        (0.25, 'fail')
        >>> best = hyperopt.fmin(f, to_hyperopt(space), hyperopt.tpe.suggest, 40, rstate=numpy.random.default_rng(0),
        ...                      show_progressbar=False, verbose=False)
        >>> bool(abs(best["x"] - 0.5) < 0.1)
        True
    """
    takes_trial(objective)
    return _Minimised(objective, as_space(space), seed, as_sign(direction))


class _Minimised:
    def __init__(self, objective: Objective, space: Space, seed: int, sign: float):
        self.objective, self.space, self.seed, self.sign, self.calls = objective, space, seed, sign, 0

    def __call__(self, point: Mapping[str, Any]) -> dict[str, Any]:
        values = flat(point, self.space)
        values = {name: values[name] for name in self.space.active(values)}
        trial = Trial(self.calls, values, seed_of(self.seed, self.calls), sign=self.sign)
        self.calls += 1
        outcome = evaluate(partial(result_of, self.objective), trial)
        details = {"params": values, "notes": outcome.notes, "cost": vars(outcome.cost)}
        if outcome.value is not None:
            return {"loss": self.sign * outcome.value, "status": "ok"} | details
        return {"status": "fail", "error": outcome.error or "the objective raised Pruned"} | details
