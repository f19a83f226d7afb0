"""hybrid-online in measured seconds, beside TPE and ASHA: Bayesmark's protocol on scikit-learn's five sets.

    python -m experiments.search_seconds [--quick]

`hypergrad.search.optimize` runs strategy "hybrid-online" with its defaults: TPE chooses hidden units, batch size, where lr, α and
momentum (Adam: lr and α) start, and what else there is; a Tuner with cost=1.5 moves lr, α and momentum while the five folds train
side by side, by the sum of their held-out losses (log loss, or MSE), which is also what TPE is told. One trial is one run of 40
epochs. Both metrics are read at its end, at its last weights.

The cost of a trial ("seconds") is its CPU seconds over those of a plain run of the same configuration: the same loop without a
tuner, of which PLAIN steps are timed before the trial and PLAIN after it, in the same process and its one thread. Beside it the
same trials are charged by counted gradient evaluations, a Hessian product being two ("evaluations"), and by what cost=1.5
promises where a step is long beside the tuner's Python ("promised"). TPE and ASHA search the table of
`experiments.search_table`, where an evaluation of 40 epochs costs 1; choosing the next trial costs none of them anything. Scores
and intervals are those of `experiments.search_benchmark`.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from torch import Tensor

from experiments import results
from experiments.arguments import arg, command, parse
from experiments.search_benchmark import _difference, bootstrap, regret, tables
from experiments.search_live import build, loss
from experiments.search_problems import EPOCHS, METRICS, SETS, SPACES, Folds, Values, folds, scores
from experiments.sweep import sweep
from experiments.table_searches import STRATEGIES, Best, Table
from hypergrad.search import Float, Run, Trial, optimize

Row = dict[str, Any]
BUDGETS = (4, 8, 16, 32, 64)
CHARGES = ("seconds", "evaluations", "promised")
PROMISED = 1.5  # plain runs, cost= of hybrid-online's tuner
RIVALS = ("tpe", "asha")
PLAIN = 30  # steps that are timed, twice
WARM = 3  # steps before these
AT_A_TIME = 4  # trials, after which it is seen whether the budget is spent
STAYS = ("beta1", "beta2", "eps")  # no hypergradient moves these
FINAL_SEED = 5000


@dataclass
class Args:
    """Live studies of hybrid-online, charged by the clock. Finished ones are kept."""

    sets: tuple = arg(tuple(SETS), "any of them", quick=("iris",))
    seeds: int = arg(3, "of each set and space", quick=1)
    rival_seeds: int = arg(5, "of each search of the table", quick=1)
    first_seed: int = arg(FINAL_SEED, "of the studies; they count up from here")
    budget: int = arg(64, "largest, in plain runs", quick=4)
    trials: int = arg(12, "of a study at least, also where the budget is spent", quick=4)
    epochs: int = arg(EPOCHS, "of a run", quick=2)
    runs: str = arg(str(results.FOLDER), "folder of finished studies", quick="runs/search_seconds_quick")
    out: str = arg("runs/search_seconds", "folder of the result", quick="runs/search_seconds_quick")
    quick: bool = arg(False, "runs of 2 epochs on iris: a test of the machinery")


def batches(data: Folds, size: int, epochs: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """(x, y) of every step: each epoch a permutation of the rows, the same for all folds."""
    rng, n = np.random.default_rng(seed), data.x.shape[1]
    orders = [torch.as_tensor(rng.permutation(n)).split(min(size, n)) for _ in range(epochs)]
    return [(data.x[:, at], data.y[:, at]) for order in orders for at in order]


def held_out(data: Folds, output: Tensor) -> Tensor:
    """The sum over folds of the held-out log loss or MSE."""
    if data.kind == "identity":
        each = (output - data.held_y).square()[..., 0]
    elif data.kind == "logistic":
        each = torch.nn.functional.binary_cross_entropy_with_logits(output, data.held_y, reduction="none")[..., 0]
    else:
        each = -(output.log_softmax(-1) * data.held_y).sum(-1)
    return (each * data.held).sum()


def plain_steps(data: Folds, values: Values, given: list[tuple[Tensor, Tensor]], seed: int) -> float:
    """CPU seconds of a step of the loop without a tuner, the mean of PLAIN."""
    nets, optimizer = build(data, values, seed)
    began = 0.0
    for i, (x, y) in enumerate((given * (PLAIN + WARM))[: PLAIN + WARM]):
        if i == WARM:
            began = time.process_time()
        optimizer.zero_grad()
        loss(nets(x), y, data.kind).backward()
        optimizer.step()
    return (time.process_time() - began) / PLAIN


def objective(data: Folds, epochs: int, params: Values, trial: Trial) -> Run:
    given = batches(data, params["batch"], epochs, trial.seed)
    trial.note("plain before", plain_steps(data, params, given, trial.seed))
    trial.note("steps", len(given))
    trial.note("began", time.process_time())
    nets, optimizer = build(data, params, trial.seed)

    def val_loss() -> Tensor:
        output = nets(data.held_x)
        if not torch.is_grad_enabled():  # a report, or the end of the run
            trial.note("scores", scores(output, data.held_y, data.held, data.kind))
            trial.note("ended", time.process_time())
        return held_out(data, output)

    return Run(nets, optimizer, given, lambda _, batch: loss(nets(batch[0]), batch[1], data.kind), val_loss)


def study(item: Row) -> Row:
    """One study, trial by trial: costs in plain runs, the two metrics, and what was learned."""
    data, began = folds(item["set"]), time.perf_counter()
    space = {
        n: replace(e, differentiable=False) if isinstance(e, Float) and n in STAYS else e
        for n, e in SPACES[item["space"]].items()
    }
    storage, paid, rows = optuna.storages.InMemoryStorage(), 0.0, []
    while paid < item["budget"] or len(rows) < item["trials"]:
        found = optimize(
            partial(objective, data, item["epochs"]),
            space,
            "hybrid-online",
            seed=item["seed"],
            storage=storage,
            n_trials=len(rows) + AT_A_TIME,
            aliases={"alpha": "weight_decay"},
            progress=False,
        )
        for each in found.trials[len(rows) :]:
            rows.append(_trial(data, each, item))
            paid += rows[-1]["seconds"]
    row = item | {f"trial_{name}": [each[name] for each in rows] for name in rows[0]}
    return row | {"seconds": time.perf_counter() - began}


def _trial(data: Folds, each: Any, item: Row) -> Row:
    """A trial's cost and metrics; what it was drawn with and what the tuner made of it."""
    params = each.params
    steps = each.notes.get("steps", 0)
    given = batches(data, params["batch"], item["epochs"], 0)
    before = each.notes["plain before"]
    plain = (before + plain_steps(data, params, given, 0)) / 2
    ends = each.notes.get("scores", (math.nan, math.nan)) if each.state == "complete" else (math.nan, math.nan)
    row = {
        "seconds": round((each.notes.get("ended", each.notes["began"]) - each.notes["began"]) / (steps * plain), 4),
        "evaluations": round(each.cost.gradient_evaluations / steps, 4),
        "promised": PROMISED,
        "plain_seconds": round(steps * plain, 4),
        "steps": steps,
    }
    row |= {name: float(f"{x:.5g}") for name, x in zip(METRICS[item["set"]], ends, strict=True)}
    return row | {name: float(f"{params[name]:.4g}") for name in ("hidden", "batch", "lr", "alpha")}


def path(row: Row, metric: str, charge: str) -> Best:
    """(plain runs paid, score) after each trial of a study."""
    spent = np.cumsum(row[f"trial_{charge}"])
    return [(float(at), x) for at, x in zip(spent, row[f"trial_{metric}"]) if x is not None and math.isfinite(x)]


def rivals(item: Row, problems: dict[tuple[str, str, str], Table]) -> Row:
    """Regrets of one search of one table: a field for each budget and seed."""
    table, row = problems[item["set"], item["space"], item["metric"]], dict(item)
    for seed in range(item["seeds"]):
        best = STRATEGIES[item["strategy"]](table, 1000 + seed, item["budget"])
        row |= {f"regret_{b}_{seed}": regret(best, table, b) for b in BUDGETS if b <= item["budget"]}
    return row


def summarise(args: Args, problems: dict[tuple[str, str, str], Table], live: list[Row], theirs: list[Row]) -> list[Row]:
    """Rows of kinds "summary", "problem" and "difference" of budgets that every study has reached; "trial", the mean score of one
    trial beside that of one configuration of the table; "cost"."""
    rng, rows = np.random.default_rng(0), []
    of = {
        name: [
            next(r for r in theirs if (*key, name) == (r["set"], r["space"], r["metric"], r["strategy"]))
            for key in problems
        ]
        for name in RIVALS
    }
    for charge in CHARGES:
        reached = min(sum(row[f"trial_{charge}"]) for row in live)
        for b in (b for b in BUDGETS if b <= min(args.budget, reached)):
            own = [
                np.array([regret(path(r, key[2], charge), table, b) for r in live if (r["set"], r["space"]) == key[:2]])
                for key, table in problems.items()
            ]
            found = {
                name: [np.array([r[f"regret_{b}_{s}"] for s in range(args.rival_seeds)]) for r in of[name]]
                for name in RIVALS
            }
            same = {"charge": charge, "budget": b}
            for name, regrets in ({"hybrid-online": own} | found).items():
                low, high = bootstrap(regrets, rng)
                score = 1 - float(np.mean([x.mean() for x in regrets]))
                rows.append(
                    {"kind": "summary", "strategy": name} | same | {"score": score, "low": 1 - high, "high": 1 - low}
                )
            for key, x in zip(problems, own, strict=True):
                named = dict(zip(("set", "space", "metric"), key, strict=True))
                rows.append(
                    {"kind": "problem", "strategy": "hybrid-online"} | same | named | {"score": 1 - float(x.mean())}
                )
            rows += [_difference("hybrid-online", name, b, own, found[name], rng) | same for name in RIVALS]
    for key, table in problems.items():
        ends = [x for r in live if (r["set"], r["space"]) == key[:2] for _, x in path(r, key[2], "promised")]
        mean, drawn = (float(np.mean([regret([(0.0, x)], table, 0) for x in xs])) for xs in (ends, table.end))
        named = dict(zip(("set", "space", "metric"), key, strict=True))
        rows.append({"kind": "trial"} | named | {"score": 1 - mean, "of_the_table": 1 - drawn})
    for key in dict.fromkeys(key[:2] for key in problems):
        mine = [row for row in live if (row["set"], row["space"]) == key]
        row: Row = {
            "kind": "cost",
            "set": key[0],
            "space": key[1],
            "trials": sum(len(r["trial_seconds"]) for r in mine),
        }
        for name in ("seconds", "evaluations", "plain_seconds", "steps"):
            row[f"median_{name}"] = float(np.median([x for r in mine for x in r[f"trial_{name}"]]))
        rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> list[Row]:
    args = parse(Args, argv)
    problems = tables(results.FOLDER, args.sets)
    todo: list[Row] = [
        {
            "kind": "study",
            "set": name,
            "space": space,
            "seed": args.first_seed + i,
            "budget": args.budget,
            "trials": args.trials,
            "epochs": args.epochs,
        }
        for i in range(args.seeds)
        for name in args.sets
        for space in SPACES
    ]
    study(
        {"set": args.sets[0], "space": "sgd", "seed": 0, "budget": 0, "trials": 1, "epochs": 1}
    )  # first calls are slow
    kept = sweep(study, todo, Path(args.runs) / "search_seconds.jsonl")
    live = [row for row in kept if any(item.items() <= row.items() for item in todo)]
    searches: list[Row] = [
        dict(zip(("set", "space", "metric"), key, strict=True))
        | {"kind": "search", "strategy": name, "seeds": args.rival_seeds, "budget": args.budget}
        for key in problems
        for name in RIVALS
    ]
    theirs = sweep(partial(rivals, problems=problems), searches, Path(args.runs) / "search_seconds.jsonl")
    theirs = [row for row in theirs if any(item.items() <= row.items() for item in searches)]
    rows = summarise(args, problems, live, theirs)
    results.write(Path(args.out) / "search_seconds.json", command(args), rows, one_line_a_row=True)
    for row in rows:
        if row["kind"] != "problem":
            print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    return rows


if __name__ == "__main__":
    main()
