"""A training run as an objective: trained by its own optimizer, as the user would."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hypergrad.exact import as_optimizers
from hypergrad.problem import takes_step
from hypergrad.run_evaluations import Run
from hypergrad.search.objective import Pruned, Trial

LOOKS = 10  # validation losses that a run reports to a pruner on its way


def is_run(result: Any) -> bool:
    return isinstance(result, Run)


def train(run: Run, trial: Trial) -> float:
    """Train a run with the values it was built with; its validation loss.

    A pruner sees the validation loss at every tenth of the run, and may end it. Gradient evaluations are counted, epochs are not.
    """
    items, opts = list(run.batches), as_optimizers(run.optimizer)
    if not items:
        raise ValueError("the objective gave a run without batches: give one batch a step.")
    extra = loss_hypers(run.loss, trial.params)
    when = tuple(run.val_steps or (len(items),))
    looks = {math.ceil(len(items) * i / LOOKS): i for i in range(1, LOOKS)}
    looks.pop(len(items), None)
    total = 0.0
    for t in range(len(items) + 1):
        value = validation(run.val_loss, t) if t in when or t in looks else 0.0
        total += when.count(t) * value
        if t in looks:
            trial.look(value, looks[t])
            if trial.should_prune():
                raise Pruned
        if t < len(items):
            for opt in opts:
                opt.zero_grad()
            run.loss(run.model, items[t], *extra).backward()
            for opt in opts:
                opt.step()
            trial.count(1)
    return total / len(when)


def validation(val_loss: Callable[..., Tensor], t: int) -> float:
    with torch.no_grad():
        return float(val_loss(t) if takes_step(val_loss) else val_loss())


def loss_hypers(loss: Callable[..., Any], params: Mapping[str, Any]) -> tuple[dict[str, Tensor], ...]:
    """The third argument of a loss that takes one: every number among the values, as tensors."""
    takes = [p for p in inspect.signature(loss).parameters.values() if p.kind is not p.KEYWORD_ONLY]
    if len(takes) <= 2 and not any(p.kind is p.VAR_POSITIONAL for p in takes):
        return ()
    return ({n: torch.tensor(float(x)) for n, x in params.items() if isinstance(x, float)},)
