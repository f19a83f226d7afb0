"""What tuning may cost, in seconds, and what follows from it: in which steps products are formed, how often val_loss is read.

The unit is the plain training step. With p the seconds of what a Hessian product of one number adds to a step, v those of the
validation loss with its gradient (a forward pass alone is about v/3), k numbers that are tuned and a reading every e steps,

    a step with products adds       k p + v/e
    a step without adds             v/(3 r), one reading in r steps
    so with T steps                 (cost − 1) T − T v/(3 r)         may be spent on the former

p and v are measured once, in the first steps of a run, and rounded up to powers of 2^(1/4), so that most runs of one script have
one plan. From there on no clock is read: a run repeats bit for bit given its plan.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

PERIOD = 1000  # steps over which the cost is kept where the length of the run is not known
MOST_EVERY = 5  # at most so many times the steps between readings that were asked for
ON_READINGS = 0.25  # the share of what is spent that goes to readings, where they can be made rarer
ROUND = 2**0.25


@dataclass(frozen=True)
class Plan:
    """A bound on the seconds of a run. `Plan.made` makes one; `print(plan)` says what follows from it.

    Attributes:
        cost: a tuned run over a plain one, at most.
        product: what a product of one number adds to a step, in plain steps.
        validation: the validation loss and its gradient, in plain steps.
        every: steps between readings while something is tuned.
        resting: the same while nothing is.
    """

    cost: float
    product: float
    validation: float
    every: int
    resting: int

    @staticmethod
    def made(cost: float, product: float, validation: float, every: int, fixed: bool = False) -> Plan:
        """The plan for what was measured.

        Args:
            every: steps between readings that were asked for.
            fixed: they are not to be made rarer.

        Example:
            >>> plan = Plan.made(2.0, 2.7, 3.0, 10)
            >>> round(plan.product, 3), round(plan.validation, 3), plan.every, plan.resting
            (2.828, 3.364, 10, 10)
        """
        product, validation = _rounded_up(product), _rounded_up(validation)
        if fixed:
            return Plan(cost, product, validation, every, every)
        share = ON_READINGS
        while_tuned = validation * (1 - share) / (share * product)  # v/e is that share of p + v/e
        resting = validation / 3 / (share * (cost - 1))
        every, resting = (math.ceil(min(max(x, every), MOST_EVERY * every)) for x in (while_tuned, resting))
        return Plan(cost, product, validation, every, resting)

    def price(self, k: int) -> float:
        """What a step with products of k numbers adds, in plain steps."""
        return k * self.product + self.validation / self.every

    def allowance(self, steps: int) -> float:
        """What may be spent on steps with products in so many steps, in plain steps; 0: nothing."""
        return max((self.cost - 1 - self.validation / 3 / self.resting) * steps, 0.0)

    def sentence(self, total: int | None) -> str:
        """What follows from it, for one number at a time."""
        length = PERIOD if total is None else total
        steps = min(self.allowance(length) / self.price(1), length)
        of = f"{steps:,.0f} of {length:,}" if total is not None else f"{steps:,.0f} in each {length:,}"
        return (
            f"plan for cost={self.cost:g}: a step that tunes a number costs {self.price(1):.2g} plain steps more, and "
            f"val_loss with its gradient {self.validation:.2g}; so a number is tuned in {of} steps, val_loss is read every "
            f"{self.every} steps there and every {self.resting} elsewhere."
        )

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)


def as_plan(x: Plan | Mapping[str, Any] | None) -> Plan | None:
    """A plan from what `Plan.state_dict` gave.

    Raises:
        TypeError, ValueError: where it is none.
    """
    if x is None or isinstance(x, Plan):
        return x
    names = {f.name for f in fields(Plan)}
    if not isinstance(x, Mapping) or set(x) != names:
        raise TypeError(
            f"plan must be a tuner's `plan`, or the dict of its state_dict(), with {', '.join(sorted(names))}; got {x!r}."
        )
    return Plan(float(x["cost"]), float(x["product"]), float(x["validation"]), int(x["every"]), int(x["resting"]))


def _rounded_up(x: float) -> float:
    return float(ROUND ** math.ceil(math.log(max(x, 1e-3), ROUND)))


@dataclass
class Spending:
    """What has been spent of a plan.

    Attributes:
        plan: None: no bound, or not known yet.
        spent: plain steps; without a known length, in the present thousand steps.
    """

    plan: Plan | None = None
    spent: float = 0.0

    def step(self, t: int, k: int, total: int | None) -> None:
        """Training step t, the first is 0, was taken with k numbers tuned."""
        if self.plan is not None and k:
            self.spent += self.plan.price(k)
        if total is None and (t + 1) % PERIOD == 0:
            self.spent = 0.0
