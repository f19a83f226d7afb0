"""Examples in docstrings: one that needs a package which is not installed is skipped."""

from __future__ import annotations

import doctest
from collections.abc import Generator

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    try:
        return (yield)
    except doctest.UnexpectedException as raised:
        error = raised.exc_info[1]
        if isinstance(error, ImportError):
            pytest.skip(str(error))
        raise
