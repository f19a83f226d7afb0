"""The table of all cases: group/name → what is run and recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

from experiments.same_numbers import exact, loops, searches, whole_runs, workload_runs
from experiments.same_numbers.record import Recorder

Case = Callable[[Recorder, bool], None]  # (where to write, whether in short)

GROUPS: dict[str, Mapping[str, Case]] = {
    "loops": loops.CASES,
    "exact": exact.CASES,
    "whole_runs": whole_runs.CASES,
    "check": searches.CHECKS,
    "search": searches.SEARCHES,
    "workloads": workload_runs.WORKLOAD_CASES,
    "fashion_mnist": workload_runs.FASHION_CASES,
}
CASES: dict[str, Case] = {f"{group}/{name}": case for group, cases in GROUPS.items() for name, case in cases.items()}
SLOW = {f"exact/{name}" for name in exact.SLOW}  # left out of a quick call that does not name them


def chosen(words: Sequence[str], quick: bool) -> list[str]:
    """The cases that `--cases` asks for: names of groups, of cases, or patterns such as `loops/sgd_*`; all without it.

    Raises:
        SystemExit: a word that no case answers to.
    """
    if not words:
        return [name for name in CASES if not (quick and name in SLOW)]
    found: dict[str, None] = {}
    for word in words:
        names = [name for name in CASES if fnmatchcase(name, word) or name.startswith(f"{word}/")]
        if not names:
            raise SystemExit(f"--cases: no case is called {word}; groups are {', '.join(GROUPS)}")
        found |= dict.fromkeys(names)
    return [name for name in CASES if name in found]
