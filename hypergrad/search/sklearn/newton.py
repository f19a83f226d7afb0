"""A minimum as exact as float64 has it: scipy's L-BFGS, and Newton's steps in a trust region at the end.

L-BFGS alone is slow near a minimum whose curvatures differ by orders of magnitude, as an MLP's do; Newton's steps converge
quadratically there, and leave saddle points, where a derivative of "the minimum" would be none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.optimize import minimize

ROUGH = 1e-4  # gradient at which Newton's steps take over; more of it is no minimum
REFUSED = 10  # Newton's steps in a row that were not taken: the value is as low as float64 can tell


def to_minimum(
    value_and_gradient: Callable[[np.ndarray], tuple[float, np.ndarray]],
    hessian: Callable[[np.ndarray], np.ndarray] | None,
    start: np.ndarray,
    max_iter: int,
    tol: float,
) -> tuple[np.ndarray, int, bool]:
    """Minimise from a start until the gradient is at most tol.

    Args:
        value_and_gradient: x ↦ F(x), ∇F(x).
        hessian: x ↦ ∂²F/∂x²; None where it is too large: L-BFGS goes all the way.
        start: x₀.
        max_iter: steps of both kinds together.
        tol: of the gradient.

    Returns:
        The point, the number of steps (1 at least), and whether its gradient is below max(tol, ROUGH).
    """
    gtol = tol if hessian is None else max(tol, ROUGH)
    options = {"maxiter": max_iter, "maxfun": 2 * max_iter, "maxcor": 20, "ftol": 0.0, "gtol": gtol}
    found: Any = minimize(value_and_gradient, start, jac=True, method="L-BFGS-B", options=options)
    steps = int(found.nit)
    if hessian is not None and steps < max_iter:
        found = minimize(
            value_and_gradient,
            found.x,
            jac=True,
            hess=hessian,
            method="trust-exact",
            callback=_until_refused(found.x),
            options={"maxiter": max_iter - steps, "gtol": tol},
        )
        steps += int(found.nit)
    return found.x, max(steps, 1), bool(np.linalg.norm(found.jac) <= max(tol, ROUGH))


def _until_refused(last: np.ndarray) -> Callable[[np.ndarray], None]:
    """A callback of `minimize` that ends it where x has stayed for REFUSED steps."""
    refused = 0

    def callback(x: np.ndarray) -> None:
        nonlocal last, refused
        last, refused = x.copy(), refused + 1 if np.array_equal(x, last) else 0
        if refused == REFUSED:
            raise StopIteration

    return callback
