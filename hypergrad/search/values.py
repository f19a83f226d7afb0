"""Values of any type: when two are equal, and by what name one is known where only plain values can be kept."""

from __future__ import annotations

from typing import Any


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal and of one type, as far as bool goes: True is not 1, also inside lists and dicts.

    Example:
        >>> same(1, 1.0), same(True, 1), same([64, True], [64, 1])
        (True, False, False)
    """
    if type(a) is type(b) and isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(x, b[key]) for key, x in a.items())
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
        >>> label_of("relu"), label_of(dict), label_of([64, dict])
        ("'relu'", 'dict', '[64, dict]')
    """
    if isinstance(choice, dict):
        return "{" + ", ".join(f"{label_of(key)}: {label_of(value)}" for key, value in choice.items()) + "}"
    if type(choice) is list:
        return "[" + ", ".join(map(label_of, choice)) + "]"
    if type(choice) is tuple:
        return "(" + ", ".join(map(label_of, choice)) + (",)" if len(choice) == 1 else ")")
    if isinstance(choice, (bool, int, float, str, tuple, list, type(None))):
        return repr(choice)
    return getattr(choice, "__qualname__", type(choice).__qualname__)
