"""What users pass to the entry points, validated: optimizers, tensors, thresholds, names."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from hypergrad.differentiate.per_element import HOW
from hypergrad.differentiate.schedule_gradients import check_finite
from hypergrad.optimizers.binding import Values
from hypergrad.optimizers.ema import EMA
from hypergrad.optimizers.rule import Tensors, parts
from hypergrad.optimizers.transition import CLIPS

Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]


def as_optimizers(optimizer: Optimizers) -> list[torch.optim.Optimizer]:
    """One or several optimizers as a list, frameworks' wrappers taken off."""
    optimizers = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
    optimizers = [without_wrappers(opt) for opt in optimizers]
    for opt in optimizers:
        if not isinstance(opt, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer or a list of them, got {type(opt).__name__}.")
    if not optimizers:
        raise ValueError("the list of optimizers is empty.")
    return optimizers  # type: ignore[return-value]


def without_wrappers(optimizer: Any) -> Any:
    """The optimizer that steps, of one that hands its steps on to it.

    accelerate's and Lightning's wrappers pass for optimizers, and have no hooks: those of the optimizer inside are called.
    """
    while isinstance(optimizer, torch.optim.Optimizer) and "_optimizer_step_pre_hooks" not in getattr(
        optimizer, "__dict__", ()
    ):
        inside = getattr(optimizer, "optimizer", None)
        if not isinstance(inside, torch.optim.Optimizer):
            break
        optimizer = inside
    return optimizer


def clipping(clip_norm: float | None, clip_value: float | None) -> tuple[str | None, float]:
    """Name and threshold of the clipping stage; (None, 0) for none."""
    if clip_norm is not None and clip_value is not None:
        raise ValueError("pass clip_norm or clip_value, not both.")
    for name, m in (("clip_norm", clip_norm), ("clip_value", clip_value)):
        if m is not None:
            if not m > 0:
                raise ValueError(f"{name} must be a positive number, got {m}.")
            return name, float(m)
    return None, 0.0


def of_no_effect(values: Values, scheduled: Collection[str], wrt: Sequence[str]) -> str | None:
    """A sentence where every lr is 0, so that no other number of the optimizer has an effect; None: it is not so."""
    found = [x for x in values.get("lr", ()) if x is not None]
    others = [name for name in wrt if name in values and name != "lr"]
    if "lr" in scheduled or not others or not found or any(torch.as_tensor(x).ne(0).any() for x in found):
        return None
    return (
        f"lr is 0 in every param group: weights do not move, and the derivatives in {', '.join(others)} are 0. A scheduler's "
        "warm-up may begin there: set the lr of the steps that you mean, or pass schedules={'lr': ...}."
    )


def granularity(per: str | Mapping[str, str], names: Sequence[str]) -> dict[str, str]:
    """name -> "group", "parameter" or "element", of the names in param_groups. `names`: those that are differentiated."""
    single = {*CLIPS, EMA}
    if isinstance(per, str):
        per = {name: per for name in names if name not in single} or {"": per}
    out = {}
    for name, how in per.items():
        if how not in HOW:
            raise ValueError(f"per must be one of {', '.join(HOW)}, or a mapping from names to these, got {how!r}.")
        if name and (name in single or name not in names):
            known = [x for x in names if x not in single]
            raise ValueError(f"per[{name!r}]: not a name in param_groups that is in wrt; there are {known}.")
        out[name] = how
    return {name: how for name, how in out.items() if name}


def check_names(names: Sequence[str], values: Values, hypers: Tensors) -> None:
    """Raise where a name is not that of a hyperparameter that exists."""
    if len(set(names)) != len(names):
        raise ValueError(f"a hyperparameter is named twice in {tuple(names)}.")
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"hyperparameters are named by strings, got {type(name).__name__}.")
        if name in hypers and name in values:
            raise ValueError(f"{name!r} is a key of hypers and a name in param_groups: rename the key of hypers.")
        if name in hypers:
            continue
        if name in values:
            check_finite(name, values[name])
            continue
        if name in (*CLIPS, EMA):
            raise ValueError(f"to differentiate in {name!r}, pass {name}=<number>.")
        if any(name in parts(known) for known in values):
            whole = next(known for known in values if name in parts(known))
            raise ValueError(f"name all of them: {whole!r}, not {name!r}.")
        known = [*values, *hypers]
        raise ValueError(f"no param group has a hyperparameter {name!r} that can be differentiated; there are {known}.")
