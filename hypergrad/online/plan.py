"""What tuning may cost, in seconds, and what follows from it: in which steps products are formed, how often val_loss is read.

The unit is the plain training step. With p the seconds that a Hessian product of one number adds to a step, v those of the
validation loss with its gradient (a forward pass alone is about v/3), k numbers that are tuned in the mean, τ what a number's
tangents add to a step, a product in one step of s and a reading every e steps while something is tuned, every r steps while
nothing is,

    a step adds       k p/s + v/e + k τ  while something is tuned       v/(3 r)  while nothing is

    e, r              readings take a quarter of cost − 1 at most, where they can be made rarer: 5 and 20 times as rare at most
    early             e in the first EARLY of a run of known length, where lr is tuned: so small that READINGS come from the plan
                      on, but LEAST_EARLY at least, so that lr has some steps in a short run too
    s                 the least odd number with which all phases of the run cost no more than cost − 1 a step; STRIDE at most, and
                      4 p/τ about, as rarer products are no help where tangents are the dearer part
    phases            are shorter where that is not enough (policies/phases.py), or where ALWAYS is not left over: what a tuner
                      adds to every step of a run, whatever is due

In steps without a product the tangent of the gradient, H z, is taken for 0, and tangents are taken through the step all the
same: lr and weight decay act in every step, and only what curvature does to their effect is left to the steps with products.
Where tangents were not updated in between instead, the noise that lr puts into the weights was missed, and lr went far too
high (experiments/results/online_tuning_log.md, tenth session; strides.json). s is odd: at the edge of stability weights move
to and fro from one step to the next, and every second step would see one side alone. Where momentum is above 0.9 products are
weighted (product_weight.py).

A product is two passes through the graph of a step: p is 2 to 3 where arithmetic rules, and taken to be LEAST_PRODUCT at least.
It is MOST_PRODUCT at most: at a stride that paid for more lr would be moved by tangents of a step in ten. τ is 0 to 0.3 in such
nets (price.json), and more than 1 where a step is little more than the optimizer's, as with large layers on small batches. In
nets whose plain step takes less than 2 ms (calibration.py) Python's own time rules: τ is not measured there but taken to be what
it is in larger nets (`tangents_price`), as else next to nothing would be tuned. There, and where p is larger than MOST_PRODUCT,
the bound is not kept, and a note in the log says so.

p, v and τ are measured once, in the first steps of a run, and rounded up to powers of 2^(1/4), so that most runs of one script
have one plan. From there on no clock is read: a run repeats bit for bit given its plan.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

PERIOD = 1000  # steps over which the cost is kept where the length of the run is not known
MOST_EVERY, MOST_RESTING = 5, 20  # at most so many times the steps between readings that were asked for
# a share of a run, the readings that come in it at least once there is a plan, and the least steps between them
EARLY, READINGS, LEAST_EARLY = 0.3, 9, 5
# in plain steps: 0.01 to 0.03 on a ResNet-18 of 5 M weights (price.json, kind "resting"), 0.036 on a GPT (exploratory: the log)
ALWAYS = 0.04
ON_READINGS = 0.25  # the share of what may be spent that goes to readings, where they can be made rarer
STRIDE = 21  # at most
DEARER = 4  # products are not made so rare that tangents cost more than so many times what they do
LEAST_PRODUCT, MOST_PRODUCT = 2.0, 4.0
ROUND = 2**0.25


@dataclass(frozen=True)
class Plan:
    """A bound on the seconds of a run. `Plan.made` makes one.

    Attributes:
        cost: a tuned run over a plain one, at most.
        product: what a product of one number adds to a step, in plain steps.
        validation: the validation loss and its gradient, in plain steps.
        every: steps between readings while something is tuned.
        resting: the same while nothing is.
        stride: products are formed in one step of so many, once lr's start is found.
        tangents: what those of one number add to a step without a product, in plain steps.
        early: steps between readings in the first EARLY of the run; 0: as `every`.
    """

    cost: float
    product: float
    validation: float
    every: int
    resting: int
    stride: int = 1
    tangents: float = 0.0
    early: int = 0

    @staticmethod
    def made(
        cost: float,
        product: float,
        validation: float,
        every: int,
        fixed: bool = False,
        k: float = 1.0,
        tuned: float = 0.9,
        tangents: float = 0.0,
        total: int | None = None,
        done: int = 0,
    ) -> Plan:
        """The plan for what was measured.

        Args:
            every: steps between readings that were asked for.
            fixed: they are not to be made rarer.
            k: numbers that are tuned at once, in the mean.
            tuned: the share of the run in which something is.
            total: its steps, if known.
            done: those that are done.

        Example:
            >>> plan = Plan.made(2.0, 2.7, 3.0, 10)
            >>> round(plan.product, 3), round(plan.validation, 3), plan.every, plan.stride
            (2.828, 3.364, 14, 5)
        """
        p, v, extra = min(max(rounded_up(product), LEAST_PRODUCT), MOST_PRODUCT), rounded_up(validation), cost - 1
        every, resting = (
            every if fixed else math.ceil(min(max(x / (ON_READINGS * extra), every), most * every))
            for x, most in ((v, MOST_EVERY), (v / 3, MOST_RESTING))
        )
        early, soon = early_every(every, fixed, total, done), min(EARLY, tuned)
        readings = v * (soon / early + (tuned - soon) / every)
        left = extra - readings - tuned * k * tangents - (1 - tuned) * v / 3 / resting
        most = STRIDE if tangents <= 0 else min(STRIDE, math.ceil(DEARER * p / tangents))
        stride = odd(min(max(math.ceil(k * p * tuned / left), 1), most) if left > 0 else most)
        return Plan(cost, p, v, every if fixed else max(every, stride), resting, stride, tangents, early)

    def every_at(self, t: int, total: int | None) -> int:
        """Steps between readings after t steps of a run, while something is tuned."""
        return self.early if self.early and total is not None and t < EARLY * total else self.every

    def price(self, k: float, formed: float | None = None, every: int = 0) -> float:
        """What a step in which k numbers are tuned adds, in plain steps.

        Args:
            formed: 1 where products are formed in it, 0 where not; None: in the mean.
            every: steps between readings; 0: the plan's.
        """
        products = self.product * (1 / self.stride if formed is None else formed)
        return k * (products + self.tangents) + self.validation / (every or self.every)

    def allowance(self, steps: int) -> float:
        """What may be spent on steps in which something is tuned in so many steps, in plain steps; 0: nothing."""
        return max((self.cost - 1 - ALWAYS - self.validation / 3 / self.resting) * steps, 0.0)

    def sentence(self) -> str:
        """What follows from it."""
        where = "every step" if self.stride == 1 else f"one step of {self.stride}"
        return (
            f"plan for cost={self.cost:g}: a product of one number costs {self.product:.2g} plain steps, its tangents "
            f"{self.tangents:.2g} in every step, val_loss with its gradient {self.validation:.2g}: products are formed in "
            f"{where}, val_loss is read every {self.every} steps"
            f"{f', at first every {self.early}' if 0 < self.early < self.every else ''}."
        )

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)


def as_plan(x: Plan | Mapping[str, Any] | None) -> Plan | None:
    """A plan from what `Plan.state_dict` gave.

    Raises:
        TypeError: where it is none.
    """
    if x is None or isinstance(x, Plan):
        return x
    names, newer = {f.name for f in fields(Plan)}, {"tangents", "early"}  # which older ones have not
    if not isinstance(x, Mapping) or not names - newer <= set(x) <= names:
        raise TypeError(
            f"plan must be a tuner's `plan`, or the dict of its state_dict(), with {', '.join(sorted(names))}; got {x!r}."
        )
    whole = {name: int(x.get(name, 0)) for name in ("every", "resting", "stride", "early")}
    return Plan(
        float(x["cost"]), float(x["product"]), float(x["validation"]), **whole, tangents=float(x.get("tangents", 0))
    )


def tangents_price(slots: int) -> float:
    """What a number's tangents add to a step without a product, in plain steps.

    On a ResNet-18 of 5 M weights 0.14 with SGD and momentum, 0.20 with AdamW (price.json, kind "tangents").

    Args:
        slots: tensors that the optimizer keeps beside the weights.

    Example:
        >>> tangents_price(1), tangents_price(2)
        (0.15, 0.2)
    """
    return (2 + max(slots, 1)) / 20


def early_every(every: int, fixed: bool, total: int | None, done: int) -> int:
    """Steps between readings in the first EARLY of a run.

    Args:
        every: in the rest of it; fixed: as the user wants it.
        total: steps of the run; None: not known. done: those that are done.
    """
    if fixed or total is None:
        return every
    return min(every, max(math.floor((EARLY * total - done) / READINGS), LEAST_EARLY))


def odd(n: int) -> int:
    """n, or one more: what is seen in one step of so many is not one side of what changes its sign at every step."""
    return n + 1 - n % 2


def rounded_up(x: float) -> float:
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

    def step(self, t: int, k: int, formed: bool, total: int | None) -> None:
        """Training step t, the first is 0, was taken with k numbers tuned; formed: with products."""
        if self.plan is not None and k:
            self.spent += self.plan.price(k, float(formed), self.plan.every_at(t, total))
        if total is None and (t + 1) % PERIOD == 0:
            self.spent = 0.0
