"""Scales of a number: in which units a range is even.

A number x between low and high has a coordinate u between 0 and 1,

    u = (s(x) − s(low)) / (s(high) − s(low)),      s(x) = x (linear), log x (log), log(x/(1 − x)) (logit)

in which grids are even, random draws are uniform, and hypergradients step.
"""

from __future__ import annotations

import math

SCALES = ("linear", "log", "logit")


def to_scale(x: float, scale: str) -> float:
    """s(x).

    Example:
        >>> to_scale(0.5, "logit"), from_scale(to_scale(2.0, "linear"), "linear")
        (0.0, 2.0)
    """
    match scale:
        case "log":
            return math.log(x)
        case "logit":
            return math.log(x) - math.log1p(-x)
    return x


def from_scale(s: float, scale: str) -> float:
    """The x at which s(x) is s."""
    match scale:
        case "log":
            return math.exp(s)
        case "logit":
            return 1 / (1 + math.exp(-s)) if s > -700 else math.exp(s)
    return s
