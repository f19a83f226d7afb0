"""The rows of a study as a list that prints as a table, for where pandas is not installed."""

from __future__ import annotations

from typing import Any

WIDEST = 40  # characters of a cell that are printed


class Table(list[dict[str, Any]]):
    """A list of dicts, one a row; printed in columns. A column that is None or 0 in every row is not printed.

    Example:
        >>> rows = Table([{"trial": 0, "value": 0.25, "lr": 0.01, "error": None, "retries": 0}])
        >>> rows.append({"trial": 1, "value": None, "lr": 12.3456789, "error": "ValueError: no", "retries": 0})
        >>> print(rows)
        trial  value       lr  error
            0   0.25     0.01
            1         12.3457  ValueError: no
        >>> rows[0]["retries"]
        0
    """

    def to_string(self) -> str:
        """The print, by the name that it has of a pandas.DataFrame."""
        names = list(dict.fromkeys(name for row in self for name in row))
        names = [name for name in names if name == "trial" or any(row.get(name) not in (None, 0) for row in self)]
        columns = [[name, *(_cell(row.get(name)) for row in self)] for name in names]
        padded = []
        for name, cells in zip(names, columns, strict=True):
            width, text = max(map(len, cells)), any(isinstance(row.get(name), str) for row in self)
            padded.append([cell.ljust(width) if text else cell.rjust(width) for cell in cells])
        return "\n".join("  ".join(line).rstrip() for line in zip(*padded, strict=True))

    __repr__ = __str__ = to_string


def _cell(x: Any) -> str:
    """One line, cut off where it is long."""
    if x is None:
        return ""
    text = f"{x:.6g}" if isinstance(x, float) else str(x).partition("\n")[0]
    return text if len(text) <= WIDEST else text[: WIDEST - 1] + "…"
