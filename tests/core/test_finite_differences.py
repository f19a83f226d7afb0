"""Differences of polynomials whose derivative at 0 they have exactly, and the order of their error."""

from __future__ import annotations

import pytest

from hypergrad.core.finite_differences import central, extrapolated, one_sided


def f(x: float) -> float:
    return 3 + 2 * x - 5 * x**2 + x**3


@pytest.mark.parametrize("h", [0.5, -0.5])
def test_exact_for_a_quadratic(h: float) -> None:
    assert one_sided(lambda x: f(x) - x**3, h) == pytest.approx(2, rel=1e-14)
    assert central(lambda x: f(x) - x**3, h) == pytest.approx(2, rel=1e-14)


@pytest.mark.parametrize("difference", [central, one_sided])
def test_extrapolation_is_exact_for_a_cubic(difference: object) -> None:
    coarse, fine = (difference(f, h) for h in (0.5, 0.25))  # type: ignore[operator]
    assert abs(coarse - 2) > 1e-2
    assert extrapolated(coarse, fine) == pytest.approx(2, rel=1e-13)
