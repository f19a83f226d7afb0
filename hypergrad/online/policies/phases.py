"""First the numbers that make the step, then those that make the objective.

With T training steps known, lr, momentum, betas, … are tuned over the first `step_share` of them, weight decay and tensors in
the loss from there to `last_share`; after that nothing is: lr is small, and there is nothing left to win. Where a learning rate
is still on its way up (MeanTrustRegion.climbing) the first phase goes on, to `longest_share` at most: the run is too short for
lr to come to rest sooner. With T not known, or with numbers of one kind alone, all are tuned at once.

With a bound on the seconds (plan.py), A what may be spent in the run and c what a step of the second phase costs:

    first phase     as above, while less than early_spending · A is spent (climbing_spending · A while lr climbs), or more where
                    the second phase does not need the rest
    second phase    its last (A − spent)/c steps; nothing is tuned before them

The worth of weight decay shows late, once lr decays and overfitting begins: tuned beside lr on the Fashion-MNIST protocol it is
driven to its lower bound, tuned after lr it rises again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from hypergrad.online.plan import PERIOD, Spending
from hypergrad.online.policies.policy import Policy

_OF_THE_STEP = "lr momentum dampening betas alpha eps rho lr_decay momentum_decay beta2_decay d ns_coefficients"
NO_BOUND = Spending()
STEP_NAMES = frozenset(_OF_THE_STEP.split(" "))


@dataclass(frozen=True)
class Phases(Policy):
    """What is tuned when; left out, everything is tuned to the end."""

    step_share: float = 0.3
    longest_share: float = 0.8
    last_share: float = 0.9
    early_spending: float = 0.5
    climbing_spending: float = 0.8

    def tuned_at(
        self,
        t: int,
        total: int | None,
        numbers: Mapping[str, int],
        at_rest: bool = True,
        in_loss: Collection[str] = (),
        spending: Spending = NO_BOUND,
    ) -> frozenset[str]:
        """The names that are tuned after t steps.

        Args:
            numbers: how many numbers there are of each name.
            at_rest: no learning rate is climbing, or none is tuned any more.
            in_loss: those of the names that are tensors in the loss, whatever they are called.
            spending: the bound on the price, and what has been spent.

        Example:
            >>> tuned_at, both = Phases().tuned_at, {"lr": 1, "weight_decay": 1}
            >>> sorted(tuned_at(0, 100, both)), sorted(tuned_at(30, 100, both)), sorted(tuned_at(90, 100, both))
            (['lr'], ['weight_decay'], [])
            >>> sorted(tuned_at(0, None, both)), sorted(tuned_at(0, 100, {"weight_decay": 1}))
            (['lr', 'weight_decay'], ['weight_decay'])
        """
        plan, spent = spending.plan, spending.spent
        if total is not None and t >= self.last_share * total:
            return frozenset()
        early, late = _kinds(numbers, in_loss)
        if total is None or not early or not late:
            return self._of_one_kind(t, total, early | late, bool(early), numbers, spending)
        first = t < (self.step_share if at_rest else self.longest_share) * total
        if plan is None:
            return early if first else late
        allowed, price = plan.allowance(total), plan.price(_count(late, numbers))
        longest = price * (self.last_share - self.step_share) * total
        if first and spent < max(
            allowed * (self.early_spending if at_rest else self.climbing_spending), allowed - longest
        ):
            return early
        begins = max(self.last_share * total - (allowed - spent) / price, self.step_share * total)
        return late if t >= begins and spent < allowed else frozenset()

    def in_the_mean(
        self, total: int | None, numbers: Mapping[str, int], in_loss: Collection[str] = ()
    ) -> tuple[float, float]:
        """How many numbers are tuned at once, in the mean, and in which share of a run, where there is no bound.

        Example:
            >>> Phases().in_the_mean(100, {"lr": 1, "momentum": 1, "weight_decay": 2})
            (2.0, 0.9)
        """
        early, late = (_count(names, numbers) for names in _kinds(numbers, in_loss))
        if total is None or not early or not late:
            return float(early + late), 1.0 if total is None else self.last_share
        first = self.step_share / self.last_share if self.last_share else 0.0
        return first * early + (1 - first) * late, self.last_share

    def _of_one_kind(
        self,
        t: int,
        total: int | None,
        names: frozenset[str],
        early: bool,
        numbers: Mapping[str, int],
        spending: Spending,
    ) -> frozenset[str]:
        """All at once: from the beginning, or, where none of them is of the step, as late as can be paid for."""
        plan, spent = spending.plan, spending.spent
        if plan is None:
            return names
        allowed = plan.allowance(PERIOD if total is None else total)
        left = (allowed - spent) / plan.price(_count(names, numbers))
        waits = total is not None and not early and t < self.last_share * total - left
        return names if left > 0 and not waits else frozenset()


def _kinds(numbers: Mapping[str, int], in_loss: Collection[str]) -> tuple[frozenset[str], frozenset[str]]:
    """The names of the step, and those of the objective."""
    early = STEP_NAMES.intersection(numbers).difference(in_loss)
    return early, frozenset(numbers) - early


def _count(names: Collection[str], numbers: Mapping[str, int]) -> int:
    return sum(numbers[name] for name in names)
