r"""Hypergradient steps inside an Optuna study: from trials that ended with a value and a gradient to the next one's values.

In the coordinate u ∈ [0, 1] of each entry's own scale, with p = p(u) and g = dL/dp · dp/du,

    u ← u − α σ D(g)

is the step of `tune_run` with outer="adam" (`whole_run.step_rules`): the first moves every entry by step_size of its range; σ
halves where the trial of a step ended worse than the one it was a step from, or without a value, and grows a little where it did
not. What D and σ are follows from the study's trials; a better trial that is no such step begins anew.

(A step of a fixed share of the range for the entry of the largest slope, halved after a worse trial, was the rule before; it came
less close on the quadratic of the tests.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hypergrad.search.convert.optuna_spaces import decode, encode
from hypergrad.search.entries import Float
from hypergrad.search.space import Space, Values, as_space
from hypergrad.search.storage import sign_of
from hypergrad.whole_run.step_rules import OuterSteps, Point, vector

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
        step_size: of the first step, as a share of each entry's range.
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
        >>> for _ in range(8):
        ...     study.optimize(objective, n_trials=1)
        ...     _ = enqueue_hypergradient_step(study, space)
        >>> [round(trial.params["x"], 2) for trial in study.trials[:8]]
        [9.0, 8.0, 6.82, 5.46, 3.98, 2.58, 3.99, 4.0]
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
    steps, names, best = OuterSteps("adam", step_size, 0), [], None
    for trial in study.get_trials(deepcopy=False):
        follows = best is not None and trial.user_attrs.get(FROM) == best.number
        if trial.state.name == "COMPLETE" and trial.user_attrs.get(GRADIENT):
            own, point = _point(trial, space, sign_of(study))
            if not follows and (steps.best is None or point.value < steps.best.value):
                steps, names = OuterSteps("adam", step_size, len(own)), own
            elif not follows:
                continue
            best = trial if steps.take(point) else best
        elif follows and steps.best is not None:  # it failed, was pruned, or waits
            steps.take(replace(steps.best, value=math.nan))
    if best is None or steps.best is None or not steps.best.gradient.any():
        return None
    coordinates = zip(names, steps.next().clamp(0, 1).tolist(), strict=True)
    moved = {name: _moves(best, space, name).from_unit(u) for name, u in coordinates}
    return decode(space, best.params) | moved, best.number


def _point(trial: Any, space: Space, sign: float) -> tuple[list[str], Point]:
    """The entries in which a trial has a gradient, and its value and dL/du at their coordinates."""
    values, gradients = decode(space, trial.params), trial.user_attrs[GRADIENT]
    entries = {name: _moves(trial, space, name) for name in gradients}
    entries = {name: entry for name, entry in entries.items() if name in values}
    slopes = [sign * gradients[name] * entry.slope(values[name]) for name, entry in entries.items()]
    units = [entry.to_unit(values[name]) for name, entry in entries.items()]
    return list(entries), Point(sign * trial.value, vector(units), vector(slopes), trial.number)


def _moves(trial: Any, space: Space, name: str) -> Float:
    entry = space.get(name)
    if not isinstance(entry, Float) or entry.step is not None:
        raise ValueError(
            f"trial {trial.number} has a hypergradient in {name!r}, which is no Float without a step of the space."
        )
    return entry
