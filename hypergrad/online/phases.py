"""What is done when the length of training is known: lr's shape, and what is tuned when.

The worth of weight decay shows late, once lr decays and overfitting begins: tuned beside lr on the Fashion-MNIST protocol it
is step_jvp to its floor, tuned after lr it rises again. So the numbers that make the step are tuned over the first share of
the run and then left, and those that make the objective from there on. A run too short for lr to come to rest goes on tuning it.
"""

from __future__ import annotations

from collections.abc import Collection

WARMUP_SHARE = 0.01  # of the steps
STEP_SHARE = 0.3  # of the steps, in which lr, momentum, betas, … are tuned,
LONGEST_SHARE = 0.8  # or so much where lr is still on the move
SETTLED_SHARE = 0.9  # of the steps, after which nothing is tuned: lr is small, and there is nothing left to win
_OF_THE_STEP = "lr momentum dampening betas alpha eps rho lr_decay momentum_decay beta2_decay d ns_coefficients"
STEP_NAMES = frozenset(_OF_THE_STEP.split(" "))


def decay_to_zero(t: int, total: int) -> float:
    """Linear warm-up over the first hundredth of the steps, then linear decay that would reach 0 after the last.

    Args:
        t: steps done, 0 … total − 1; from `total` on the last value is kept.
        total: number of steps.

    Example:
        >>> [decay_to_zero(t, 4) for t in range(5)]
        [1.0, 0.75, 0.5, 0.25, 0.25]
    """
    warmup = int(WARMUP_SHARE * total)
    if t < warmup:
        return (t + 1) / (warmup + 1)
    return max(total - t, 1) / (total - warmup)


def tuned_at(t: int, total: int | None, names: Collection[str], settled: bool = True) -> frozenset[str]:
    """The names that are tuned after t steps; `settled`: lr, momentum, … are at rest, or not tuned any more.

    Example:
        >>> sorted(tuned_at(0, 100, ("lr", "weight_decay"))), sorted(tuned_at(30, 100, ("lr", "weight_decay")))
        (['lr'], ['weight_decay'])
        >>> sorted(tuned_at(0, None, ("lr", "weight_decay"))), sorted(tuned_at(0, 100, ("weight_decay",)))
        (['lr', 'weight_decay'], ['weight_decay'])
        >>> tuned_at(90, 100, ("lr", "weight_decay"))
        frozenset()
    """
    if total is not None and t >= SETTLED_SHARE * total:
        return frozenset()
    early = STEP_NAMES.intersection(names)
    late = frozenset(names) - early
    if total is None or not early or not late:
        return early | late
    return early if t < (STEP_SHARE if settled else LONGEST_SHARE) * total else late
