"""Tables of docs/gpu.md: the real trainings, and what tuning adds to DistributedDataParallel's bytes."""

from __future__ import annotations

from typing import Any

from experiments.markdown import source, table

Result = dict[str, Any]


def real_runs(result: Result) -> str:
    """A row a run, the best of the grid in the place of its points."""
    head = ("run", "validation loss", "test loss", "accuracy", "seconds", "over plain", "lr at the end")
    runs = [row for row in result["rows"] if row["kind"] == "run" and row["run"] != "grid"]
    best = [row for row in result["rows"] if row["kind"] == "best of grid"]
    names = [row["name"] for row in runs] + [f"best of the grid of {row['points']}: {row['name']}" for row in best]
    body = []
    for name, row in zip(names, [*runs, *best], strict=True):
        accuracy = "–" if row["accuracy"] is None else f"{row['accuracy']:.1%}"
        losses = (_shown(row[field], ".3f") for field in ("val", "test"))
        times = _shown(row["seconds"], ".1f"), _shown(row["seconds_over_plain"], ".2f")
        body.append((name, *losses, accuracy, *times, _shown(row["end_lr"], ".2g")))
    return table(head, body) + "\n\n" + source(result)


def ddp_bytes(result: Result) -> str:
    head = (
        "step",
        "DDP's gradients",
        "DDP's buffers",
        "vectors",
        "their bytes",
        "collectives of numbers",
        "their bytes",
    )
    body = []
    for row in result["rows"]:
        if row["rows"] != "counted":
            continue
        kind = f"{row['kind']}, {row['numbers']} tuned" if row["vectors"] else row["kind"]
        name = f"{row['weights']:,} weights{', BatchNorm' if row['norm'] else ''}: {kind}"
        fields = ("gradient_bytes", "buffer_bytes", "vectors", "vector_bytes", "scalar_calls", "scalar_bytes")
        body.append((name, *(f"{row[field]:,}" for field in fields)))
    return table(head, list(dict.fromkeys(body))) + "\n\n" + source(result)


def ddp_bytes_written_out(result: Result) -> str:
    head = ("net", "GPUs", "a plain step", "a product adds", "in the mean, one step of 5")
    body = [
        (f"{row['net']}, {row['weights']:,} weights", str(row["processes"]), *(_mb(row[field]) for field in FIELDS))
        for row in result["rows"]
        if row["rows"] == "written out"
    ]
    return table(head, body)


FIELDS = ("gradient_bytes", "vector_bytes", "mean_vector_bytes")


def _mb(x: float) -> str:
    return f"{x / 1e6:.0f} MB"


def _shown(x: float | None, form: str) -> str:
    return "–" if x is None else format(x, form)


TABLES = {
    "resnet": real_runs,
    "gpt": real_runs,
    "ddp_bytes": ddp_bytes,
    "ddp_bytes_written_out": ddp_bytes_written_out,
}
