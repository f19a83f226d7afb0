"""Tables and figure of the search: its benchmark, Ray, populations and worked examples, each from its result file."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from experiments.figures import OTHERS, TUNED, Rows, _tidy
from experiments.markdown import source, table

CHARGED = {
    "seconds": "measured CPU seconds",
    "evaluations": "counted gradient evaluations",
    "promised": "1.5 plain runs",
}
NAMES = {
    "hybrid-online": "hybrid-online",
    "hypergradient": "one hypergradient run",
    "hybrid": "hybrid: ASHA, and such runs from its best",
    "asha": "ASHA",
    "hyperband": "Hyperband",
    "tpe": "TPE (Optuna)",
    "hyperopt": "TPE (Hyperopt)",
    "gp": "Gaussian process",
    "grid": "grid",
    "random": "random",
    "one_epoch": "one epoch, then top k",
}
WORKERS = 1000
DRAWN = {
    "random": OTHERS[1],
    "one_epoch": "#b9bbbe",
    "tpe": OTHERS[2],
    "asha": OTHERS[0],
    "hybrid": TUNED,
}  # the rest lies between these


def _summaries(rows: Rows, strategy: str) -> dict[int, dict[str, Any]]:
    """Budget → row; budgets at which no run has ended left out."""
    own = [row for row in rows if row["kind"] == "summary" and row["strategy"] == strategy]
    return {row["budget"]: row for row in own if row["regret"] < 1}


def search_benchmark(result: dict[str, Any]) -> str:
    """Mean score 1 − regret of every strategy that was measured, at every budget."""
    rows = result["rows"]
    budgets = sorted({row["budget"] for row in rows if row["kind"] == "summary"})
    body = []
    for strategy, name in NAMES.items():
        at = _summaries(rows, strategy)
        if at:
            body.append((name, *(f"{at[b]['score']:.3f}" if b in at else "–" for b in budgets)))
    return table(("strategy", *map(str, budgets)), body) + "\n\n" + source(result)


def search_regret(rows: Rows) -> Figure:
    """Normalised regret over budget with 95 % bands; the hypergradient run is a point."""
    figure = Figure(figsize=(7.5, 4.4), layout="constrained")
    panel = figure.subplots()
    for strategy, colour in DRAWN.items():
        at = _summaries(rows, strategy)
        budgets = sorted(at)
        panel.plot(budgets, [at[b]["regret"] for b in budgets], color=colour, linewidth=1.5, label=NAMES[strategy])
        low, high = ([at[b][end] for b in budgets] for end in ("low", "high"))
        panel.fill_between(budgets, low, high, color=colour, alpha=0.15, linewidth=0)
    for b, row in _summaries(rows, "hypergradient").items():
        ends = [[row["regret"] - row["low"]], [row["high"] - row["regret"]]]
        panel.errorbar(
            [b], [row["regret"]], ends, color=TUNED, marker="o", capsize=3, label=NAMES["hypergradient"], zorder=5
        )
    panel.set_xscale("log", base=2)
    ticks = sorted({row["budget"] for row in rows if row["kind"] == "summary"})
    panel.set_xticks(ticks, [str(tick) for tick in ticks])
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.set_ylim(-0.03, 0.8)
    _tidy(panel, "normalised regret, mean of 20 problems; bands: 95 %", "budget, run-equivalents (five fold fits each)")
    panel.legend(frameon=False, fontsize=9)
    return figure


def search_seconds(result: dict[str, Any]) -> str:
    """Scores of hybrid-online by what a trial is charged, beside TPE and ASHA; what a trial costs; where it stands by problem."""
    rows = result["rows"]
    own = [row for row in rows if row["kind"] == "summary"]
    budgets = sorted({row["budget"] for row in own})
    body = []
    for charge, words in CHARGED.items():
        at = {row["budget"]: row for row in own if (row["strategy"], row["charge"]) == ("hybrid-online", charge)}
        cells = (
            f"{at[b]['score']:.3f} ({at[b]['low']:.3f} to {at[b]['high']:.3f})" if b in at else "–" for b in budgets
        )
        body.append((f"hybrid-online, charged by {words}", *cells))
    for name in ("tpe", "asha"):
        at = {row["budget"]: row for row in own if row["strategy"] == name}
        body.append(
            (NAMES[name], *(f"{at[b]['score']:.3f} ({at[b]['low']:.3f} to {at[b]['high']:.3f})" for b in budgets))
        )
    costs = [
        (
            f"{row['set']}, {row['space']}",
            f"{row['median_steps']:.0f}",
            f"{row['median_plain_seconds'] / row['median_steps'] * 1e3:.2f}",
            f"{row['median_evaluations']:.2f}",
            f"{row['median_seconds']:.1f}",
        )
        for row in rows
        if row["kind"] == "cost"
    ]
    heads = (
        "medians over trials",
        "steps",
        "a plain step, ms",
        "trial, evaluations",
        "trial, CPU seconds over a plain run's",
    )
    trials = [row for row in rows if row["kind"] == "trial"]
    ours, drawn = (sum(row[name] for row in trials) / len(trials) for name in ("score", "of_the_table"))
    words = f"One trial by itself scores {ours:.2f}, one configuration of the table {drawn:.2f}: means over trials and problems."
    return "\n\n".join([table(("score", *map(str, budgets)), body), words, table(heads, costs), source(result)])


def search_seconds_figure(rows: Rows) -> Figure:
    """Score over budget with 95 % bands: charged by the clock, and by what is promised."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, charge in zip(panels, ("seconds", "promised"), strict=True):
        for name, colour in {"asha": OTHERS[0], "tpe": OTHERS[2], "hybrid-online": TUNED}.items():
            own = [r for r in rows if r["kind"] == "summary" and (r["strategy"], r["charge"]) == (name, charge)]
            own.sort(key=lambda row: row["budget"])
            budgets = [row["budget"] for row in own]
            panel.plot(
                budgets, [row["score"] for row in own], color=colour, linewidth=1.5, marker=".", label=NAMES[name]
            )
            panel.fill_between(
                budgets, [r["low"] for r in own], [r["high"] for r in own], color=colour, alpha=0.15, linewidth=0
            )
        panel.set_xscale("log", base=2)
        ticks = sorted({row["budget"] for row in rows if row["kind"] == "summary" and row["charge"] == charge})
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.xaxis.set_minor_formatter(NullFormatter())
        _tidy(panel, f"score, a trial charged by {CHARGED[charge]}; bands: 95 %", "budget, plain runs")
    panels[0].legend(frameon=False, fontsize=9)
    return figure


def search_problems(result: dict[str, Any]) -> str:
    """Score of each problem: one hypergradient run beside what it is to reach."""
    rows = [row for row in result["rows"] if row["kind"] == "problem"]
    columns = {"one hypergradient run": ("hypergradient", 2), "TPE, 2": ("tpe", 2), "TPE, 32": ("tpe", 32)}
    columns |= {"ASHA, 2": ("asha", 2), "ASHA, 16": ("asha", 16), "hybrid, 32": ("hybrid", 32)}
    body = []
    for key in dict.fromkeys((row["set"], row["space"], row["metric"]) for row in rows):
        own = {
            (row["strategy"], row["budget"]): row["regret"]
            for row in rows
            if (row["set"], row["space"], row["metric"]) == key
        }
        body.append((", ".join(key), *(f"{1 - own[at]:.2f}" for at in columns.values())))
    return table(("problem", *columns), body) + "\n\n" + source(result)


def search_differences(result: dict[str, Any]) -> str:
    """Regret of the live strategies minus that of searches of the table, with 95 % intervals."""
    rows = [row for row in result["rows"] if row["kind"] == "difference"]
    budgets = sorted({row["budget"] for row in rows})
    body = []
    for name, rival in dict.fromkeys((row["strategy"], row["rival"]) for row in rows):
        at = {row["budget"]: row for row in rows if (row["strategy"], row["rival"]) == (name, rival)}
        cells = (
            f"{at[b]['regret']:+.3f} ({at[b]['regret_low']:+.3f} to {at[b]['regret_high']:+.3f})" if b in at else "–"
            for b in budgets
        )
        body.append((f"{NAMES[name].split(':')[0]} minus {NAMES[rival]}", *cells))
    return table(("regret", *map(str, budgets)), body) + "\n\n" + source(result)


def search_diagnosis(result: dict[str, Any]) -> str:
    """Mean score of the grids, by what was drawn and by what chose the point."""
    rows = [row for row in result["rows"] if row["kind"] == "grid"]
    body = []
    for draw in dict.fromkeys(row["draw"] for row in rows):
        own = [row for row in rows if row["draw"] == draw]
        ways = ("held", "five", "one")
        body.append((draw, *(f"{1 - sum(row[f'regret_{by}'] for row in own) / len(own):.3f}" for by in ways)))
    luck = [row["regret"] for row in result["rows"] if row["kind"] == "luck"]
    head = ("hidden, batch, momentum", "chosen by the held-out parts", "by five validations", "by one validation")
    again = f"The table's best configurations, trained again from two other seeds: {1 - sum(luck) / len(luck):.3f}."
    return table(head, body) + "\n\n" + again + "\n\n" + source(result)


def discrete(result: dict[str, Any]) -> str:
    """Validation and test loss of both strategies on each case."""
    rows, body = result["rows"], []
    for case, strategy in dict.fromkeys((row["case"], row["strategy"]) for row in rows):
        own = [row for row in rows if (row["case"], row["strategy"]) == (case, strategy)]
        cells = [f"{sum(row[part] for row in own) / len(own):.4f}" for part in ("val", "test")]
        trials = f"{sum(row['trials'] for row in own) / len(own):.1f}"
        body.append((case, strategy, str(len(own)), trials, *cells, f"{own[0]['gradient_evaluations']:,.0f}"))
    head = (
        "case",
        "strategy",
        "seeds",
        "trials",
        "validation loss",
        "test loss, trained again",
        "gradient evaluations",
    )
    return table(head, body) + "\n\n" + source(result)


def worked_examples(result: dict[str, Any]) -> str:
    """Mean validation and test loss of each method on each example."""
    rows, body = result["rows"], []
    for example in dict.fromkeys(row["example"] for row in rows):
        for method in dict.fromkeys(row["method"] for row in rows):
            own = [row for row in rows if (row["example"], row["method"]) == (example, method)]
            cells = [f"{sum(row[field] for row in own) / len(own):.4f}" for field in ("val", "test")]
            cost = f"{sum(row['gradient_evaluations'] for row in own) / len(own):,.0f}"
            auroc = [row["auroc"] for row in own if "auroc" in row]
            body.append((example, method, *cells, f"{sum(auroc) / len(auroc):.3f}" if auroc else "–", cost))
    head = ("example", "method", "validation loss", "test loss", "AUROC of gates", "gradient evaluations")
    return table(head, body) + "\n\n" + source(result)


def ray_study(result: dict[str, Any]) -> str:
    """Studies on Ray and here, rates of writing, and from these the shortest trials that keep 1,000 workers busy."""
    rows = result["rows"]
    studies = {row["run"]: row for row in rows if row["kind"] == "study"}
    trials = f"{studies['ray']['trials']} trials"
    head = (trials, "killed", "lost", "counted twice", "wall, s", "a trial, ms", "beyond it, ms")
    counts = ("killed", "lost", "duplicates")
    body = [
        (
            name,
            *(str(row[key]) for key in counts),
            f"{row['wall_seconds']:.1f}",
            *(f"{1000 * row[key]:.1f}" for key in ("trial_seconds", "overhead_seconds")),
        )
        for name, row in studies.items()
    ]
    rates = [(f"{row['kind']}, {row['run']}", f"{row['per_second']:,.0f}") for row in rows if "per_second" in row]
    alone, calm = studies["one process"], studies["ray"]
    reports = calm["epochs_counted"] / calm["trials"]
    fastest = max(row["per_second"] for row in rows if row["kind"] == "reports")
    each = {
        "the loop, by the last row above": alone["overhead_seconds"],
        f"the clerk, {reports:.0f} reports a trial": reports / fastest,
    }
    paper = [(name, f"{1000 * c:.1f}", f"{WORKERS * c:.1f}") for name, c in each.items()]
    shared = ("shared by all workers", "c, ms a trial", f"shortest trial that keeps {WORKERS:,} workers busy, s")
    written = ("writing", "a second")
    return "\n\n".join([table(head, body), table(written, rates), table(shared, paper), source(result)])


def population(result: dict[str, Any]) -> str:
    """Time of members one by one over that of all together."""
    rows = result["rows"]
    sizes = sorted({row["members"] for row in rows})
    body = []
    for tuned, name in ((False, "plain training"), (True, "lr and weight decay tuned")):
        at = {row["members"]: row["speed"] for row in rows if row["tuned"] == tuned}
        body.append((name, *(f"{at[size]:.1f}×" if size in at else "–" for size in sizes)))
    return table(("speed over one by one", *(f"{size} members" for size in sizes)), body) + "\n\n" + source(result)


def search_cv(result: dict[str, Any]) -> str:
    """Loss, fits and time of the gradient and of the grid, a row a problem."""
    rows, body = result["rows"], []
    for row in (row for row in rows if row["method"] == "gradient"):
        grid = next(other for other in rows if other["method"] == "grid" and other["model"] == row["model"])
        found = ", ".join(f"{key.removeprefix('best_')} {row[key]:.3g}" for key in row if key.startswith("best_"))
        pairs = [(f"{each['fold_fits']:,}", f"{each['test_score']:.3f}") for each in (row, grid)]
        body.append(
            (
                row["title"],
                found,
                ", ".join(f"{grid[key]:.3g}" for key in row if key.startswith("best_")),
                f"{row['loss_ratio']:.4f}",
                *(fits for fits, _ in pairs),
                f"{row['seconds']:.2f}",
                f"{grid['seconds']:.2f}",
                f"{row['time_ratio']:.2f}",
                *(score for _, score in pairs),
            )
        )
    head = (
        "problem",
        "found",
        "grid's",
        "loss, over grid's",
        "fold fits",
        "grid's",
        "seconds",
        "grid's",
        "time, over grid's",
    )
    return table((*head, "test score", "grid's"), body) + "\n\n" + source(result)
