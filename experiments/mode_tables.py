"""Tables of what exact hypergradients cost, and of what they are used for over whole runs."""

from __future__ import annotations

import statistics
from typing import Any

from experiments.markdown import source, table

Result = dict[str, Any]
CASES = {"mlp_sgd": "MLP, SGD-M", "mlp_adam": "MLP, Adam", "cnn_sgd": "CNN, SGD-M"}


def bench_modes(result: Result) -> str:
    """Time of every method as a multiple of a plain step, for every K; memory at the largest."""
    rows = [row for row in result["rows"] if " steps" not in row["method"] and row["method"] != "plain"]
    lengths = sorted({row["steps"] for row in rows})
    of = {(row["method"], row["case"], row["steps"]): row for row in rows}
    shown = " / ".join(map(str, lengths))
    head = ["method", *(f"{title}: K = {shown}" for title in CASES.values())]
    head += [f"MiB, K = {lengths[-1]}: {' / '.join(CASES.values())}", "error, float64"]
    body = []
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = [" / ".join(_number(of, method, case, k, "times_plain", ".1f") for k in lengths) for case in CASES]
        memory = " / ".join(_number(of, method, case, lengths[-1], "memory_mib", ".0f") for case in CASES)
        errors = [row["error"] for row in rows if row["method"] == method and row["error"] is not None]
        body.append((method, *cells, memory, f"{max(errors):.0e}"))
    return table(head, body) + "\n\n" + source(result)


def _number(of: dict[Any, Result], method: str, case: str, steps: int, field: str, form: str) -> str:
    value = of.get((method, case, steps), {}).get(field)
    return "–" if value is None else format(value, form)


def long_run(result: Result) -> str:
    head = ("run", "steps", "seconds of CPU", "peak memory, MiB", "growth rate per step", "validation loss")
    titles = {"plain": "plain training", "short": "hypergradient, a tenth", "whole": "hypergradient, whole run"}
    body = []
    for row in (row for row in result["rows"] if row["run"] in titles):
        growth = f"{row['growth_rate']:.2g}" if "growth_rate" in row else "–"
        loss = f"{row['val_loss']:.4f}"
        body.append(
            (titles[row["run"]], f"{row['steps']:,}", f"{row['seconds']:.0f}", f"{row['memory_mib']:.0f}", growth, loss)
        )
    return table(head, body) + "\n\n" + source(result)


def metalearn_lr(result: Result) -> str:
    head = ("outer rule", "from lr", "to lr", "mean loss", "final loss", "close from outer step", "cost, plain runs")
    body = [
        (
            row["outer"],
            f"{row['start']:g}",
            f"{row['lr']:.4f}",
            f"{row['mean_loss']:.4f}",
            f"{row['final_loss']:.4f}",
            str(row["close_from_step"]),
            f"{row['run_equivalents']:.0f}×",
        )
        for row in result["rows"]
        if row["kind"] == "end"
    ]
    return table(head, body) + "\n\n" + source(result)


def learned_schedule(result: Result) -> str:
    head = ("schedule", "validation loss", "cost, plain runs", "fresh seeds: validation", "fresh seeds: test")
    rows = result["rows"]
    grid = [row for row in rows if row["method"] == "grid"]
    best = min((row for row in grid if not row["diverged"]), key=lambda row: row["val_loss"])
    ends = [(f"best of {len(grid)} of a grid", "grid's winner", best["val_loss"], float(len(grid)))]
    ends += [
        (row["start"], row["start"], row["val_loss"], row["run_equivalents"])
        for row in rows
        if row["method"] == "learned"
    ]
    body = []
    for title, start, loss, cost in ends:
        fresh = [row for row in rows if row["method"] == "fresh" and row["start"] == start]
        means = [f"{statistics.fmean(row[name] for row in fresh):.4f}" for name in ("val_loss", "test_loss")]
        body.append((title, f"{loss:.4f}", f"{cost:.0f}×", *means))
    return table(head, body) + "\n\n" + source(result)


def data_cleaning(result: Result) -> str:
    rows = [row for row in result["rows"] if row["kind"] == "end"]
    head = ("seed", "AUROC of weight against corruption", "before", "after", "clean labels alone")
    fields = ("before", "after", "clean")
    body = [
        (str(row["seed"]), f"{row['auroc']:.3f}", *(f"{row[f'test_accuracy_{name}']:.1%}" for name in fields))
        for row in rows
    ]
    mean = [statistics.fmean(row[f"test_accuracy_{name}"] for row in rows) for name in fields]
    body.append(("mean", f"{statistics.fmean(row['auroc'] for row in rows):.3f}", *(f"{x:.1%}" for x in mean)))
    return table(head, body) + "\n\n" + source(result)


TABLES = {
    "bench_modes": bench_modes,
    "bench_compiled": bench_modes,
    "long_run": long_run,
    "metalearn_lr": metalearn_lr,
    "learned_schedule": learned_schedule,
    "data_cleaning": data_cleaning,
}
