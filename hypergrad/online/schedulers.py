"""Schedulers beside a tuner: what they write that is not relative to the optimizer's own lr.

A tuner multiplies what a scheduler writes. A scheduler's factors (0.1 at a milestone, a cosine) are then its shape, whatever lr
was typed; its absolute numbers (eta_min, min_lr) are not, and are told to the user. torch keeps no list of an optimizer's
schedulers, so they are looked for, once, among the objects that refer to it.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.optim.swa_utils import SWALR

ABSOLUTE = ("eta_min", "min_lrs", "swa_lr")  # attributes of torch's schedulers that are learning rates


def schedulers_of(optimizer: Optimizer) -> list[LRScheduler]:
    """The schedulers that hold this optimizer, or a framework's wrapper of it; also those inside others."""
    referrers = gc.get_referrers(optimizer)
    owners = [owner for x in referrers if isinstance(x, dict) and x.get("optimizer") is optimizer
              for owner in gc.get_referrers(x)]  # fmt: skip
    holders = [*referrers, *owners]
    wrappers = [x for x in holders if isinstance(x, Optimizer) and vars(x).get("optimizer") is optimizer]
    found = [x for x in holders if isinstance(x, LRScheduler)]
    return found + [scheduler for wrapper in wrappers for scheduler in schedulers_of(wrapper)]


def holds_plateau(optimizer: Optimizer) -> bool:
    """Whether a ReduceLROnPlateau will write lr; unlike the others it leaves no `initial_lr` in the param groups."""
    return any(isinstance(x, ReduceLROnPlateau) for x in schedulers_of(optimizer))


def absolute_numbers(optimizer: Optimizer, base: float) -> Iterator[str]:
    """Sentences about learning rates that schedulers of this optimizer write as they are.

    Args:
        base: the lr of the first param group that counts as 1.
    """
    for scheduler in schedulers_of(optimizer):
        own = optimizer.param_groups[0] if isinstance(scheduler, SWALR) else {}  # where SWALR keeps it
        for name in ABSOLUTE:
            x = _first(getattr(scheduler, name, None)) or _first(own.get(name))
            if x:
                shown = name.removesuffix("s")
                yield (
                    f"{type(scheduler).__name__} has {shown}={x:g}, {x / base:.3g} times the optimizer's initial lr: hypergrad "
                    "multiplies what a scheduler writes, so that its shape depends on the lr that was typed. Give "
                    f"it relative to that: {shown}={x / base:.3g} * lr."
                )


def _first(x: Any) -> float:
    found = x[0] if isinstance(x, (list, tuple)) and x else x
    return float(found) if isinstance(found, (int, float)) else 0.0
