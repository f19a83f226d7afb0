"""Tables in Markdown, and where their numbers come from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ("---", *("---:" if _numeric(column) else "---" for column in list(zip(*body))[1:])), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _numeric(column: Sequence[str]) -> bool:
    return all(re.match(r"^[\d.,eE+–-]+[%×]?$", cell) for cell in column)


def source(result: dict[str, Any]) -> str:
    environment = result["environment"]
    return (
        f"<sub>`{result['command']}` · Python {environment['python']}, torch {environment['torch']}, "
        f"{environment['platform']}, {environment['cpus']} CPUs, {environment['device']}</sub>"
    )
