"""Which cases of a table are among the fast tests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(cases: Iterable[Any], *fast: Any) -> list[Any]:
    """`cases` for `pytest.mark.parametrize`, all but `fast` marked slow: what each of these shows, a fast one shows of its kind.

    Args:
        cases: values of one argument, or tuples of several.
    """
    cases = list(cases)
    if unknown := [case for case in fast if case not in cases]:
        raise ValueError(f"no such cases: {unknown}")
    values = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [
        pytest.param(*value, marks=() if case in fast else pytest.mark.slow)
        for case, value in zip(cases, values, strict=True)
    ]
