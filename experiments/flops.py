"""The cost of a tuned run: in floating-point operations, counted by torch, and in gradient evaluations."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch.utils.flop_counter import FlopCounterMode


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


def gradient_evaluations(stats: Mapping[str, int]) -> int:
    """What ``tuner.stats`` amounts to in gradients of a loss; a Hessian-vector product counts as two of them.

    A forward and a backward pass are 3 products with each weight matrix, a Hessian-vector product is 4 more.
    """
    return stats["gradients"] + 2 * stats["hessian_products"] + stats["val_evaluations"]
