"""Values of any type: when two are equal, and by what name one is known where only plain values can be kept."""

from __future__ import annotations

from typing import Any


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal and of one type, as far as bool goes: True is not 1.

    Example:
        >>> same(1, 1.0), same(True, 1)
        (True, False)
    """
    if isinstance(a, bool) != isinstance(b, bool):
        return False
    equal = a is b or a == b
    return bool(equal) if isinstance(equal, (bool, int)) else bool(getattr(equal, "all", lambda: False)())


def plain(x: Any) -> Any:
    """A scalar of numpy as Python's own number; any other value as it is."""
    return x.item() if type(x).__module__ == "numpy" and getattr(x, "ndim", 1) == 0 else x


def label_of(choice: Any) -> str:
    """A name of a choice that is the same in every process.

    Example:
        >>> label_of("relu"), label_of(dict)
        ("'relu'", 'dict')
    """
    if isinstance(choice, (bool, int, float, str, tuple, list, dict, type(None))):
        return repr(choice)
    return getattr(choice, "__qualname__", type(choice).__qualname__)
