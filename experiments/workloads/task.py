"""What a workload is, and the two ways of training it: plain, and tuned by hypergrad.

Terms: a *rung* is a fraction of the run at which the whole validation set is read; L is the workload's loss.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import hypergrad
from experiments.datasets import Data
from experiments.flops import gradient_evaluations

RUNGS = {"val_16th": 16, "val_8th": 8, "val_4th": 4, "val_half": 2, "val": 1}  # after steps / number
VAL_BATCH = 250  # examples of one val_loss(); smaller validation sets are taken whole
EVAL_BATCH = 2500  # examples of one forward pass of evaluate()
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda groups, **hyper: torch.optim.SGD(groups, momentum=0.9, **hyper),
    "SGD, momentum 0.5": lambda groups, **hyper: torch.optim.SGD(groups, momentum=0.5, **hyper),
    "AdamW": torch.optim.AdamW,
    "RMSprop": torch.optim.RMSprop,
    # the step scaled to AdamW's size, so that one lr suits both of the optimizers (arXiv 2502.16982, section 2.2)
    "Muon": lambda groups, **hyper: torch.optim.Muon(groups, adjust_lr_fn="match_rms_adamw", **hyper),
}
Batch = tuple[Tensor, Tensor]
Disturb = Callable[[int, Batch], tuple[Batch, float]]


@dataclass(frozen=True)
class Workload:
    """One row of the table: a data set, a model, a loss and an optimizer.

    Attributes:
        optimizer: a name of OPTIMIZERS; all of its numbers except lr and weight decay are fixed there.
        data: `data(full)`: fixed data and splits; `full` asks for the larger version.
        model: `model(data, full)`: a fresh model, initialised from torch's global random numbers.
        loss: `loss(outputs, targets)` → scalar.
        augment: `augment(inputs, draws)`: a training batch's inputs, changed at random; None: as they are.
        groups: `groups(model)` → the param groups; one group of all parameters where None.
        by_adamw: `by_adamw(model)` → param groups that an AdamW beside the optimizer takes; no second optimizer where None.
        family: a name of FAMILIES: the workloads that are run together, with pools of their own.
    """

    name: str
    title: str
    optimizer: str
    data: Callable[[bool], Data]
    model: Callable[[Data, bool], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    steps: int
    full_steps: int
    batch: int = 50
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None
    groups: Callable[[nn.Module], list[dict[str, Any]]] | None = None
    by_adamw: Callable[[nn.Module], list[dict[str, Any]]] | None = None
    family: str = "main"

    def build(self, seed: int, full: bool = False, steps: int | None = None) -> Task:
        """One run's model and batches; `seed` decides the initialisation and the order of the batches."""
        data = self.data(full)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.model(data, full)
        return Task(self, data, model, seed, self.length(full, steps))

    def length(self, full: bool = False, steps: int | None = None) -> int:
        """Training steps of one run: `steps`, or the workload's own where that is 0 or None."""
        return steps or (self.full_steps if full else self.steps)


@dataclass
class Task:
    """A workload about to be trained once."""

    workload: Workload
    data: Data
    model: nn.Module
    seed: int
    steps: int

    def make_optimizer(self, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.workload.optimizer](self.param_groups(), lr=lr, weight_decay=weight_decay)

    def make_optimizers(self, lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
        """The workload's optimizer, and the AdamW beside it where there is one: the same numbers for both."""
        rest = self.workload.by_adamw(self.model) if self.workload.by_adamw else []
        beside = [torch.optim.AdamW(rest, lr=lr, weight_decay=weight_decay)] if rest else []
        return [self.make_optimizer(lr, weight_decay), *beside]

    def param_groups(self) -> list[dict[str, Any]]:
        return self.workload.groups(self.model) if self.workload.groups else [{"params": [*self.model.parameters()]}]

    def batches(self) -> Iterator[Batch]:
        """`steps` batches, epoch after epoch in an order of this task's own seed; an epoch's odd end is left out."""
        x, y = self.data.train
        size, draws = min(self.workload.batch, len(y)), torch.Generator().manual_seed(self.seed)
        per_epoch, order = len(y) // size, torch.empty(0)
        for step in range(self.steps):
            at = step % per_epoch * size
            if at == 0:
                order = torch.randperm(len(y), generator=draws)
            inputs = x[order[at : at + size]]
            yield self.workload.augment(inputs, draws) if self.workload.augment else inputs, y[order[at : at + size]]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.workload.loss(model(batch[0]), batch[1])

    def val_loss(self) -> Tensor:
        """L on a validation batch drawn with torch's global random numbers, the model in the mode that it is in."""
        x, y = self.data.val
        if len(y) <= 2 * VAL_BATCH:
            return self.loss(self.model, (x, y))
        picked = torch.randint(len(y), (VAL_BATCH,))
        return self.loss(self.model, (x[picked], y[picked]))

    @torch.no_grad()
    def evaluate(self, split: str) -> float:
        """L on all of "val" or "test", in eval mode; the model's mode is put back."""
        x, y = getattr(self.data, split)
        training = self.model.training
        self.model.eval()
        chunks = zip(x.split(EVAL_BATCH), y.split(EVAL_BATCH))
        total = sum(self.loss(self.model, chunk).item() * len(chunk[1]) for chunk in chunks)
        self.model.train(training)
        return total / len(y)


def train(task: Task, lr: float, weight_decay: float, *, decay: bool = True, initial: bool = False) -> dict[str, Any]:
    """The plain run: fixed values, lr decaying linearly to zero (constant without `decay`).

    Returns:
        The validation loss at every rung of RUNGS, `test` after the last step, `seconds` of training; with `initial` also
        `initial_val` and `initial_test`. A run whose training loss stops being finite ends there; what it lacks is NaN.
    """
    before = {f"initial_{split}": task.evaluate(split) for split in ("val", "test")} if initial else {}
    optimizers = task.make_optimizers(lr, weight_decay)
    linear = torch.optim.lr_scheduler.LinearLR
    schedules = [linear(optimizer, 1.0, 0.0, total_iters=task.steps) for optimizer in optimizers] if decay else []

    def after_step() -> None:
        for schedule in schedules:
            schedule.step()

    return before | fit(task, optimizers, Tensor.backward, after_step)


def train_tuned(
    task: Task,
    lr: float,
    weight_decay: float,
    tune: Sequence[str] = ("lr", "weight_decay"),
    disturb: Disturb | None = None,
    after_step: Callable[[], None] | None = None,
    at_best: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """The same run with a `hypergrad.Tuner`, which brings its own shape of lr; `options` go to it.

    Args:
        disturb, after_step: as in `fit`.
        at_best: evaluate also the weights of `tuner.best()`, as `best_val` and `best_test`; None where a tuner has no `best`.

    Returns:
        What `train` returns; `end_lr`, `end_weight_decay`, … (the geometric mean over param groups); `gradient_evaluations`,
        `rollbacks` and steps `passed_over`.
    """
    optimizers = task.make_optimizers(lr, weight_decay)
    options = {"total_steps": task.steps, "seed": task.seed} | options
    tuner = hypergrad.Tuner(task.model, optimizers, task.val_loss, tune=tune, **options)
    row = fit(task, optimizers, tuner.backward, after_step, to_the_end=True, disturb=disturb)
    row |= _at_best(task, tuner) if at_best else {}
    ended = {f"end_{name}": values.log().mean().exp().item() for name, values in tuner.values.items()}
    tuner.close()
    stats = tuner.stats
    counts = {"rollbacks": stats["rollbacks"], "passed_over": stats["nonfinite_steps"] + stats["spikes"]}
    return row | ended | {"gradient_evaluations": gradient_evaluations(stats)} | counts


def _at_best(task: Task, tuner: hypergrad.Tuner) -> dict[str, float | None]:
    best = getattr(tuner, "best", None)
    if best is None:
        return {"best_val": None, "best_test": None}
    with best():
        return {f"best_{split}": task.evaluate(split) for split in ("val", "test")}


def fit(
    task: Task,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    backward: Callable[[Tensor], None],
    after_step: Callable[[], None] | None = None,
    to_the_end: bool = False,
    disturb: Disturb | None = None,
) -> dict[str, Any]:
    """The training loop of every experiment on workloads: what `train` returns, for any optimizer (or several) and `backward`.

    Args:
        to_the_end: go on after a loss that is not finite (where something rolls it back).
        disturb: (step from 1, batch) → the batch in its place, and a factor on its loss.
    """
    optimizers = optimizer if isinstance(optimizer, Sequence) else (optimizer,)
    model, at = task.model, {name: max(task.steps // part, 1) for name, part in RUNGS.items()}
    row = dict.fromkeys([*RUNGS, "test"], math.nan)
    seconds, began = 0.0, time.perf_counter()
    for step, batch in enumerate(task.batches(), start=1):
        batch, factor = disturb(step, batch) if disturb else (batch, 1.0)
        loss = task.loss(model, batch)
        loss = loss if factor == 1 else factor * loss
        for each in optimizers:
            each.zero_grad()
        backward(loss)
        for each in optimizers:
            each.step()
        if after_step:
            after_step()
        if not (to_the_end or math.isfinite(loss.item())):
            break
        if step in at.values():
            seconds += time.perf_counter() - began
            val = task.evaluate("val")
            row |= {name: val for name, rung in at.items() if rung == step}
            began = time.perf_counter()
    else:
        row["test"] = task.evaluate("test")
    return row | {"seconds": round(seconds, 3)}
