"""Is every number unchanged? The present code against a commit, step by step and bit for bit.

    python -m experiments.same_numbers [--base main] [--cases loops workloads/diabetes_*] [--quick] [--jobs 2]

The base is checked out beside the present code, which is taken as it lies there, uncommitted changes included. Each side runs
the same cases (those of the present code) with its own `hypergrad` and its own `experiments`, in a process of its own with one
thread. A case is a training run or a computation; what is compared are its weights (a digest of their bytes), tuned values,
hypergradients, losses and counts after every step. Nothing is kept: there are no expected numbers in the repository.

For every case it says "same", or the first step that differs and what differs in it, there (the base) and here (the present
code). Status 1 where anything differs, where a case raises, or was not run. Names that the base has otherwise: names.py.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from experiments.arguments import arg, parse
from experiments.same_numbers.cases import GROUPS, chosen
from experiments.same_numbers.compare import Outcome, Verdict, compare
from experiments.same_numbers.sides import ROOT, checkout, outcomes


@dataclass
class Args:
    """Compare all numbers of the present code with those of a commit, bit for bit."""

    base: str = arg("HEAD", "the commit to compare with")
    cases: tuple = arg((), "groups, cases or patterns: loops, workloads/diabetes_low, 'exact/*_adam' (default: all)")
    quick: bool = arg(False, "the same cases in short: 60 steps, nothing compiled")
    jobs: int = arg(1, "processes at a time, each with one thread")


def main(args: Args) -> dict[str, Verdict]:
    """The verdict on every case, printed. Raises SystemExit(1) where one is not fine."""
    if args.jobs < 1:
        raise SystemExit("--jobs is at least 1")
    names, began = chosen(args.cases, args.quick), time.perf_counter()
    with checkout(args.base) as base:
        there, here = outcomes([base, ROOT], names, args.quick, args.jobs)
    verdicts = {name: compare(there.get(name), here.get(name)) for name in names}
    for name, verdict in verdicts.items():
        print(f"{name:<46} {verdict.text}")
    summarise(verdicts, there, here)
    bad = sum(not verdict.fine for verdict in verdicts.values())
    said = f"{bad} are not the same" if bad else "all are the same"
    print(f"\n{len(names)} cases against {args.base}, {time.perf_counter() - began:.0f} s: {said}")
    if bad:
        raise SystemExit(1)
    return verdicts


def summarise(verdicts: Mapping[str, Verdict], there: Mapping[str, Outcome], here: Mapping[str, Outcome]) -> None:
    """A line a group: cases, how many are fine, seconds of either side."""
    print(f"\n{'group':<16}{'cases':>7}{'fine':>7}{'s, there':>10}{'s, here':>10}")
    for group in GROUPS:
        names = [name for name in verdicts if name.startswith(f"{group}/")]
        if names:
            seconds = [sum(side[name]["seconds"] for name in names if name in side) for side in (there, here)]
            fine = sum(verdicts[name].fine for name in names)
            print(f"{group:<16}{len(names):>7}{fine:>7}{seconds[0]:>10.1f}{seconds[1]:>10.1f}")


if __name__ == "__main__":
    main(parse(Args))
