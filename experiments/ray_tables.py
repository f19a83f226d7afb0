"""Tables of docs/ray.md: the study whose workers were killed, the rates of writing, and what they allow at 1,000 workers."""

from __future__ import annotations

from typing import Any

from experiments import results
from experiments.markdown import source, table

WORKERS = 1000
Row = dict[str, Any]


def ray_study(result: dict[str, Any]) -> str:
    rows = result["rows"]
    studies = results.select(rows, {"kind": "study"})
    head = (
        "run",
        "trials",
        "workers killed",
        "run again",
        "lost",
        "counted twice",
        "wall, s",
        "a trial, s",
        "overhead, s",
    )
    counts = ("trials", "killed", "retries", "lost", "duplicates")
    body = [
        (
            row["run"],
            *(str(row[name]) for name in counts),
            f"{row['wall_seconds']:.1f}",
            f"{row['trial_seconds']:.3f}",
            f"{row['overhead_seconds']:.3f}",
        )
        for row in studies
    ]
    rates = [
        (f"{what}, {row['run']}", f"{row['per_second']:,.0f}")
        for kind, what in (("journal", "entries into one journal file"), ("reports", "reports through the clerk"))
        for row in results.select(rows, {"kind": kind})
    ]
    return "\n\n".join([table(head, body), table(("writing", "a second"), rates), estimate(rows), source(result)])


def estimate(rows: list[Row]) -> str:
    """The shortest trial that keeps 1,000 workers busy, by what the loop, the clerk and the file can do in a second."""
    (alone,) = results.select(rows, {"kind": "study", "run": "one process"})
    (calm,) = results.select(rows, {"kind": "study", "run": "ray"})
    journal = min(row["per_second"] for row in results.select(rows, {"kind": "journal"}))
    clerk = min(row["per_second"] for row in results.select(rows, {"kind": "reports"}))
    loop, lines, reports = alone["overhead_seconds"], calm["journal_lines_per_trial"], calm["reports_per_trial"]
    limits = [
        ("the loop, one trial after the other", f"{WORKERS:,} × {loop:.4f} s", WORKERS * loop),
        ("the clerk, reports", f"{WORKERS:,} × {reports} reports / {clerk:,.0f} a second", WORKERS * reports / clerk),
        (
            "the journal file, lines",
            f"{WORKERS:,} × {lines:.1f} lines / {journal:,.0f} a second",
            WORKERS * lines / journal,
        ),
    ]
    body = [(name, arithmetic, f"{seconds:.0f}") for name, arithmetic, seconds in limits]
    return table((f"what is shared by {WORKERS:,} workers", "arithmetic", "shortest trial, s"), body)
