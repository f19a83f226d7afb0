"""Momentum, where it is tuned, begins at 0.9, whatever it was.

At a fixed lr/(1 − m), which is what lr finds (LrWarmStart), momentum costs nothing and widens the range of lr that is stable. A
run of 40 steps ends before 0.9 has paid: in one shorter than `least_steps` steps, a bound chosen by hand, a lower momentum stays
where it was typed. (0.9 was the best of three rules tried: online_tuning_log.md, fourth session.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hypergrad.online.policies.policy import Policy


@dataclass(frozen=True)
class MomentumStart(Policy):
    """Where a tuned momentum begins, unless the user gave its start."""

    momentum: float = 0.9
    least_steps: int = 400

    def first(self, typed: float, total: int | None) -> float:
        """Where momentum begins in a run of `total` steps (None: not known).

        Example:
            >>> first = MomentumStart().first
            >>> first(0.5, None), first(0.5, 4000), first(0.5, 100), first(0.99, 100)
            (0.9, 0.9, 0.5, 0.9)
        """
        return self.momentum if total is None or total >= self.least_steps else min(typed, self.momentum)


def largest_momentum(values: Mapping[str, Any], rules: Sequence[Any]) -> float:
    """The largest momentum of the param groups, 0 where there is none, or where it averages gradients instead of adding them up.

    Example:
        >>> from hypergrad.optimizers.rules.sgd import SGD
        >>> largest_momentum({"momentum": [0.5, None, 0.9]}, [SGD()] * 3), largest_momentum({}, [SGD()])
        (0.9, 0.0)
    """
    column = values.get("momentum", [])
    return max((x or 0.0 for x, rule in zip(column, rules) if not getattr(rule, "averages", False)), default=0.0)
