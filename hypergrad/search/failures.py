"""What is kept of a trial that failed: message and line of the user's own first, the whole traceback below."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path

OURS = Path(__file__).parents[1]
STDLIB = Path(sysconfig.get_path("stdlib"))


def explained(error: BaseException) -> str:
    """The message of an error, the user's line that it comes from, and the traceback.

    The line is the innermost one in a file that belongs neither to this library, nor to Python, nor to an installed package;
    where there is none, that of the error's cause, or else the first outside this library.
    """
    frames: list[traceback.FrameSummary] = []
    at: BaseException | None = error
    while at is not None:
        frames += [x for x in traceback.extract_tb(at.__traceback__) if OURS not in Path(x.filename).parents]
        own = [x for x in frames if not _installed(x.filename)][-1:] or frames[:1]
        at = None if own and not _installed(own[0].filename) else at.__cause__
    message = "".join(traceback.format_exception_only(error))
    line = "".join(traceback.format_list(own))
    return f"{message}{line}\n{''.join(traceback.format_exception(error))}"


def _installed(filename: str) -> bool:
    path = Path(filename)
    return filename.startswith("<frozen") or STDLIB in path.parents or "site-packages" in path.parts
