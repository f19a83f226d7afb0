"""Make the tables of README and docs, docs/figures and the state of the goals from experiments/results alone.

python scripts/tables.py            write them
python scripts/tables.py --check    say what differs, and exit 1 if anything does
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from experiments import (  # noqa: E402
    ablation_figure,
    figures,
    mode_tables,
    real_tables,
    results,
    search_figures,
    whole_run_figures,
)
from experiments.markdown import source, table  # noqa: E402
from experiments.price import best_of_grid  # noqa: E402
from experiments.workloads import FAMILIES, WORKLOADS  # noqa: E402

TEXTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))  # whose blocks are filled
FIGURES, GOALS, RETIRED = ROOT / "docs/figures", results.FOLDER / "goals.json", results.FOLDER / "goals_retired.json"
Result = dict[str, Any]


def quickstart(result: Result) -> str:
    head = ("run", "lr at the end", "weight decay at the end", "test accuracy", "gradient evaluations")
    body = [
        (
            row["method"],
            f"{row['lr']:.2g}",
            f"{row['weight_decay']:.2g}",
            f"{row['test_accuracy']:.1%}",
            f"{row['gradient_evaluations']:,}",
        )
        for row in result["rows"]
    ]
    return table(head, body)


# Rows of the table: the method, and which of its losses. Each of hypergrad's stands beside the same of the grid's winner.
FASHION_ROWS = (
    ("untuned", "untuned", "test_loss"),
    ("untuned, lr decays linearly to zero", "untuned_decay", "test_loss"),
    ("grid of {grid}, its winner", "winner", "test_loss"),
    ("hypergrad, lr and weight decay", "tuned", "test_loss"),
    ("hypergrad, lr", "tuned_lr", "test_loss"),
    ("hypergrad, lr, weight decay and momentum", "tuned_momentum", "test_loss"),
    ("averaged weights: grid's winner", "winner", "averaged_test_loss"),
    ("averaged weights: hypergrad, lr and weight decay", "tuned", "averaged_test_loss"),
    ("replayed on training + validation: grid's winner", "winner", "replay_test_loss"),
    ("replayed on training + validation: hypergrad, lr and weight decay", "tuned", "replay_test_loss"),
)


def fashion_mnist(result: Result) -> str:
    head = ("method", "starts", "mean", "median", "best", "worst", "NaN", "FLOPs", "seconds a run")
    of_grid = [row for row in result["rows"] if row["method"] == "grid" and row["steps"] == 10_000]
    body = []
    for name, method, loss in FASHION_ROWS:
        rows = results.select(result["rows"], {"method": method, "steps": 10_000})
        rows = [row for row in rows if loss in row]
        losses = sorted(row[loss] for row in rows if row[loss] is not None)
        if losses:
            numbers = (statistics.fmean(losses), statistics.median(losses), losses[0], losses[-1])
            shown = [f"{number:.4f}" if number < 1000 else f"{number:.1e}" for number in numbers]
            nan, (flops, seconds) = len(rows) - len(losses), _cost(rows, of_grid, loss)
            name = name.format(grid=len(of_grid))
            body.append((name, str(len(rows)), *shown, str(nan), f"{flops:.2f}×", f"{seconds:.1f}"))
    return table(head, body) + "\n\n" + source(result)


def _cost(rows: list[Result], of_grid: list[Result], loss: str) -> tuple[float, float]:
    """FLOPs in plain runs and seconds that such a loss takes: a winner's are those of the whole grid, a replay is a run more."""
    runs = of_grid if rows[0]["method"] == "winner" else rows
    share = 1 if runs is of_grid else len(rows)
    flops, seconds = (math.fsum(row[field] for row in runs) / share for field in ("flops_ratio", "seconds"))
    if loss == "replay_test_loss":
        flops, seconds = flops + 1, seconds + statistics.fmean(row["replay_seconds"] for row in rows)
    return flops, seconds


def shootout(result: Result) -> str:
    head = ("method", "regret, mean", "5–95 %", "worst workload", "on TPE's four", "lost runs", "cost, plain runs")
    body = []
    everywhere = max(row["workloads"] for row in result["rows"] if row["kind"] == "summary")
    for row in results.select(result["rows"], {"kind": "summary"}):
        all_there = row["workloads"] == everywhere
        four = "–" if row["regret_four"] is None else f"{row['regret_four']:.3f}"
        spread = f"{row['low']:.3f}–{row['high']:.3f}" if all_there else "–"
        numbers = (f"{row['regret']:.3f}", spread, f"{row['worst']:.2f}") if all_there else ("–", "–", "–")
        cost = f"{row['cost']:.3g}×" if row["cost"] < 1000 else f"{row['cost']:,.0f}×"
        body.append((row["title"], *numbers, four, f"{row['lost']:.1%}", cost))
    return table(head, body) + "\n\n" + source(result)


def harm(result: Result) -> str:
    head = (
        "workload",
        "tuned / grid's winner",
        "worst start",
        "tuned / untuned",
        "at `tuner.best()`",
        "clean test loss",
    )
    fields = ("over_grid", "worst_start", "over_untuned", "best_over_grid", "test_over_winner")
    rows = [row for row in result["rows"] if row["kind"] == "summary"]
    names = {row["workload"]: WORKLOADS[row["workload"]].title for row in rows} | {"all": "geometric mean"}
    body = [
        (names[row["workload"]], *("–" if row[field] is None else f"{row[field]:.3f}" for field in fields))
        for row in [*rows, *results.select(result["rows"], {"kind": "overall"})]
    ]
    return table(head, body) + "\n\n" + source(result)


def ablation(result: Result) -> str:
    head = (
        "without",
        "validation loss over that with it",
        "upper end of 95 %",
        "worst workload",
        "of it",
        "runs lost",
    )

    def shown(x: float | None) -> str:
        return "–" if x is None else f"{x:.3f}"

    body = [
        (
            row["without"],
            shown(row["mean"]),
            shown(row["upper"]),
            row["worst_workload"] or "–",
            shown(row["worst"]),
            str(row["lost"]),
        )
        for row in result["rows"]
        if row["suite"] == "all"
    ]
    return table(head, body) + "\n\n" + source(result)


def price(result: Result) -> str:
    """Seconds over a plain run's, and loss over L* where that is known, by workload and bound."""
    runs = [row for row in result["rows"] if row["kind"] == "run"]
    costs = sorted({row["cost"] for row in runs}, key=lambda cost: cost or math.inf)
    head = ("workload", "ms of a plain step", "runs", *("no bound" if x is None else f"cost={x:g}" for x in costs))

    def cell(seconds: Sequence[float], regret: float | None) -> str:
        return f"{statistics.geometric_mean(seconds):.2f}×" + ("" if regret is None else f", {regret:.3f}")

    body = []
    forms = {"default": "", "open": ", without `total_steps`", "scheduler": ", beside a scheduler"}
    for name, form in dict.fromkeys((row["workload"], row["form"]) for row in runs):
        mine = [row for row in runs if (row["workload"], row["form"]) == (name, form)]
        cells = []
        for cost in costs:
            here = [row for row in mine if row["cost"] == cost]
            best = best_of_grid(name, here[0]["split"]) if here else None
            regret = None if best is None else statistics.fmean(row["loss"] for row in here) / best
            cells.append(cell([row["seconds"] for row in here], regret) if here else "–")
        plain = statistics.median(row["plain_ms"] for row in mine)
        body.append((WORKLOADS[name].title + forms[form], f"{plain:.3g}", str(len(mine)), *cells))
    titles = {"main": "all twelve", "small": "all of the small family", "realistic": "both of realistic size"}
    for family in dict.fromkeys(row["family"] for row in result["rows"] if row["kind"] == "family"):
        rows = {row["cost"]: row for row in result["rows"] if row["kind"] == "family" and row["family"] == family}
        cells = [cell([rows[cost]["seconds"]], rows[cost]["regret"]) if cost in rows else "–" for cost in costs]
        body.append((titles[family], "", str(sum(row["runs"] for row in rows.values())), *cells))
    return table(head, body) + "\n\n" + source(result | {"command": RUNS})


RUNS = (
    "python -m experiments.price --costs 2.0 1.15 1.5 3.0 --seed 1000 --seeds 2 --parts run --out experiments/results"
)
BYTES = "python -m experiments.price --parts bytes --out experiments/results"


def price_bytes(result: Result) -> str:
    head = ("optimizer", "form", "first 24 steps", "24 steps after the fiftieth")
    rows = [row for row in result["rows"] if row["kind"] == "bytes"]
    body = [(row["optimizer"], row["form"], f"{row['more']:.1f}", f"{row['late']:.1f}") for row in rows]
    return (
        "At the peak inside a step, beyond a plain loop's, in vectors as long as the weights (ResNet-18 of 5 million weights, "
        "batch 2):\n\n" + table(head, body) + "\n\n" + source(result | {"command": BYTES})
    )


def strides(result: Result) -> str:
    head = (
        "products in one step of",
        "workloads",
        "validation loss over that with one in each",
        "worst workload",
        "of it",
        "CPU seconds",
    )
    families = {"main": "the twelve", "small": "small family"}
    body = [
        (
            str(row["stride"]),
            families[row["family"]],
            f"{row['mean']:.3f}",
            row["worst_workload"],
            f"{row['worst']:.3f}",
            f"{row['seconds']:.2f}",
        )
        for row in sorted(result["rows"], key=lambda row: (row["stride"], row["family"]))
        if row["kind"] == "summary" and row["stride"] > 1
    ]
    return table(head, body) + "\n\n" + source(result)


def schedulers(result: Result) -> str:
    head = ("scheduler", "workload", "best plain lr", "tuned from 1e-6", "tuned from 1e-1", "scale found")
    rows, body = result["rows"], []
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        over = ("–" if row["over_best"] is None else f"{row['over_best']:.3f}" for row in (first, second))
        ends = ", ".join("–" if row["end_lr"] is None else f"{row['end_lr']:.2g}" for row in (first, second))
        name = "none (linear decay)" if first["scheduler"] == "none" else first["scheduler"]
        body.append((name, WORKLOADS[first["workload"]].title, f"{first['best_lr']:g}", *over, ends))
    return table(head, body) + "\n\n" + source(result)


def layers(result: Result) -> str:
    head = ("layer", "comes out", "error, unrolled", "error, forward", "message")
    body = []
    for row in result["rows"]:
        errors = ("–" if row[mode] is None else f"{row[mode]:.0e}" for mode in ("unrolled", "forward"))
        first = re.split(r"\.(?= |$)", row["says"], maxsplit=1)[0].replace("|", r"\|")
        body.append((row["layer"], row["outcome"], *errors, first))
    return table(head, body) + "\n\n" + source(result)


def goals(rows: list[Result]) -> str:
    return table(("goal", "target", "reached", "met", "command"), [_goal(row) for row in rows])


def goals_retired(rows: list[Result]) -> str:
    head = ("goal", "target", "reached", "met", "command", "its successor")
    return table(head, [(*_goal(row), row["successor"]) for row in rows])


def _goal(row: Result) -> tuple[str, ...]:
    reached = "not measured" if row["reached"] is None else f"{row['reached']:.4g}"
    sign = {"<=": "≤", ">=": "≥", "==": "="}.get(row["op"], row["op"])
    target = f"{sign} {row['target']:g} {row['unit']}".rstrip()
    return row["goal"], target, reached, "yes" if row["met"] else "no", f"`{row['command']}`"


# ---- sentences of README


def fashion_in_words(result: Result) -> str:
    methods = ("tuned", "untuned", "winner", "grid")
    rows = {method: results.select(result["rows"], {"method": method, "steps": 10_000}) for method in methods}
    tuned, winner = ([row["test_loss"] for row in rows[method]] for method in ("tuned", "winner"))
    flops, seconds = _cost(rows["tuned"], rows["grid"], "test_loss")
    plain = statistics.fmean(row["seconds"] for row in rows["untuned"])
    return (
        f"On Fashion-MNIST, from {len(tuned)} random starts, one tuned run ends at a test loss of "
        f"{statistics.fmean(tuned):.3f} in the mean and {max(tuned):.3f} at worst; the winner of a grid of "
        f"{len(rows['grid'])} runs is at {statistics.fmean(winner):.3f}. The tuned run does {flops:.1f} times the "
        f"arithmetic of a plain one, and takes {seconds:.0f} seconds where that takes {plain:.0f}.{_with_a_bound(len(tuned))}"
    )


def _with_a_bound(starts: int) -> str:
    result = results.load("partial/default_cost/fashion_mnist.json")
    assert result is not None
    tuned = [row["test_loss"] for row in results.select(result["rows"], {"method": "tuned"})]
    which = "these starts" if len(tuned) == starts else f"the first {len(tuned)} of these starts"
    return f" With the default, `cost=2`, {which} end at {statistics.fmean(tuned):.3f} in the mean and {max(tuned):.3f} at worst."


def shootout_in_words(result: Result) -> str:
    rows = {row["title"]: row for row in result["rows"] if row["kind"] == "summary"}
    ours = rows["hypergrad, its defaults"]
    others = {
        "the best of 16 random runs": "best of 16 random",
        "the best of 64": "best of 64 random",
        "successive halving from 64": "halving, 64 by 4",
    }
    shown = [f"{name} {rows[title]['regret']:.3f} for {rows[title]['cost']:.0f}" for name, title in others.items()]
    return (
        f"Over {ours['workloads']} small workloads, from lr 1e-3 and on five other seeds, its test loss is "
        f"{ours['regret']:.3f} times that of the winner of a grid of 200 runs in the mean, {ours['worst']:.2f} times on the "
        f"worst, for the arithmetic of {ours['cost']:.1f} plain runs; {', '.join(shown)}."
    )


def price_in_words(result: Result) -> str:
    rows = {row["cost"]: row for row in result["rows"] if row["kind"] == "family" and row["family"] == "main"}
    runs = [row for row in result["rows"] if row["kind"] == "run"]
    names = {"resnet_fashion": "a ResNet", "gpt_text": "a GPT"}

    def of(cost: float) -> str:
        found = {
            name: statistics.geometric_mean(
                row["seconds"] for row in runs if (row["workload"], row["cost"], row["form"]) == (name, cost, "default")
            )
            for name in names
        }
        return " and ".join(f"{found[name]:.2f} times for {title}" for name, title in names.items())

    two, least = rows[2.0], rows[1.15]
    return (
        f"With the default, `cost=2`, a tuned run takes {of(2.0)}, of half a million weights each, the CPU seconds of a plain "
        f"one; with `cost=1.15` {of(1.15)}. Over {len(FAMILIES['main'])} small workloads its test loss is {two['regret']:.3f} "
        f"times that of the winner of a grid of 200 runs in the mean, {two['worst']:.2f} times on the worst, and "
        f"{least['regret']:.3f} times with `cost=1.15`. Most of those have plain steps of less than 2 ms: there Python's own "
        f"time counts, and the run takes {two['seconds']:.1f} and {least['seconds']:.1f} times a plain one's seconds."
    )


def harm_in_words(result: Result) -> str:
    rows = {row["workload"]: row for row in result["rows"] if row["kind"] in ("summary", "overall")}
    every, digits = rows.pop("all"), rows["clean_digits_300"]["over_untuned"]
    worst = max(row["over_grid"] for row in rows.values())
    return (
        f"It does worse on small sets that a net can learn by heart: its validation loss is {every['over_grid']:.2f} times "
        f"the grid winner's in the mean of {len(rows)}, {worst:.2f} times on the worst, and on 300 digits {digits:.2f} times "
        "that of an untuned run."
    )


TABLES: dict[str, Callable[[Result], str]] = {
    "quickstart": quickstart,
    "fashion_mnist": fashion_mnist,
    "shootout": shootout,
    "harm": harm,
    "ablation": ablation,
    "price": price,
    "price_bytes": price_bytes,
    "strides": strides,
    "schedulers": schedulers,
    "layers": layers,
    **mode_tables.TABLES,
    **real_tables.TABLES,
    "search_benchmark": search_figures.search_benchmark,
    "search_problems": search_figures.search_problems,
    "search_seconds": search_figures.search_seconds,
    "search_differences": search_figures.search_differences,
    "search_diagnosis": search_figures.search_diagnosis,
    "discrete": search_figures.discrete,
    "worked_examples": search_figures.worked_examples,
    "population": search_figures.population,
    "ray_study": search_figures.ray_study,
    "search_cv": search_figures.search_cv,
    "fashion_in_words": fashion_in_words,
    "shootout_in_words": shootout_in_words,
    "harm_in_words": harm_in_words,
    "price_in_words": price_in_words,
}
FILES = {  # of tables that are not in the file of their name
    "muon": "muon/invariance.json",
    "search_problems": "search_benchmark.json",
    "search_differences": "search_benchmark.json",
    "fashion_in_words": "fashion_mnist.json",
    "shootout_in_words": "shootout.json",
    "harm_in_words": "harm.json",
    "price_in_words": "price.json",
    "price_bytes": "price.json",
    "ddp_bytes_written_out": "ddp_bytes.json",
}
PLOTS: dict[str, tuple[str, Callable[[list[Result]], Any]]] = {
    "quickstart": ("quickstart_curves.json", figures.quickstart),
    "fashion_mnist": ("fashion_mnist.json", figures.fashion_mnist),
    "trajectories": ("fashion_mnist_paths.json", figures.trajectories),
    "shootout": ("shootout.json", figures.shootout),
    "price": ("price.json", figures.price),
    "bench_modes": ("bench_modes.json", figures.bench_modes),
    "ablation": ("ablation.json", ablation_figure.ablation),
    "metalearn_lr": ("metalearn_lr.json", whole_run_figures.metalearn_lr),
    "learned_schedule": ("learned_schedule.json", whole_run_figures.learned_schedule),
    "search_benchmark": ("search_benchmark.json", search_figures.search_regret),
    "search_seconds": ("search_seconds.json", search_figures.search_seconds_figure),
    "data_cleaning": ("data_cleaning.json", whole_run_figures.data_cleaning),
}


def fill(text: str, goal_rows: list[Result], folder: Path = results.FOLDER) -> str:
    """``text`` with every block between ``<!-- table:NAME -->`` and ``<!-- /table -->`` made anew."""

    def block(match: re.Match[str]) -> str:
        name = match[1]
        if name not in ("goals", "goals_retired", *TABLES):
            raise SystemExit(f"a text has a table {name!r}, which scripts/tables.py does not know: {sorted(TABLES)}")
        if name == "goals":
            content = goals(goal_rows)
        elif name == "goals_retired":
            content = goals_retired(json.loads(RETIRED.read_text(encoding="utf-8")))
        else:
            result = results.load(FILES.get(name, f"{name}.json"), folder)
            content = TABLES[name](result) if result else "*Not measured yet.*"
        return f"<!-- table:{name} -->\n{content}\n<!-- /table -->"

    return re.sub(r"<!-- table:(\w+) -->.*?<!-- /table -->", block, text, flags=re.DOTALL)


def differences(write: bool) -> list[str]:
    """What is not as the result files have it; with ``write``, it is made so."""
    found = []
    old_goals = json.loads(GOALS.read_text(encoding="utf-8"))
    new_goals = [results.recompute(goal) for goal in old_goals]
    if new_goals != old_goals:
        found.append("experiments/results/goals.json")
        if write:
            results.save(GOALS, new_goals)
    for path in TEXTS:
        old = path.read_text(encoding="utf-8")
        new = fill(old, new_goals)
        if new != old:
            found.append(path.relative_to(ROOT).as_posix())
            if write:
                path.write_text(new, encoding="utf-8")
    for name, (file, plot) in PLOTS.items():
        result, path = results.load(file), FIGURES / f"{name}.png"
        if result and _fingerprint(path) != (made_from := _digest(result["rows"])):
            found.append(f"docs/figures/{name}.png")
            if write:
                FIGURES.mkdir(parents=True, exist_ok=True)
                plot(result["rows"]).savefig(path, dpi=130, metadata={"Source": made_from})
    return found


def _digest(rows: list[Result]) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def _fingerprint(path: Path) -> str | None:
    """The digest of the rows that a figure was made from, kept inside the PNG."""
    if not path.is_file():
        return None
    from PIL import Image

    with Image.open(path) as image:
        return image.info.get("Source")


if __name__ == "__main__":
    if set(sys.argv[1:]) - {"--check"}:
        raise SystemExit(__doc__)
    checking = "--check" in sys.argv[1:]
    changed = differences(write=not checking)
    for name in changed:
        print(("differs from the results: " if checking else "written: ") + name)
    if checking and changed:
        raise SystemExit("run: python scripts/tables.py")
