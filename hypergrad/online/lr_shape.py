"""lr's shape when the number of training steps is known: a short warm-up, then linear decay to zero."""

from __future__ import annotations

WARMUP_SHARE = 0.01  # of the steps


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
