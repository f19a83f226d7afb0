"""What arguments a user's function takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hypergrad.core.signatures import call_val_loss, positional, takes_hypers, takes_step


def with_default(x: int = 3) -> None:
    """An argument that is not the step."""


def with_step(t: int | None = None) -> None:
    """The step, by its name."""


def with_temperature(t: float = 2.0) -> None:
    """A number of the user's own, by the same name."""


class Callee:
    def __call__(self, t: int) -> None:
        """A method."""


TAKES: dict[str, tuple[Callable[..., Any], bool]] = {
    "nothing": (lambda: None, False),
    "one argument": (lambda step: None, True),
    "an argument with a default": (with_default, False),
    "t=None": (with_step, True),
    "t with another default": (with_temperature, False),
    "keywords": (lambda **kw: None, False),
    "any arguments": (lambda *args: None, False),
    "an object": (Callee(), True),
    "a builtin": (torch.ones, False),
}


@pytest.mark.parametrize("name", TAKES)
def test_takes_step(name: str) -> None:
    f, expected = TAKES[name]
    assert takes_step(f) == expected


def test_an_error_over_the_step_says_what_it_is() -> None:
    for wrong, own in (
        (lambda model: model(1.0), "not callable"),
        (lambda model: model.weight, "no attribute 'weight'"),
    ):
        with pytest.raises((TypeError, AttributeError), match=own) as caught:
            call_val_loss(wrong, 3)
        assert str(caught.value).endswith("write val_loss without an argument, and use the model by its name.")


LOSSES: dict[str, tuple[Callable[..., Any], bool]] = {
    "two arguments": (lambda model, batch: None, False),
    "three": (lambda model, batch, hypers: None, True),
    "hypers=None": (lambda model, batch, hypers=None: None, True),
    "hypers={}": (lambda model, batch, hypers={}: None, True),
    "a third with another default": (lambda model, batch, reduction="mean": None, False),
    "any arguments": (lambda *args: None, True),
    "keywords": (lambda model, batch, *, scale=1.0, **kw: None, False),
    "no signature": (type, True),
}


@pytest.mark.parametrize("name", LOSSES)
def test_takes_hypers(name: str) -> None:
    f, expected = LOSSES[name]
    assert takes_hypers(f) == expected


def test_positional() -> None:
    taken = positional(lambda a, b=1, *rest, c, **kw: None)
    assert taken is not None
    assert [p.name for p in taken.parameters] == ["a", "b"]
    assert [p.name for p in taken.required] == ["a"]
    assert taken.variadic
    assert positional(type) is None
