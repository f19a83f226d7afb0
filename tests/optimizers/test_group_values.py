"""Values of param groups as plain numbers, and with one number replaced."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hypergrad.optimizers.group_values import floats, part_of, plain, replaced


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1, 1.0), (torch.tensor(0.5), 0.5), ([0.9, torch.tensor(0.5)], (0.9, 0.5)), ((1, 2), (1.0, 2.0)), (None, None)],
)
def test_floats(value: Any, expected: Any) -> None:
    found = floats(value)
    assert found == expected and type(found) is type(expected)


def test_plain_leaves_numbers_as_they_are() -> None:
    assert plain(torch.tensor(0.5)) == 0.5
    assert type(plain(3)) is int and plain((0.9, 0.99)) == (0.9, 0.99)


def test_one_number_of_a_value() -> None:
    assert part_of((0.9, 0.99), "betas", "beta2") == 0.99
    assert part_of(0.1, "lr", "lr") == 0.1 and part_of(None, "lr", "lr") is None
    assert replaced((0.9, 0.99), "betas", "beta2", 0.5) == (0.9, 0.5)
    assert replaced([0.9, 0.99], "betas", "beta1", 0.5) == (0.5, 0.99)
    assert replaced(0.1, "lr", "lr", 0.5) == 0.5
