"""The cost of a tuned run: in floating-point operations, counted by torch, and in gradient evaluations."""

from __future__ import annotations

from collections.abc import Callable

from torch.utils.flop_counter import FlopCounterMode

from hypergrad.online.progress import gradient_evaluations

__all__ = ["count", "gradient_evaluations", "whole_run"]


def count(run: Callable[[], object]) -> int:
    """FLOPs of the matrix products, convolutions and attention in ``run()``; elementwise algebra is not counted."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def whole_run(run: Callable[[int], object], steps: int, short: int = 300) -> float:
    """FLOPs of a complete run ``run(steps)``, from complete runs of ``short`` and ``2·short`` steps.

    Every phase of a tuned run is a fraction of its length or of fixed size, so its cost is a + b·steps: two short
    runs, each with all its phases, give a and b, and counting (slow) a run of 10,000 steps is spared.
    """
    if steps <= 2 * short:
        return float(count(lambda: run(steps)))
    first, second = count(lambda: run(short)), count(lambda: run(2 * short))
    return first + (second - first) / short * (steps - short)
