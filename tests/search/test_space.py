"""Entries and spaces: coordinates, grids, conditions, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypergrad.search import Categorical, Float, Int, Space

ROUNDING = 1e-12  # of a coordinate: a value is kept to 15 figures
SCALED = {"linear": Float(-2.0, 6.0), "log": Float(1e-5, 10.0, "log"), "logit": Float(1e-3, 0.999, "logit")}


@pytest.mark.parametrize("scale", SCALED)
def test_a_value_has_a_coordinate_and_a_coordinate_a_value(scale: str) -> None:
    entry = SCALED[scale]

    @given(st.floats(0, 1))
    def check(u: float) -> None:
        x = entry.from_unit(u)
        assert x in entry
        assert entry.to_unit(x) == pytest.approx(u, abs=ROUNDING)

    check()
    assert [entry.from_unit(0.0), entry.from_unit(1.0)] == [entry.low, entry.high]


@pytest.mark.parametrize("scale", SCALED)
def test_the_slope_is_that_of_a_finite_difference(scale: str) -> None:
    entry, h = SCALED[scale], 1e-5
    for u in (0.2, 0.5, 0.9):
        difference = (entry.from_unit(u + h) - entry.from_unit(u - h)) / (2 * h)
        assert entry.slope(entry.from_unit(u)) == pytest.approx(difference, rel=1e-6)


GRIDS: dict[str, tuple[Any, list[Any]]] = {
    "linear": (Float(0.0, 1.0, points=3), [0.0, 0.5, 1.0]),
    "log": (Float(1e-3, 1.0, "log", points=4), [1e-3, 1e-2, 1e-1, 1.0]),
    "logit": (Float(0.1, 0.9, "logit", points=3), [0.1, 0.5, 0.9]),
    "step": (Float(0.1, 0.75, step=0.2), [0.1, 0.3, 0.5, 0.7]),
    "whole numbers": (Int(2, 5), [2, 3, 4, 5]),
    "whole numbers by 4": (Int(1, 10, step=4), [1, 5, 9]),
    "whole numbers, log": (Int(1, 100, "log", points=3), [1, 10, 100]),
    "points that coincide": (Int(1, 3, points=10), [1, 2, 3]),
    "choices": (Categorical(("x", None, 3)), ["x", None, 3]),
    "numpy's": (Categorical(np.array([1, 2])), [1, 2]),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", GRIDS)
def test_grids(name: str) -> None:
    entry, points = GRIDS[name]
    assert entry.grid() == points
    assert all(point in entry for point in points)


def test_entries_are_there_where_their_conditions_hold() -> None:
    space = Space(
        {
            "nesterov": Categorical([True, False], when={"momentum": (0.9,)}),
            "momentum": Categorical([0.0, 0.9], when={"optimizer": "SGD"}),
            "optimizer": ["SGD", "Adam"],
            "lr": Float(1e-4, 1.0, "log"),
        }
    )
    assert space.active({"optimizer": "Adam", "momentum": 0.9}) == ["optimizer", "lr"]
    assert set(space.active({"optimizer": "SGD", "momentum": 0.0})) == {"optimizer", "lr", "momentum"}
    assert set(space.active({"optimizer": "SGD", "momentum": 0.9})) == set(space)
    assert space.first() == {"optimizer": "SGD", "lr": 0.01, "momentum": 0.0}
    with pytest.raises(ValueError, match="not there"):
        space.check({"optimizer": "Adam", "lr": 0.1, "momentum": 0.9})
    with pytest.raises(ValueError, match="outside"):
        space.check({"optimizer": "Adam", "lr": 2.0})


def test_plain_values_are_choices_and_constants() -> None:
    space = Space({"c": ["x", "y"], "n": 3, "flag": True, "none": None})
    assert [space[name].grid() for name in space] == [["x", "y"], [3], [True], [None]]
    assert Space({"sizes": ((8,), (8, 8)), "flags": (True, False)})["sizes"].grid() == [(8,), (8, 8)]


@pytest.mark.parametrize("kind", [Float, Int])
def test_log_true_is_the_log_scale(kind: Any) -> None:
    entry = kind(1, 100, log=True)
    assert entry == kind(1, 100, "log") and entry.scale == "log" and entry.log and kind(1, 100, "log").log
    assert repr(entry) == repr(kind(1, 100, "log")) and not kind(1, 100).log
    assert kind(1, 100, log=True, points=3).grid() == [1, 10, 100]


# numbers in a tuple -> how the two readings of it are written
RANGE_OR_CHOICES: dict[tuple[Any, ...], tuple[Any, list[Any]]] = {
    (0, 1): (Int(0, 1), [0, 1]),
    (1e-4, 1.0): (Float(1e-4, 1.0), [1e-4, 1.0]),
    (16, 32, 64): (Int(16, 64), [16, 32, 64]),
    (1e-4, 1.0, "log-uniform"): (Float(1e-4, 1.0, log=True), [1e-4, 1.0, "log-uniform"]),
}


@pytest.mark.parametrize("numbers", RANGE_OR_CHOICES, ids=str)
def test_numbers_in_a_tuple_are_refused_with_the_two_ways_to_write_them(numbers: tuple[Any, ...]) -> None:
    """What the message says is Python, and is the entry that it says."""
    wanted, choices = RANGE_OR_CHOICES[numbers]
    with pytest.raises(ValueError, match="a range or choices: write") as raised:
        Space({"x": numbers})
    said = str(raised.value).split("write ")[1].split(" for the range, or the list ")
    written = [eval(each, {"Float": Float, "Int": Int}) for each in said[0].split(" or ")]
    assert wanted in written and all(each in (wanted, Float(*numbers[:1], numbers[-1])) for each in written[1:])
    assert Space({"x": eval(said[1].removesuffix(" for the choices."))})["x"].grid() == choices


BAD: dict[str, tuple[Any, str]] = {
    "empty space": (lambda: Space({}), "empty"),
    "a list for a space": (lambda: Space([1]), "dict"),  # type: ignore[arg-type]
    "a name that is none": (lambda: Space({"": 1}), "strings"),
    "bounds reversed": (lambda: Float(1.0, 0.1), "reversed"),
    "whole bounds reversed": (lambda: Int(5, 2), "reversed"),
    "bounds equal": (lambda: Float(1.0, 1.0), "below high"),
    "bounds NaN": (lambda: Float(math.nan, 1.0), "finite"),
    "bounds infinite": (lambda: Float(0.0, math.inf), "finite"),
    "a log range that touches 0": (lambda: Float(0.0, 1.0, "log"), "cannot touch 0"),
    "whole numbers, log, from 0": (lambda: Int(0, 10, "log"), "cannot touch 0"),
    "a logit range that touches 1": (lambda: Float(0.1, 1.0, "logit"), "inside"),
    "an unknown scale": (lambda: Float(0.0, 1.0, "sqrt"), "linear, log, logit"),
    "a whole bound that is not": (lambda: Int(0.5, 2), "whole"),  # type: ignore[arg-type]
    "a start outside": (lambda: Float(0.0, 1.0, start=2.0), "outside"),
    "a step of 0": (lambda: Float(0.0, 1.0, step=0.0), "positive"),
    "a step on a log scale": (lambda: Float(0.1, 1.0, "log", step=0.1), "linear"),
    "a grid of one": (lambda: Float(0.0, 1.0, points=1), "from 2"),
    "an infinite grid": (lambda: Float(0.0, 1.0).grid(), "infinite"),
    "a grid of billions": (lambda: Int(0, 10**10).grid(), "too large"),
    "differentiable on a grid": (lambda: Float(0.0, 1.0, step=0.1, differentiable=True), "differentiable"),
    "no choices": (lambda: Categorical([]), "empty"),
    "a string of choices": (lambda: Categorical("abc"), "list"),
    "a choice twice": (lambda: Categorical([1, 1.0]), "twice"),
    "a start that is no choice": (lambda: Categorical(["a"], start="b"), "none of"),
    "an unknown parent": (lambda: Space({"x": Float(0, 1, when={"y": 1})}), "does not have"),
    "a condition that never holds": (lambda: Space({"x": Float(0, 1, when={"y": 3}), "y": [1, 2]}), "never"),
    "conditions in a circle": (
        lambda: Space({"x": Categorical([1], when={"y": 1}), "y": Categorical([1], when={"x": 1})}),
        "circle",
    ),
    "a condition without values": (lambda: Float(0, 1, when={"y": []}), "no values"),
    "another library's entry": (lambda: Space({"x": object()}), "from_optuna"),
    "a dict of entries": (lambda: Space({"sgd": {"lr": Float(0, 1)}}), "names of their own and a condition"),
    "log=True on another scale": (lambda: Float(0.1, 0.9, "logit", log=True), "log=True is scale='log'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    make, match = BAD[name]
    with pytest.raises((ValueError, TypeError), match=match):
        make()
