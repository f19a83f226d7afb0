"""Where one hypergradient run of the search benchmark loses: fine grids of lr and α around what a seed has drawn.

    python -m experiments.search_diagnosis [--quick]

For each problem and seed (below those of the published runs) all points of a grid of lr × α are trained, lr decaying linearly to
zero, with hidden units and batch size as drawn or at 100 and 32, momentum or betas as drawn or at their usual values. A point is
then chosen

    by the held-out parts      the best there is to find (each metric its own), and as lucky as the table's best is
    by five validations        log loss (or MSE) of the validation splits of all five folds, trained without them
    by one validation          the same of the first fold alone: what a hypergradient run sees

Regrets are those of `experiments.search_benchmark`. "luck" is the table's best configuration, trained again with other seeds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments import results
from experiments.arguments import arg, command, parse
from experiments.search_benchmark import regret, tables
from experiments.search_live import INNER, start
from experiments.search_problems import EPOCHS, METRICS, MLP, SPACES, Folds, Rule, Values, fit, folds, scores
from experiments.search_table import units, values_at
from experiments.sweep import sweep

Row = dict[str, Any]
LRS = np.logspace(-1.5, 1, 8)  # SGD: of lr / (1 − momentum)
ADAM_LRS = np.logspace(-3, -0.75, 8)
ALPHAS = np.logspace(-2, 1, 4)
USUAL: Values = {"momentum": 0.9, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
DRAWS = ("as drawn", "usual momentum", "usual momentum, hidden 100, batch 32")
LUCK_SEEDS = 2


@dataclass
class Args:
    """Train the grids; finished ones are kept."""

    sets: tuple = arg(("iris", "wine", "diabetes", "breast"), "any of the five", quick=("iris",))
    seeds: int = arg(2, "of the drawn values, from 0", quick=1)
    usual_seeds: int = arg(1, "of those with usual values in place of some that were drawn", quick=1)
    epochs: int = arg(EPOCHS, "of a run", quick=2)
    jobs: int = arg(1, "processes, each with one thread")
    runs: str = arg("runs/search_diagnosis", "folder of finished grids", quick="runs/search_diagnosis_quick")
    out: str = arg("runs/search_diagnosis", "folder of the result", quick="runs/search_diagnosis_quick")
    quick: bool = arg(False, "two epochs of iris: a test of the machinery")


def many(data: Folds, values: Values, lr: Tensor, alpha: Tensor, seed: int, epochs: int) -> np.ndarray:
    """Scores [points, folds, 2] of the points (lr, α), all trained at once with lr decaying linearly to zero."""
    k, points = len(data.x), len(lr)
    n, batch = data.x.shape[1], min(values["batch"], data.x.shape[1])
    one = MLP(k, data.x.shape[2], values["hidden"], data.y.shape[2], data.kind, seed, data.x.dtype)
    net = MLP(k * points, data.x.shape[2], values["hidden"], data.y.shape[2], data.kind, seed, data.x.dtype)
    net.flat.copy_(one.flat.repeat(points, 1))
    rates, decays = (x.repeat_interleave(k)[:, None].to(net.flat) for x in (lr, alpha))
    rng, rule = np.random.default_rng(seed), Rule(net.flat, values | {"lr": 1.0})
    total, t = epochs * math.ceil(n / batch), 0
    for _ in range(epochs):
        order = torch.as_tensor(rng.permutation(n))
        x, y = data.x[:, order], data.y[:, order]
        for first in range(0, n, batch):
            now = slice(first, first + batch)
            net.backward(x[:, now].repeat(points, 1, 1), y[:, now].repeat(points, 1, 1), 0.0)
            net.grad.addcmul_(net.flat * net.decayed, decays, value=1 / x[:, now].shape[1])
            _move(rule, net, rates * (1 - t / total))
            t += 1
    output = net.output(data.held_x.repeat(points, 1, 1))
    each = output.view(points, k, *output.shape[1:])
    return np.array(
        [
            [scores(each[p, i : i + 1], data.held_y[i : i + 1], data.held[i : i + 1], data.kind) for i in range(k)]
            for p in range(points)
        ]
    )


def _move(rule: Rule, net: MLP, rates: Tensor) -> None:
    """A step of the rule with a learning rate for each row: SGD's buffer is linear in it, Adam's step too."""
    before = net.flat.clone()
    if "momentum" in rule.values:
        m = rule.values["momentum"]
        rule.first.mul_(m).sub_(net.grad * rates)
        net.flat.add_(rule.first, alpha=m).sub_(net.grad * rates)
    else:
        rule.step(net.grad)
        net.flat.sub_(before).mul_(rates).add_(before)


def validation_folds(data: Folds) -> Folds:
    """The same folds with the validation split of each training part in place of its held-out part."""
    n = int(INNER * data.x.shape[1])
    rest = data.x.shape[1] - n
    weights = torch.full((len(data.x), rest), 1 / rest, dtype=data.held.dtype)
    return replace(data, x=data.x[:, :n], y=data.y[:, :n], held_x=data.x[:, n:], held_y=data.y[:, n:], held=weights)


def run(item: Row) -> Row:
    values, data = start(item["space"], item["seed"]), folds(item["set"])
    if item["draw"] != DRAWS[0]:
        values |= {k: v for k, v in USUAL.items() if k in values}
    if item["draw"] == DRAWS[2]:
        values |= {"hidden": 100, "batch": 32}
    rates = LRS * (1 - values["momentum"]) if item["space"] == "sgd" else ADAM_LRS
    lr, alpha = (torch.as_tensor(x.ravel()) for x in np.meshgrid(rates, ALPHAS, indexing="ij"))
    torch.set_flush_denormal(True)
    try:
        held = many(data, values, lr, alpha, item["seed"], item["epochs"]).mean(1)
        inner = many(validation_folds(data), values, lr, alpha, item["seed"], item["epochs"])[:, :, 1]
    finally:
        torch.set_flush_denormal(False)
    five, one = int(inner.mean(1).argmin()), int(inner[:, 0].argmin())
    row = dict(item) | {f"start_{k}": v for k, v in values.items()}
    for k, metric in enumerate(METRICS[item["set"]]):
        row |= {f"{metric}_held": held[:, k].min(), f"{metric}_five": held[five, k], f"{metric}_one": held[one, k]}
    for chosen, at in (("five", five), ("one", one)):
        row |= {f"lr_{chosen}": float(lr[at]), f"alpha_{chosen}": float(alpha[at])}
    return row


def luck(args: Args) -> list[Row]:
    """The table's best of each problem, trained again."""
    out = []
    for (name, space, metric), table in tables(results.FOLDER, args.sets).items():
        config = int(table.end.argmin())
        values = values_at(SPACES[space], units(SPACES[space])[config])
        k = METRICS[name].index(metric)
        again = [fit(folds(name), values, 10_000 + s, args.epochs)[-1][k] for s in range(LUCK_SEEDS)]
        key = {"kind": "luck", "set": name, "space": space, "metric": metric}
        out.append(key | {"regret": float(np.mean([regret([(1.0, x)], table, 1) for x in again]))})
    return out


def main(argv: list[str] | None = None) -> list[Row]:
    args = parse(Args, argv)
    todo = [
        {"set": name, "space": space, "seed": seed, "draw": draw, "epochs": args.epochs}
        for draw in DRAWS
        for seed in range(args.seeds if draw == DRAWS[0] else args.usual_seeds)
        for name in args.sets
        for space in SPACES
    ]
    grids = sweep(run, todo, Path(args.runs) / "search_diagnosis.jsonl", args.jobs)
    rows = luck(args)
    problems = tables(results.FOLDER, args.sets)
    for key, table in problems.items():
        for row in grids:
            if (row["set"], row["space"]) == key[:2] and any(item.items() <= row.items() for item in todo):
                same = {"kind": "grid", "draw": row["draw"], "seed": row["seed"]} | dict(
                    zip(("set", "space", "metric"), key, strict=True)
                )
                found = {by: regret([(1.0, row[f"{key[2]}_{by}"])], table, 1) for by in ("held", "five", "one")}
                rows.append(same | {f"regret_{by}": value for by, value in found.items()})
    results.write(Path(args.out) / "search_diagnosis.json", command(args), rows, one_line_a_row=True)
    for draw in DRAWS:
        own = [row for row in rows if row.get("draw") == draw]
        print(draw, {by: round(float(np.mean([r[f"regret_{by}"] for r in own])), 3) for by in ("held", "five", "one")})
    print("luck", round(float(np.mean([r["regret"] for r in rows if r["kind"] == "luck"])), 3))
    return rows


if __name__ == "__main__":
    main()
