"""`tune_run` by every outer rule, and a `Population`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hypergrad
from experiments.same_numbers.names import keywords
from experiments.same_numbers.nets import net, rows
from experiments.same_numbers.record import Recorder, weights

RUN_STEPS, OUTER_STEPS, QUICK_OUTER_STEPS = 32, 9, 3
MEMBERS, POPULATION_STEPS = 3, 60


def build(seed: int) -> hypergrad.Run:
    """A run of AdamW on a small net."""
    x, y = rows(seed)
    val_x, val_y = rows(seed + 5)
    model = net()
    batches = [torch.randint(len(y), (16,)) for _ in range(RUN_STEPS)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return cross_entropy(model(x[batch]), y[batch])

    return hypergrad.Run(model, optimizer, batches, loss, lambda: cross_entropy(model(val_x), val_y))


def tuned(record: Recorder, quick: bool, *, outer: str, options: dict[str, Any]) -> None:
    hypers: dict[str, Any] = {"lr": hypergrad.Hyperparameter(3e-3), "weight_decay": None}
    options = options | {"outer": outer, "outer_steps": QUICK_OUTER_STEPS if quick else OUTER_STEPS, "progress": False}
    found = hypergrad.tune_run(build, hypers, **keywords(hypergrad.tune_run, options))
    for row in found.history:
        record.add(row)
    names = ("values", "value", "run_equivalents", "best_step", "stats")
    record.add({name: getattr(found, name) for name in names})


def population(record: Recorder, quick: bool, *, cls: Any) -> None:
    models = [net() for _ in range(MEMBERS)]
    for i, model in enumerate(models):
        torch.manual_seed(i)
        for p in model.parameters():
            nn.init.normal_(p, std=0.3)
    numbers = [{"lr": 1e-3 * 4**i, "weight_decay": 1e-3 * 3**i} for i in range(MEMBERS)]
    optimizers = [cls(model.parameters(), **h) for model, h in zip(models, numbers, strict=True)]
    x, y = rows()
    val_x, val_y = rows(5)
    members = hypergrad.Population(
        models,
        optimizers,
        lambda model, batch: cross_entropy(model(batch[0]), batch[1]),
        lambda model: cross_entropy(model(val_x), val_y),
        every=5,
    )
    for _ in range(POPULATION_STEPS):
        picked = torch.randint(len(y), (16,))
        losses = members.step((x[picked], y[picked]))
        record.add({"losses": losses, "values": members.values, "hypergradients": members.hypergradients()})
    members.close()
    record.add({"weights": [weights(model) for model in models]})


CASES = {
    "adam": partial(tuned, outer="adam", options={}),
    "sgd": partial(tuned, outer="sgd", options={"outer_lr": 0.01}),
    "sign_two_seeds": partial(tuned, outer="sign", options={"seeds": (0, 1)}),
    "forward": partial(tuned, outer="adam", options={"mode": "forward", "horizons": (0.5, 1.0), "clip_norm": 1.0}),
    "population_sgd": partial(population, cls=partial(torch.optim.SGD, momentum=0.9)),
    "population_adamw": partial(population, cls=torch.optim.AdamW),
}
