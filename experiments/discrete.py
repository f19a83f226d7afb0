"""What a gradient cannot reach: batch size, hidden units, activation, kernel size, embedding size, chosen by a sampler.

    python -m experiments.discrete [--quick]

"hybrid-online": Optuna's TPE chooses the discrete entries and the starting values, and a Tuner moves lr and weight
decay while each of its trials trains. "tpe": TPE chooses all of it, and trains with lr decaying linearly to zero.
Both have the same budget in gradient evaluations (of a batch, whatever its size), that of some plain runs; trials
that end beyond it do not count. Beside it both are compared after as many CPU seconds ("at equal seconds"): those that TPE's
searches took. The best trial by validation loss is trained again, from another seed, for its test
loss. All runs of a case pass as many examples through the model.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import hypergrad.search as search
from experiments import results
from experiments.arguments import arg, command, parse
from experiments.datasets import Data
from experiments.sweep import sweep
from experiments.workloads import data, models
from experiments.workloads.task import VAL_BATCH
from hypergrad.search.training import train

Row = dict[str, Any]
LR_AND_DECAY = {"lr": search.Float(1e-4, 1.0, "log"), "weight_decay": search.Float(1e-6, 1e-1, "log")}
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}


@dataclass(frozen=True)
class Case:
    """Data, what is searched beside lr and weight decay, a model of these values, and its optimizer."""

    data: Callable[[bool], Data]
    space: dict[str, Any]
    model: Callable[[dict[str, Any]], nn.Module]
    optimizer: Callable[..., torch.optim.Optimizer]
    examples: int
    batch: int = 50


def mlp(p: dict[str, Any]) -> nn.Module:
    return nn.Sequential(nn.Linear(64, p["hidden"]), ACTIVATIONS[p["activation"]](), nn.Linear(p["hidden"], 10))


def cnn(p: dict[str, Any]) -> nn.Module:
    """Three convolutions of one kernel size along a signal of 40."""
    k, width = p["kernel"], p["width"]
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 40))]
    for inputs in (1, width, width):
        layers += [nn.Conv1d(inputs, width, k, stride=2, padding=k // 2), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(5 * width, 10))


CASES = {
    "digits, MLP": Case(
        data.digits,
        {"hidden": search.Int(8, 256, "log"), "activation": list(ACTIVATIONS), "batch": [16, 32, 64, 128]},
        mlp,
        partial(torch.optim.SGD, momentum=0.9),
        examples=12_000,
    ),
    "MNIST-1D, CNN": Case(
        data.mnist1d,
        {"kernel": [3, 5, 7, 9], "width": search.Int(4, 32, "log")},
        cnn,
        partial(torch.optim.SGD, momentum=0.9),
        examples=15_000,
    ),
    "characters, GPT": Case(
        data.characters,
        {"embedding": [8, 16, 32, 64]},
        lambda p: models.GPT(p["embedding"], 2, 2),
        torch.optim.AdamW,
        examples=1200,
        batch=8,
    ),
}
STRATEGIES = ("tpe", "hybrid-online")


@dataclass
class Args:
    """Search each case with both strategies; finished searches are kept."""

    cases: tuple = arg(tuple(CASES), "any of them", quick=("digits, MLP",))
    seeds: int = arg(3, "of each search", quick=1)
    first_seed: int = arg(1000, "they count up from here")
    budget: int = arg(8, "in plain runs of the case's own batch size, or of 64", quick=4)
    share: float = arg(1.0, "of the examples of a run", quick=0.1)
    jobs: int = arg(1, "processes, each with one thread")
    runs: str = arg("runs/discrete", "folder of finished searches", quick="runs/discrete_quick")
    out: str = arg("runs/discrete", "folder of the result", quick="runs/discrete_quick")
    quick: bool = arg(False, "one short search of the digits with each: a test of the machinery")


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    logits, y = model(batch[0]), batch[1]
    return cross_entropy(logits.flatten(0, -2), y.flatten())


def build(case: Case, share: float, part: str, p: dict[str, Any], trial: search.Trial) -> search.Run:
    """The run of a trial; `part` is what it is judged by, "val" or "test"."""
    sets = case.data(False)
    x, y = sets.train
    model = case.model(p)
    size = p.get("batch", case.batch)
    draws = torch.Generator().manual_seed(trial.seed)
    batches: list[Any] = []
    while len(batches) * size < share * case.examples:
        order = torch.randperm(len(y), generator=draws)
        batches += [(x[at], y[at]) for at in order.split(size) if len(at) == size]
    batches = batches[: max(round(share * case.examples / size), 1)]
    held = getattr(sets, part)
    few = held if part == "test" else (held[0][: 4 * VAL_BATCH], held[1][: 4 * VAL_BATCH])
    optimizer = case.optimizer(model.parameters(), lr=p["lr"], weight_decay=p["weight_decay"])
    return search.Run(model, optimizer, batches, loss, lambda: loss(model, few))


def run(item: Row) -> Row:
    """One search: its best validation loss within the budget, and the test loss of those values trained again."""
    case = CASES[item["case"]]
    make = partial(build, case, item["share"], "val")
    plain = item["share"] * case.examples / (64 if "batch" in case.space else case.batch)
    limit, marks = item["budget"] * plain, list[float]()

    def begun(p: dict[str, Any], trial: search.Trial) -> search.Run:
        marks.append(time.process_time())
        return make(p, trial)

    def trained(p: dict[str, Any], trial: search.Trial) -> float:
        return train(begun(p, trial), trial, decay=True)

    def objective(p: dict[str, Any], trial: search.Trial) -> Any:
        return trained(p, trial) if item["strategy"] == "tpe" else begun(p, trial)

    study = search.optimize(
        objective,
        LR_AND_DECAY | case.space,
        item["strategy"],
        {"gradient_evaluations": limit},
        seed=item["seed"],
        progress=False,
    )
    marks.append(time.process_time())
    spent, within = 0.0, []
    for each in study.trials:
        spent += each.cost.gradient_evaluations
        if spent <= limit and each.state == "complete":
            within.append(each)
    best = min(within, key=lambda each: each.value)
    again = search.Trial(0, best.params, 10_000 + item["seed"])
    torch.manual_seed(again.seed)
    test = train(build(case, item["share"], "test", best.params, again), again, decay=True)
    # in the order in which they were run: to the beginning of the next, or the end
    paths = {"trial_seconds": [b - a for a, b in pairwise(marks)], "trial_vals": [each.value for each in study.trials]}
    chosen = paths | {f"best_{name}": value for name, value in best.params.items()}
    return item | {"val": best.value, "test": test, "trials": len(within), "gradient_evaluations": limit} | chosen


def at_equal_seconds(row: Row, rival: Row) -> Row:
    """The best validation loss of a search after as many CPU seconds as another has taken for its budget, over that one's."""
    limit = sum(rival["trial_seconds"][: rival["trials"]])
    spent = list(accumulate(row["trial_seconds"]))
    found = [val for val, s in zip(row["trial_vals"], spent, strict=True) if s <= limit and val is not None]
    return {
        "seconds": spent[row["trials"] - 1],
        "trials_at_equal_seconds": len(found),
        "val_over_tpe_at_equal_seconds": min(found) / rival["val"] if found else None,
    }


def main(argv: list[str] | None = None) -> list[Row]:
    args = parse(Args, argv)
    todo = [
        {"case": case, "strategy": strategy, "seed": args.first_seed + i, "budget": args.budget, "share": args.share}
        for i in range(args.seeds)
        for case in args.cases
        for strategy in STRATEGIES
    ]
    rows = sweep(run, todo, Path(args.runs) / "discrete.jsonl", args.jobs)
    rows = [next(row for row in rows if item.items() <= row.items()) for item in todo]
    for row in rows:
        rival = next(r for r in rows if r["strategy"] == "tpe" and (r["case"], r["seed"]) == (row["case"], row["seed"]))
        row |= {f"{part}_over_tpe": row[part] / rival[part] for part in ("val", "test")}
        row |= at_equal_seconds(row, rival)
    rows = [{name: x for name, x in row.items() if not name.startswith("trial_")} for row in rows]
    results.write(Path(args.out) / "discrete.json", command(args), rows, one_line_a_row=True)
    for case in args.cases:
        for strategy in STRATEGIES:
            own = [row for row in rows if (row["case"], row["strategy"]) == (case, strategy)]
            print(
                case,
                strategy,
                *(f"{part} {statistics.fmean(row[part] for row in own):.4f}" for part in ("val", "test")),
            )
    return rows


if __name__ == "__main__":
    main()
