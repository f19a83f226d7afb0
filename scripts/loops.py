"""Make the tables of docs/loops.md from the rows that the tests hold (tests/online/loop_table.py).

python scripts/loops.py            write them
python scripts/loops.py --check    exit 1 if the page differs
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from experiments.markdown import table  # noqa: E402
from tests.online.loop_table import ELSEWHERE, SECTIONS  # noqa: E402
from tests.online.loops_fields import ctc  # noqa: E402

PAGE = ROOT / "docs/loops.md"


def tables() -> str:
    head = ("loop", "", "how", "test")
    parts = []
    for title, rows in SECTIONS.items():
        body = [(_cell(name), row.status, _cell(row.how), "`test_loop`") for name, row in rows.items()]
        parts.append(f"### {title}\n{table(head, body)}")
    body = [(_cell(row.loop), row.status, _cell(row.how), f"`{row.test}`") for row in ELSEWHERE]
    return "\n\n".join([*parts, f"### With tests of their own\n{table(head, body)}"])


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def filled(text: str) -> str:
    """The page with what stands between its marks made anew."""
    blocks = {"loops": tables(), "ctc": f"```python\n{inspect.getsource(ctc).rstrip()}\n```"}
    for name, content in blocks.items():
        marks = f"<!-- made:{name} -->", "<!-- /made -->"
        text = re.sub(f"{marks[0]}.*?{marks[1]}", lambda _: f"{marks[0]}\n{content}\n{marks[1]}", text, flags=re.DOTALL)  # noqa: B023
    return text


if __name__ == "__main__":
    if set(sys.argv[1:]) - {"--check"}:
        raise SystemExit(__doc__)
    old = PAGE.read_text(encoding="utf-8")
    new = filled(old)
    if new != old:
        if "--check" in sys.argv[1:]:
            raise SystemExit("docs/loops.md differs from the tests' rows: run python scripts/loops.py")
        PAGE.write_text(new, encoding="utf-8")
        print("written: docs/loops.md")
