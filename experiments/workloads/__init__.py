"""The one table of workloads, used by every experiment.

A plain run of each takes one to two seconds on one thread; `build(seed, full=True)` is a larger version. SGD is with momentum
0.9. To add a workload is to add a row. Experiments run COMPARED, with `--family small` the second family: small sets and wrong
labels (see small.py), with `--family realistic` two larger nets, with `--workloads` the rows that are named.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from experiments.workloads import data, models
from experiments.workloads.realistic import REALISTIC
from experiments.workloads.small import SMALL
from experiments.workloads.task import RUNGS, Batch, Task, Workload, fit, train, train_tuned

__all__ = [
    "COMPARED",
    "FAMILIES",
    "RUNGS",
    "WORKLOADS",
    "Batch",
    "Task",
    "Workload",
    "chosen",
    "fit",
    "train",
    "train_tuned",
]


def _per_user_and_item(model) -> list[dict]:
    return [{"params": [model.users.weight]}, {"params": [model.items.weight]}]


def _hidden_weights(model: nn.Module) -> list[dict]:
    """What Muon is for: the weights between hidden layers, and into the first."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return [{"params": [layer.weight for layer in layers[:-1]]}]


def _all_but_hidden_weights(model: nn.Module) -> list[dict]:
    hidden = {id(p) for p in _hidden_weights(model)[0]["params"]}
    return [{"params": [p for p in model.parameters() if id(p) not in hidden]}]


_ROWS = (
    Workload(
        name="logistic_fashion",
        title="logistic regression, Fashion-MNIST",
        optimizer="SGD",
        data=data.fashion,
        model=lambda data, full: models.mlp(784, 10),
        loss=cross_entropy,
        steps=1500,
        full_steps=10_000,
    ),
    Workload(
        name="mlp_fashion",
        title="MLP 784-50-10, Fashion-MNIST",
        optimizer="SGD",
        data=data.fashion,
        model=lambda data, full: models.mlp(784, 50, 10),
        loss=cross_entropy,
        steps=1200,
        full_steps=10_000,
    ),
    Workload(
        name="cnn_fashion",
        title="CNN with BatchNorm, Fashion-MNIST",
        optimizer="AdamW",
        data=data.small_fashion,
        model=lambda data, full: models.cnn(32 if full else 8, 7 if full else 4),
        loss=cross_entropy,
        steps=600,
        full_steps=5000,
    ),
    Workload(
        name="mlp_mnist1d",
        title="MLP 40-64-64-10, MNIST-1D",
        optimizer="AdamW",
        data=data.mnist1d,
        model=lambda data, full: models.mlp(40, *(2 * [256 if full else 64]), 10),
        loss=cross_entropy,
        steps=1200,
        full_steps=6000,
    ),
    Workload(
        name="cnn_mnist1d",
        title="CNN, MNIST-1D",
        optimizer="SGD",
        data=data.mnist1d,
        model=lambda data, full: models.cnn1d(48 if full else 16),
        loss=cross_entropy,
        steps=1000,
        full_steps=6000,
    ),
    Workload(
        name="gru_mnist1d",
        title="GRU, MNIST-1D",
        optimizer="RMSprop",
        data=data.mnist1d,
        model=lambda data, full: models.GRU(2, 64) if full else models.GRU(4, 24),
        loss=cross_entropy,
        steps=600,
        full_steps=4000,
    ),
    Workload(
        name="mlp_digits",
        title="MLP 64-64-10, digits, a tenth of the labels random",
        optimizer="RMSprop",
        data=data.digits,
        model=lambda data, full: models.mlp(64, 256 if full else 64, 10),
        loss=cross_entropy,
        steps=1200,
        full_steps=6000,
    ),
    Workload(
        name="diabetes",
        title="MLP 10-50-1, diabetes",
        optimizer="SGD",
        data=data.diabetes,
        model=lambda data, full: models.mlp(10, 200 if full else 50, 1),
        loss=mse_loss,
        steps=1500,
        full_steps=6000,
    ),
    Workload(
        name="friedman",
        title="MLP 10-50-1, Friedman 1",
        optimizer="RMSprop",
        data=data.friedman,
        model=lambda data, full: models.mlp(10, 200 if full else 50, 1),
        loss=mse_loss,
        steps=1500,
        full_steps=6000,
    ),
    Workload(
        name="char_gpt",
        title="GPT over characters",
        optimizer="AdamW",
        data=data.characters,
        model=lambda data, full: models.GPT(64, 4, 4) if full else models.GPT(32, 2, 2),
        loss=models.next_character,
        steps=600,
        full_steps=4000,
        batch=8,
    ),
    Workload(
        name="matrix_factorisation",
        title="matrix factorisation, synthetic ratings",
        optimizer="AdamW",
        data=data.ratings,
        model=lambda data, full: models.Factors(400, 200, 16 if full else 8),
        loss=mse_loss,
        steps=1500,
        full_steps=10_000,
        batch=100,
        groups=_per_user_and_item,
    ),
    Workload(
        name="cloning",
        title="behaviour cloning, cart-pole",
        optimizer="RMSprop",
        data=data.expert,
        model=lambda data, full: models.mlp(4, *(2 * [128 if full else 32]), 1),
        loss=mse_loss,
        steps=1200,
        full_steps=6000,
    ),
    Workload(
        name="muon_mnist1d",
        title="MLP 40-64-64-10, MNIST-1D, Muon on hidden weights, AdamW on the rest",
        optimizer="Muon",
        data=data.mnist1d,
        model=lambda data, full: models.mlp(40, *(2 * [256 if full else 64]), 10),
        loss=cross_entropy,
        steps=1200,
        full_steps=6000,
        groups=_hidden_weights,
        by_adamw=_all_but_hidden_weights,
    ),
)
WORKLOADS: dict[str, Workload] = {row.name: row for row in (*_ROWS, *SMALL, *REALISTIC)}
# The twelve that tables and means are over. Rivals and searches have no variant of Muon's, whose results stand by themselves.
COMPARED = tuple(row.name for row in _ROWS if row.optimizer != "Muon")
FAMILIES: dict[str, tuple[str, ...]] = {"main": COMPARED, "small": tuple(row.name for row in SMALL)}
FAMILIES["realistic"] = tuple(row.name for row in REALISTIC)
_QUICK = {
    "main": ("mlp_digits", "diabetes"),
    "small": ("breast_cancer_60", "diabetes_100"),
    "realistic": ("gpt_text",),
}  # what --quick runs


def chosen(args: Any) -> tuple[str, tuple[str, ...]]:
    """The family and the names of the workloads that an experiment's `--workloads`, `--family` and `--quick` ask for.

    Raises:
        SystemExit: saying what to choose from.
    """
    if args.family not in FAMILIES:
        raise SystemExit(f"--family: unknown {args.family}; choose from {', '.join(FAMILIES)}")
    if not args.workloads:
        return args.family, (_QUICK if args.quick else FAMILIES)[args.family]
    unknown = [name for name in args.workloads if name not in WORKLOADS]
    if unknown:
        raise SystemExit(f"--workloads: unknown {', '.join(unknown)}; choose from {', '.join(WORKLOADS)}")
    families = dict.fromkeys(WORKLOADS[name].family for name in args.workloads)
    if len(families) > 1:
        raise SystemExit(f"--workloads: of one family a call, got {' and '.join(families)}")
    return next(iter(families)), args.workloads
