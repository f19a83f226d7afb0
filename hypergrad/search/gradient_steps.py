r"""Hypergradient steps inside an Optuna study: from trials that ended with a value and a gradient to the next one's values.

In the coordinate u ∈ [0, 1] of each entry's own scale, with p = p(u) and the gradient g = dL/dp · dp/du of the best trial,

    u ← u − α g,      α = 2⁻ᵏ · step_size / max|g|

so that p ← p − α ∇f(p) moves the entry that matters most by a share of its range. k counts the steps that were proposed from this
trial before: while they end worse it remains the best, and the next one is half as long.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hypergrad.search.convert.optuna_spaces import decode, encode
from hypergrad.search.entries import Float
from hypergrad.search.space import Space, Values, as_space
from hypergrad.search.storage import sign_of

GRADIENT, FROM = "hypergradient", "hypergradient step from trial"  # user attributes


def note_hypergradient(trial: Any, gradients: Mapping[str, Any]) -> None:
    """Store dL/dvalue as a user attribute of an Optuna trial, for `enqueue_hypergradient_step`.

    Args:
        trial: of Optuna, inside its objective.
        gradients: name → derivative of the validation loss in the value itself: a float, or a tensor, whose elements are
            added up, as `hypergrad.hypergradient` gives them for the param groups of one value.

    Raises:
        TypeError: no mapping.
        ValueError: a derivative that is not finite.
    """
    if not isinstance(gradients, Mapping):
        raise TypeError(f"gradients must be a dict of name → dL/dvalue, got {type(gradients).__name__}.")
    numbers = {name: float(g.sum() if hasattr(g, "sum") else g) for name, g in gradients.items()}
    for name, g in numbers.items():
        if not math.isfinite(g):
            raise ValueError(
                f"the hypergradient in {name!r} is {g}: training is chaotic there, and there is no step to take."
            )
    trial.set_user_attr(GRADIENT, numbers)


def hypergradient_step(study: Any, space: Space | Mapping[str, Any], step_size: float = 0.1) -> Values | None:
    """Values one step down the gradient of the best trial that has one; None where there is none, or its gradient is 0.

    Args:
        study: of Optuna; one that maximises is climbed.
        space: the space that its objective suggests from (`search.suggest`).
        step_size: share of its range that the entry of largest slope moves by.
    """
    found = _step(study, as_space(space), step_size)
    return found and found[0]


def enqueue_hypergradient_step(study: Any, space: Space | Mapping[str, Any], step_size: float = 0.1) -> bool:
    """Let the next trial of an Optuna study be a hypergradient step from its best one.

    Samplers, pruners and other enqueued trials work as before; call it before `study.optimize`, or from a callback.

    Args:
        study, space, step_size: as `hypergradient_step` has them.

    Returns:
        Whether there was a step to take.

    Example:
        >>> import optuna
        >>> from hypergrad.search import Float, suggest
        >>> optuna.logging.set_verbosity(optuna.logging.ERROR)
        >>> space = {"x": Float(0.0, 10.0)}
        >>> def objective(trial):
        ...     x = suggest(space, trial)["x"]
        ...     note_hypergradient(trial, {"x": 2 * (x - 4)})
        ...     return (x - 4) ** 2
        >>> study = optuna.create_study()
        >>> study.enqueue_trial({"x": 9.0})
        >>> for _ in range(6):
        ...     study.optimize(objective, n_trials=1)
        ...     _ = enqueue_hypergradient_step(study, space)
        >>> [trial.params["x"] for trial in study.trials[:6]]
        [9.0, 8.0, 7.0, 6.0, 5.0, 4.0]
    """
    found = _step(study, as_space(space), step_size)
    if found is None:
        return False
    values, number = found
    study.enqueue_trial(encode(as_space(space), values), user_attrs={FROM: number})
    return True


def _step(study: Any, space: Space, step_size: float) -> tuple[Values, int] | None:
    """The values, and the trial that they are a step from."""
    if isinstance(step_size, bool) or not isinstance(step_size, (int, float)) or not 0 < step_size <= 1:
        raise ValueError(f"step_size must be a share of the range, above 0 and at most 1, got {step_size!r}.")
    sign = sign_of(study)
    trials = study.get_trials(deepcopy=False)
    have = [x for x in trials if x.state.name == "COMPLETE" and x.user_attrs.get(GRADIENT)]
    if not have:
        return None
    best = min(have, key=lambda x: sign * x.value)
    values, slopes = decode(space, best.params), {}
    for name, g in best.user_attrs[GRADIENT].items():
        entry = space.get(name)
        if not isinstance(entry, Float) or entry.step is not None:
            raise ValueError(
                f"trial {best.number} has a hypergradient in {name!r}, which is no Float without a step of the space."
            )
        if name in values:
            slopes[name] = sign * g * entry.slope(values[name])
    largest = max((abs(g) for g in slopes.values()), default=0.0)
    if largest == 0:
        return None
    before = sum(x.user_attrs.get(FROM) == best.number for x in trials)
    alpha = step_size / 2**before / largest
    for name, g in slopes.items():
        entry = space[name]
        assert isinstance(entry, Float)
        values[name] = entry.from_unit(min(max(entry.to_unit(values[name]) - alpha * g, 0.0), 1.0))
    return values, best.number
