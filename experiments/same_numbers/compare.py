"""Two sides' outcomes of one case, compared bit for bit: same, or the first step that differs and what differs in it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

Outcome = dict[str, Any]  # a line of side.py
SHOWN, WIDTH = 4, 160  # differences of one step that are written out; characters of a value


class Verdict(NamedTuple):
    """`fine`: the two are the same, or the case was skipped on both sides."""

    fine: bool
    text: str


def compare(there: Outcome | None, here: Outcome | None) -> Verdict:
    """The verdict on a case. `there`: of the base; `here`: of the present code; None: not run, as its process ended before."""
    if there is None or here is None:
        sides = [name for name, side in (("there", there), ("here", here)) if side is None]
        return Verdict(False, f"not run {' and '.join(sides)}: the process ended before it")
    if there["skipped"] or here["skipped"]:
        if there["skipped"] == here["skipped"]:
            return Verdict(True, f"skipped: {here['skipped']}")
        return Verdict(False, f"skipped on one side: there {there['skipped']}, here {here['skipped']}")
    for number, (old, new) in enumerate(zip(there["steps"], here["steps"]), start=1):
        found = [*differences(old, new)]
        if found:
            return Verdict(False, f"differs, first at step {number}: {listed(found)}")
    return _ends(there, here)


def _ends(there: Outcome, here: Outcome) -> Verdict:
    """The verdict where all steps that both have are the same."""
    errors, n = (there["error"], here["error"]), len(here["steps"])
    if errors == (None, None):
        if len(there["steps"]) != n:
            return Verdict(False, f"differs: {len(there['steps'])} steps there, {n} here")
        if not n:
            return Verdict(False, "error of the case: it recorded nothing")
        return Verdict(True, f"same, {n} step{'s' * (n != 1)}")
    if errors[0] == errors[1]:
        return Verdict(False, f"error of the case: after step {n} it raises on both sides: {shown(errors[0])}")
    each = "; ".join(
        f"{name} after step {len(side['steps'])}: {shown(side['error'] or 'nothing raised')}"
        for name, side in (("there", there), ("here", here))
    )
    where = "on one side" if None in errors else "otherwise"
    return Verdict(False, f"raises {where}: {each}")


def differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(name, value there, value here) of every number that is not the same, or is there on one side only."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            label = f"{name}.{key}" if name else key
            yield from differences(old.get(key, "–"), new.get(key, "–"), label)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new)):
            yield from differences(a, b, f"{name}[{i}]")
    elif json.dumps(old) != json.dumps(new):  # as text, in which NaN is NaN and -0.0 is not 0.0
        yield name, old, new


def listed(found: list[tuple[str, Any, Any]]) -> str:
    """The first few differences in words."""
    parts = [f"{name}: {shown(old)} there, {shown(new)} here" for name, old, new in found[:SHOWN]]
    more = len(found) - len(parts)
    return "; ".join(parts) + (f"; and {more} more" if more else "")


def shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    text = " ".join(text.split())
    return text if len(text) <= WIDTH else f"{text[:WIDTH]}…"
