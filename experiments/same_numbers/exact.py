"""Exact hypergradients of twelve steps of a small net in float64: every mode with every update rule, and every option."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hypergrad
from experiments.same_numbers.names import keywords, public
from experiments.same_numbers.nets import SignedMean, linear, net, rows
from experiments.same_numbers.record import Recorder, Skip

STEPS, BEFORE, BATCH = 12, 3, 16  # steps that are differentiated; steps before them
ADAM = {"lr": 0.02, "weight_decay": 0.02, "betas": (0.8, 0.9), "eps": 1e-2}
OF_ADAM = ("lr", "weight_decay", "betas", "eps")


@dataclass(frozen=True)
class Rule:
    """An optimizer: its class by dotted name or itself, its numbers, and what it is differentiated in."""

    cls: Any
    numbers: Mapping[str, Any]
    wrt: tuple[str, ...]
    coupled: bool = True  # weight decay is a penalty, as the implicit mode's minimum needs

    def make(self, model: nn.Module) -> torch.optim.Optimizer:
        """Two param groups, the second of half the lr."""
        cls = self.cls
        if isinstance(cls, str):
            module, _, name = cls.rpartition(".")
            try:
                cls = getattr(importlib.import_module(module), name)
            except ImportError as error:
                raise Skip(f"{module} is not installed") from error
        params = [*model.parameters()]
        half = len(params) // 2
        groups = [{"params": params[:half]}, {"params": params[half:], "lr": self.numbers["lr"] / 2}]
        return cls(groups, **self.numbers)


_SGD = {"lr": 0.2, "weight_decay": 0.02, "momentum": 0.8}
_RMS = {"lr": 0.02, "weight_decay": 0.02, "alpha": 0.8, "eps": 1e-2}
_ADAGRAD = {"lr": 0.1, "weight_decay": 0.02, "lr_decay": 0.1, "eps": 1e-2, "initial_accumulator_value": 0.05}
_FACTOR = {"lr": 0.05, "weight_decay": 0.1, "beta2_decay": -0.8, "d": 1.2}
_LION = {"lr": 0.02, "weight_decay": 0.1, "betas": (0.8, 0.9)}
_OPT = torch.optim
RULES: dict[str, Rule] = {
    "sgd": Rule(_OPT.SGD, {"lr": 0.2}, ("lr", "weight_decay")),
    "momentum": Rule(_OPT.SGD, _SGD, ("lr", "weight_decay", "momentum", "dampening")),
    "nesterov": Rule(_OPT.SGD, _SGD | {"nesterov": True}, ("lr", "weight_decay", "momentum")),
    "adam": Rule(_OPT.Adam, ADAM, OF_ADAM),
    "adam_amsgrad": Rule(_OPT.Adam, ADAM | {"amsgrad": True}, OF_ADAM),
    "adamw": Rule(_OPT.AdamW, ADAM, OF_ADAM, coupled=False),
    "rmsprop": Rule(_OPT.RMSprop, _RMS | {"momentum": 0.7}, ("lr", "weight_decay", "alpha", "eps", "momentum")),
    "rmsprop_centered": Rule(_OPT.RMSprop, _RMS | {"centered": True}, ("lr", "weight_decay", "alpha", "eps")),
    "adagrad": Rule(_OPT.Adagrad, _ADAGRAD, ("lr", "weight_decay", "lr_decay", "eps")),
    "adamax": Rule(_OPT.Adamax, ADAM, OF_ADAM),
    "nadam": Rule(_OPT.NAdam, ADAM | {"momentum_decay": 0.1}, (*OF_ADAM, "momentum_decay")),
    "radam": Rule(_OPT.RAdam, ADAM, OF_ADAM),
    "adadelta": Rule(
        _OPT.Adadelta,
        {"lr": 0.5, "weight_decay": 0.02, "rho": 0.8, "eps": 1e-2},
        ("lr", "weight_decay", "rho", "eps"),
    ),
    "adafactor": Rule(_OPT.Adafactor, _FACTOR, ("lr", "weight_decay", "beta2_decay", "d"), coupled=False),
    "muon": Rule(
        _OPT.Muon,
        {"lr": 0.05, "weight_decay": 0.1, "momentum": 0.8},
        ("lr", "weight_decay", "momentum", "ns_coefficients"),
        coupled=False,
    ),
    "lion": Rule("pytorch_optimizer.Lion", _LION, ("lr", "weight_decay", "betas"), coupled=False),
    "lion_pytorch": Rule("lion_pytorch.Lion", _LION, ("lr", "weight_decay", "betas"), coupled=False),
    "lamb": Rule("pytorch_optimizer.Lamb", ADAM, OF_ADAM, coupled=False),
    "own": Rule(SignedMean, {"lr": 0.02, "weight_decay": 0.02}, ("lr", "weight_decay", "beta"), coupled=False),
}


def knots(t: int, h: Any) -> Tensor:
    return public("schedules").knots(t / STEPS, h["knots"])


def warmup_decay(t: int, h: Any) -> Tensor:
    return public("schedules").warmup_decay(t / STEPS, h["peak"], 0.25, 0.01, "cosine")


@dataclass(frozen=True)
class Exact:
    """One call of `hypergradient`.

    Attributes:
        options: its further arguments.
        penalty: the loss reads a tensor.
        solver: a name in hypergrad.solvers.
    """

    rule: str
    mode: str
    wrt: Sequence[str] | None = None  # None: all of the rule
    options: Mapping[str, Any] = field(default_factory=dict)
    penalty: bool = False
    solver: str | None = None

    @property
    def at_minimum(self) -> bool:
        """Whether the loss must have a minimum: it is that of a linear model then."""
        return self.mode == "implicit" and "look_back" not in self.options

    def __call__(self, record: Recorder, quick: bool) -> None:
        options = dict(self.options)
        if options.get("compile") and not (shutil.which("c++") or shutil.which("g++")):
            raise Skip("there is no C++ compiler")
        if self.solver:
            options["solver"] = getattr(hypergrad.solvers, self.solver)
        row = RULES[self.rule]
        model = (linear() if self.at_minimum else net(bias="muon" not in self.rule)).double()
        x, y = rows(0, torch.float64)
        val_x, val_y = rows(5, torch.float64)
        optimizer = row.make(model)
        picked = [torch.randint(len(y), (BATCH,)) for _ in range(STEPS + BEFORE)]
        batches = [(x[i], y[i]) for i in picked]

        def loss(model: nn.Module, batch: Any, hypers: Any = None) -> Tensor:
            out = cross_entropy(model(batch[0]), batch[1])
            if hypers and "penalty" in hypers:
                out = out + hypers["penalty"] * sum(p.square().sum() for p in model.parameters())
            return out

        for batch in batches[:BEFORE]:
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
        if self.penalty:
            options["hypers"] = {"penalty": torch.tensor(0.01, dtype=torch.float64)} | options.get("hypers", {})
        result = hypergrad.hypergradient(
            model,
            optimizer,
            loss,
            batches[BEFORE:],
            lambda: cross_entropy(model(val_x), val_y),
            self.wrt or row.wrt,
            self.mode,
            **keywords(hypergrad.hypergradient, options),
        )
        found = {name: getattr(result, name) for name in ("value", "gradients", "initial", "stats")}
        record.add(found | {"weights": [*model.parameters()]})


PENALTY = ("weight_decay", "penalty")
MANY = ("lr", "weight_decay", "momentum")
LR_KNOTS = {"hypers": {"knots": torch.tensor([0.05, 0.2, 0.1], dtype=torch.float64)}, "schedules": {"lr": knots}}
LR_PEAK = {"hypers": {"peak": torch.tensor(0.2, dtype=torch.float64)}, "schedules": {"lr": warmup_decay}}

OPTIONS: dict[str, Exact] = {
    "unrolled_every": Exact("adam", "unrolled", options={"every": 4}),
    "unrolled_every_step": Exact("momentum", "unrolled", options={"every": 1}),
    "unrolled_no_graphs": Exact("momentum", "unrolled", options={"graph_memory": 0}),
    "unrolled_host": Exact("momentum", "unrolled", options={"offload": "host", "every": 3}),
    "unrolled_disk": Exact("adamw", "unrolled", options={"offload": "disk"}),
    "unrolled_below": Exact("sgd", "unrolled", options={"below": 0.0}),
    "unrolled_val_steps": Exact("adam", "unrolled", options={"val_steps": (0, 6, 6, 12)}),
    "implicit_cg_penalty": Exact("momentum", "implicit", PENALTY, penalty=True),
    "implicit_neumann": Exact("momentum", "implicit", ("weight_decay",), solver="neumann"),
    "implicit_nystrom": Exact("adam", "implicit", ("weight_decay",), solver="nystrom"),
    "unrolled_compiled": Exact("momentum", "unrolled", options={"compile": True}),
    "forward_compiled": Exact("adam", "forward", options={"compile": True}),
} | {
    f"{mode}_{name}": case
    for mode in ("forward", "unrolled")
    for name, case in {
        "clip_norm": Exact("adam", mode, (*OF_ADAM, "clip_norm"), {"clip_norm": 0.5}),
        "clip_value": Exact("momentum", mode, (*MANY, "clip_value"), {"clip_value": 0.02}),
        "ema": Exact("adamw", mode, (*OF_ADAM, "ema"), {"ema": 0.8}),
        "per_step": Exact("momentum", mode, MANY, {"per_step": True}),
        "per_parameter": Exact("adam", mode, ("lr", "weight_decay"), {"per": "parameter"}),
        "per_element": Exact("sgd", mode, ("lr",), {"per": "element"}),
        "penalty": Exact("momentum", mode, PENALTY, penalty=True),
        "knots": Exact("momentum", mode, ("knots", "weight_decay"), LR_KNOTS),
        "warmup_decay": Exact("adam", mode, ("peak",), LR_PEAK),
    }.items()
}

CASES: dict[str, Exact] = {f"{mode}_{rule}": Exact(rule, mode) for mode in ("forward", "unrolled") for rule in RULES}
CASES |= {f"look_back_{rule}": Exact(rule, "implicit", options={"look_back": 6}) for rule in RULES}
CASES |= {f"implicit_{name}": Exact(name, "implicit", ("weight_decay",)) for name, row in RULES.items() if row.coupled}
CASES |= OPTIONS
SLOW = {name for name, case in CASES.items() if case.options.get("compile")}
