"""First the numbers that make the step, then those that make the objective.

With T training steps known, lr, momentum, betas, … are tuned over the first `step_share` of them, weight decay and tensors in
the loss from there to `last_share`; after that nothing is: lr is small, and there is nothing left to win. Where a learning rate
is still on its way up (MeanTrustRegion.climbing) the first phase goes on, to `longest_share` at most: the run is too short for
lr to come to rest sooner. With T not known, or with numbers of one kind alone, all are tuned at once.

The worth of weight decay shows late, once lr decays and overfitting begins: tuned beside lr on the Fashion-MNIST protocol it is
driven to its lower bound, tuned after lr it rises again.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from hypergrad.online.policies.policy import Policy

_OF_THE_STEP = "lr momentum dampening betas alpha eps rho lr_decay momentum_decay beta2_decay d ns_coefficients"
STEP_NAMES = frozenset(_OF_THE_STEP.split(" "))


@dataclass(frozen=True)
class Phases(Policy):
    """What is tuned when; left out, everything is tuned to the end."""

    step_share: float = 0.3
    longest_share: float = 0.8
    last_share: float = 0.9

    def tuned_at(
        self, t: int, total: int | None, names: Collection[str], at_rest: bool = True, in_loss: Collection[str] = ()
    ) -> frozenset[str]:
        """The names that are tuned after t steps.

        Args:
            at_rest: no learning rate is climbing, or none is tuned any more.
            in_loss: those of `names` that are tensors in the loss, whatever they are called.

        Example:
            >>> tuned_at = Phases().tuned_at
            >>> sorted(tuned_at(0, 100, ("lr", "weight_decay"))), sorted(tuned_at(30, 100, ("lr", "weight_decay")))
            (['lr'], ['weight_decay'])
            >>> sorted(tuned_at(0, None, ("lr", "weight_decay"))), sorted(tuned_at(0, 100, ("weight_decay",)))
            (['lr', 'weight_decay'], ['weight_decay'])
            >>> tuned_at(90, 100, ("lr", "weight_decay"))
            frozenset()
        """
        if total is not None and t >= self.last_share * total:
            return frozenset()
        early = STEP_NAMES.intersection(names).difference(in_loss)
        late = frozenset(names) - early
        if total is None or not early or not late:
            return early | late
        return early if t < (self.step_share if at_rest else self.longest_share) * total else late
