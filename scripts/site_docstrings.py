"""An extension of griffe, which reads docstrings for the API reference: our style in that of Google, as griffe knows it."""

from __future__ import annotations

import re
from typing import Any

import griffe

ENTRY = re.compile(r"^(    )(\w+(?:, \w+)+)(:.*(?:\n(?:     .*| *)$)*)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrite docstrings before they are parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = rewritten(obj.docstring.value)


def rewritten(text: str) -> str:
    """`a, b: meaning` as one entry for a and one for b; an example as a section, whose `>>>` is code; names
    of pages as links, from docs/api."""
    text = re.sub(r"\bdocs/(\w+)\.md", r"[\1.md](../\1.md)", text)
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    return ENTRY.sub(lambda m: "\n".join(f"{m[1]}{name}{m[3]}" for name in m[2].split(", ")), text)
