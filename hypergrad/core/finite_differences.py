"""Finite differences of second order and their extrapolation: what `hypergrad.check` and the check of traced steps compare with.

With f'(0) = D(h) + c h² + O(h³):        central D = (f(h) − f(−h))/2h        one-sided D = (−3 f(0) + 4 f(h/2) − f(h))/h
Richardson: (4 D(h/2) − D(h))/3 is without the term c h².
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

Value = TypeVar("Value", float, Tensor)


def central(f: Callable[[float], Value], h: float) -> Value:
    """f'(0) from f(h) and f(−h)."""
    return (f(h) - f(-h)) / (2 * h)


def one_sided(f: Callable[[float], Value], h: float) -> Value:
    """f'(0) from f(0), f(h/2) and f(h): from the right, or with h < 0 from the left."""
    return (-3 * f(0.0) + 4 * f(h / 2) - f(h)) / h


def extrapolated(coarse: Value, fine: Value) -> Value:
    """Richardson's extrapolation of D(h) and D(h/2)."""
    return (4 * fine - coarse) / 3
