"""A stored study whose space has become wider.

Optuna fixes the choices of an entry, and its samplers model only what all trials have alike. So the trials are written into a new
study of the same storage, over the new space: same numbers, values, states and attributes. The study before stays as it is.
"""

from __future__ import annotations

import copy
import re
from typing import Any

from hypergrad.core.user_warnings import warn_user
from hypergrad.search.convert.optuna_spaces import distribution, encode, key, plain_value
from hypergrad.search.entries import Categorical
from hypergrad.search.extras import need
from hypergrad.search.space import Space, Values
from hypergrad.search.values import label_of

_LABEL = re.compile(r"\d+: (.*)", re.DOTALL)
_CMA = ("cma:", "sepcma:", "cmawm:", "x_for_tell")  # state of CMA-ES, of as many dimensions as the space had
_RUNGS = ("completed_rung_",)  # of Hyperband, which assigns trials to its brackets by the study's name


def moved(study: Any, space: Space) -> list[Any]:
    """The trials of a study over another space.

    Raises:
        ValueError: a trial has a value that the space does not have.
    """
    return [_moved(each, space) for each in study.get_trials()]


def extended(study: Any, trials: list[Any], space: Space, name: str, create: Any, identity_key: str) -> Any:
    """A new study with these trials, and a warning of what that means for them.

    Args:
        study: of Optuna, which has them over another space.
        trials: `moved` to the space.
        name: of the new study.
        create: makes an empty study of that name.
        identity_key: the one user attribute that the new study does not get.
    """
    optuna = need("optuna", "a search")
    new, dropped = create(study_name=name), _CMA
    if isinstance(new.pruner, optuna.pruners.HyperbandPruner):
        dropped += _RUNGS
    for each in trials:
        for attr in [x for x in each.system_attrs if x.startswith(dropped)]:
            each.system_attrs.pop(attr)
    new.add_trials(trials)
    for attr, x in study.user_attrs.items():
        if attr != identity_key:
            new.set_user_attr(attr, x)
    missing = [n for n in space if trials and not any(key(n, space[n]) in each.params for each in trials)]
    without = f" None of them has a value of {', '.join(missing)}." if missing else ""
    warn_user(
        f"the space of this study was extended: its {len(trials)} trials stay, with their values.{without} Samplers go on from "
        f"them; CMA-ES, and the rungs of Hyperband, begin anew. The study before is {study.study_name!r} in the same storage.",
    )
    return new


def _moved(frozen: Any, space: Space) -> Any:
    """A trial of Optuna over another space."""
    values: Values = {}
    for param, kept in frozen.params.items():
        name, value = plain_value(param, kept)
        if name not in space:
            raise ValueError(f"trial {frozen.number} has {name!r}, which the new space has not")
        values[name] = _choice(space[name], value, frozen.distributions[param])
        if values[name] not in space[name] or not _on_grid(space, name, values[name]):
            raise ValueError(f"trial {frozen.number} has {name}={values[name]!r}, outside the new {space[name]}")
    if gone := [name for name in values if not space.is_active(name, values)]:
        raise ValueError(
            f"trial {frozen.number} has {gone[0]!r}, which in the new space is not there beside its other values"
        )
    moved = copy.deepcopy(frozen)
    moved.params = encode(space, values)
    moved.distributions = {key(name, space[name]): distribution(space[name]) for name in values}
    return moved


def _choice(entry: Any, kept: Any, old: Any) -> Any:
    """What a storage has kept as the value that it is: of choices that are no plain values it has labels, "0: Adam"."""
    choices = getattr(old, "choices", ())
    labels = [_LABEL.fullmatch(x) if isinstance(x, str) else None for x in choices]
    if not (isinstance(entry, Categorical) and labels and all(labels)):
        return kept
    label = kept.partition(": ")[2]
    return next((x for x in entry.choices if label_of(x) == label), kept)


def _on_grid(space: Space, name: str, value: Any) -> bool:
    entry = space[name]
    step = getattr(entry, "step", None)
    return step is None or abs((value - entry.low) / step - round((value - entry.low) / step)) < 1e-9  # type: ignore[union-attr]
