"""Tables of what exact hypergradients cost, and of what they are used for over whole runs."""

from __future__ import annotations

import statistics
from typing import Any

from experiments.markdown import source, table

Result = dict[str, Any]
CASES = {"mlp_sgd": "MLP, SGD-M", "mlp_adam": "MLP, Adam", "cnn_sgd": "CNN, SGD-M", "gpt_adam": "GPT, Adam"}


def bench_modes(result: Result) -> str:
    """Time of every method as a multiple of a plain step, for every K; memory at the largest."""
    rows = [row for row in result["rows"] if " steps" not in row["method"] and row["method"] != "plain"]
    lengths = sorted({row["steps"] for row in rows})
    cases = {name: title for name, title in CASES.items() if any(row["case"] == name for row in rows)}
    of = {(row["method"], row["case"], row["steps"]): row for row in rows}
    shown = " / ".join(map(str, lengths))
    head = ["method", *(f"{title}: K = {shown}" for title in cases.values())]
    head += [f"MiB, K = {lengths[-1]}: {' / '.join(cases.values())}", "error, float64"]
    body = []
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = [" / ".join(_number(of, method, case, k, "times_plain", ".1f") for k in lengths) for case in cases]
        memory = " / ".join(_number(of, method, case, lengths[-1], "memory_mib", ".0f") for case in cases)
        errors = [row["error"] for row in rows if row["method"] == method and row["error"] is not None]
        body.append((method, *cells, memory, f"{max(errors):.0e}"))
    return table(head, body) + "\n\n" + source(result)


def bench_implicit(result: Result) -> str:
    """Time of one linear solve as a multiple of a plain step."""
    of = {(row["method"], row["case"]): row for row in result["rows"]}
    cases = {name: title for name, title in CASES.items() if any(row["case"] == name for row in result["rows"])}
    body = []
    for method in dict.fromkeys(row["method"] for row in result["rows"]):
        rows = [of[method, case] for case in cases]
        body.append((method, *(f"{row['times_plain']:.1f}" for row in rows), f"{max(r['error'] for r in rows):.0e}"))
    return table(("ten iterations, once", *cases.values(), "error, float64"), body) + "\n\n" + source(result)


def bench_fallback(result: Result) -> str:
    """Time of a step through the fallback; what the check of the first call took."""
    rows = result["rows"]
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    body = []
    for name, tensors in dict.fromkeys((row["optimizer"], row["tensors"]) for row in rows):
        own = {row["mode"]: row for row in rows if (row["optimizer"], row["tensors"]) == (name, tensors)}
        errors = [row["error"] for row in own.values() if row["error"] is not None]
        cells = [f"{own[mode]['times_plain']:.1f}" for mode in modes]
        first = f"{max(row['first_call_s'] for row in own.values()):.1f}"
        body.append((name, str(tensors), *cells, first, f"{max(errors):.0e}" if errors else "–"))
    head = (f"optimizer, K = {rows[0]['steps']}", "tensors", *modes, "check, seconds, once", "error, float64")
    return table(head, body) + "\n\n" + source(result)


def muon(result: Result) -> str:
    """The workload of Muon and AdamW: from where tuned runs start, and where they end."""
    head = (
        "workload",
        "starts × seeds",
        "L*",
        "mean",
        "worst start",
        "over the floor's bound",
        "regret",
        "rolled back",
    )
    body = []
    for row in (row for row in result["rows"] if row["kind"] == "summary"):
        runs = f"{row['starts']} × {row['runs'] // row['starts']}"
        worst = f"{row['worst']:.3f} (lr {row['start_lr']:.2g}, weight decay {row['start_weight_decay']:.2g})"
        losses = (f"{row['l_star']:.3f}", f"{row['mean']:.3f}", worst)
        ratios = (f"{row['excess_over_floor']:.2f}", f"{row['regret']:.3f}", str(row["rollbacks"]))
        body.append((row["workload"], runs, *losses, *ratios))
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
    "bench_implicit": bench_implicit,
    "bench_fallback": bench_fallback,
    "muon": muon,
    "bench_compiled": bench_modes,
    "long_run": long_run,
    "metalearn_lr": metalearn_lr,
    "learned_schedule": learned_schedule,
    "data_cleaning": data_cleaning,
}
