"""One hyperparameter: coordinates, slopes, bounds, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hypergrad.core.hyperparameters import KIND_OF, KINDS, Hyperparameter, as_hyperparameter

ROUND_TRIP = 1e-12  # relative, in x and in the distance from 1
VALUES = {
    "positive": st.floats(1e-12, 1e6),
    "unit": st.floats(1e-6, 1 - 1e-6),
    "unit_high": st.floats(1e-3, 1 - 1e-6),
    "free": st.floats(-1e6, 1e6),
}


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind: str) -> None:
    @given(VALUES[kind])
    def check(value: float) -> None:
        h, x = Hyperparameter(kind=kind), torch.tensor(value, dtype=torch.float64)
        back = h.from_free(h.to_free(x))
        assert abs(back - x) <= 1e-9 * (1 if kind == "unit_high" else abs(x)) + ROUND_TRIP

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_slope_is_the_derivative(kind: str) -> None:
    @given(VALUES[kind])
    def check(value: float) -> None:
        h = Hyperparameter(kind=kind)
        phi = h.to_free(torch.tensor(value)).requires_grad_()
        x = h.from_free(phi)
        (want,) = torch.autograd.grad(x, phi)
        torch.testing.assert_close(h.slope(x.detach()), want, rtol=1e-6, atol=0)

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_limits_are_within_the_kind(kind: str) -> None:
    low, high = Hyperparameter(kind=kind).limits
    ends = Hyperparameter(kind=kind).from_free(torch.tensor([low, high], dtype=torch.float64))
    assert low < high
    if kind != "free":
        assert ends[0] > 0
    if kind.startswith("unit"):
        assert ends[1] < 1


def test_bounds_are_the_limits() -> None:
    h = Hyperparameter(0.1, bounds=(1e-4, 1.0), kind="positive")
    assert h.limits == pytest.approx((math.log(1e-4), 0.0))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "negative": ({"start": -0.1, "kind": "positive"}, "outside"),
    "zero": ({"start": 0.0, "kind": "positive"}, "outside"),
    "NaN": ({"start": math.nan}, "finite"),
    "infinite": ({"start": math.inf}, "finite"),
    "NaN in a tensor": ({"start": torch.tensor([0.1, math.nan])}, "finite"),
    "above 1": ({"start": 1.5, "kind": "unit"}, "outside"),
    "1": ({"start": 1.0, "kind": "unit_high"}, "outside"),
    "bounds reversed": ({"bounds": (1.0, 0.1)}, "low < high"),
    "bounds equal": ({"bounds": (1.0, 1.0)}, "low < high"),
    "bounds NaN": ({"bounds": (math.nan, 1.0)}, "low < high"),
    "outside bounds": ({"start": 2.0, "bounds": (0.1, 1.0)}, "bounds"),
    "kind": ({"kind": "log"}, "positive, unit, unit_high, free"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    options, match = BAD[name]
    with pytest.raises(ValueError, match=match):
        Hyperparameter(**options)


@pytest.mark.parametrize(("name", "start"), [("lr", -1.0), ("weight_decay", -1e-4), ("momentum", 1.0), ("betas", 1.2)])
def test_a_name_brings_its_kind(name: str, start: float) -> None:
    with pytest.raises(ValueError, match="outside"):
        as_hyperparameter(name, start)
    assert as_hyperparameter(name, 0.5).kind == KIND_OF[name]
    assert as_hyperparameter(name, Hyperparameter(0.5, kind="free")).kind == "free"
    assert as_hyperparameter(name, None).start is None


def test_a_string_is_refused() -> None:
    with pytest.raises(TypeError, match="number or a tensor"):
        as_hyperparameter("lr", "0.1")
