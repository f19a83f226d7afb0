"""Descent in the unit cube: a few points spread over it, then L-BFGS-B of scipy from the best of them.

The spread points give a start near a minimum, and not where the gradient is 0 (a lasso without a coefficient). L-BFGS-B's first
step is −∇f itself, so f is multiplied by FIRST/‖∇f‖ of the start: the first step is a tenth of the range.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.stats import qmc

FIRST = 0.1
LINE = 8  # evaluations of one line search at most: at a kink (a coefficient that becomes 0) there is no end to it
Point = NDArray[np.float64]


class _Spent(Exception):
    """All evaluations that the caller allowed are used."""


def starts(dim: int, count: int, seed: int) -> list[Point]:
    """The middle of each of `count` equal parts of a line; in more dimensions Halton's points, the first one the middle."""
    if dim == 1 or count == 0:
        return [np.array([(i + 0.5) / count]) for i in range(count)]
    rest = qmc.Halton(dim, rng=np.random.default_rng(seed)).random(count - 1)
    return [np.full(dim, 0.5), *rest]


def descend(
    value_and_gradient: Callable[[Point], tuple[float, Point]], start: Point, evaluations: int, tol: float
) -> str:
    """Minimise f over the unit cube.

    Args:
        value_and_gradient: u ↦ f(u), ∇f(u); the first call is at the start.
        start: u₀.
        evaluations: at most so many calls.
        tol: end where an iteration makes f less by no more than this share of |f|.

    Returns:
        Why it ended.
    """
    value, gradient = value_and_gradient(start)
    if not gradient.any():
        return "the gradient is 0 at the start"
    scale, left = FIRST / float(np.linalg.norm(gradient)), evaluations - 1

    def scaled(u: Point) -> tuple[float, Point]:
        nonlocal left
        if np.array_equal(u, start):
            return scale * value, scale * gradient
        if left == 0:
            raise _Spent
        left -= 1
        f, df = value_and_gradient(u)
        return scale * f, scale * df

    # scipy divides by max(|f|, 1), f the scaled one
    options = {"ftol": tol * min(1.0, abs(scale * value)), "gtol": 0.0, "maxiter": evaluations, "maxls": LINE}
    try:
        found = minimize(scaled, start, jac=True, method="L-BFGS-B", bounds=[(0, 1)] * len(start), options=options)
    except _Spent:
        return "all evaluations are spent"
    return str(found.message)
