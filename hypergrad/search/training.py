"""A `Run` as an objective: trained by its own optimizer, as in a loop of the user's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hypergrad.core.signatures import call_val_loss, takes_hypers
from hypergrad.differentiate.arguments import as_optimizers
from hypergrad.differentiate.schedule_gradients import Schedules
from hypergrad.optimizers.transition import Transition
from hypergrad.schedules import decay_to_zero
from hypergrad.search.objective import Objective, Pruned, Trial, call_objective
from hypergrad.whole_run.run import Run

REPORTS = 10  # a run is divided into so many parts; after each but the last a pruner gets the validation loss


def is_run(result: Any) -> bool:
    return isinstance(result, Run)


def result_of(objective: Objective, trial: Trial) -> Any:
    """The objective's loss at a trial's values; where it returns a `Run`, that is trained."""
    result = call_objective(objective, trial)
    return train(result, trial, decay=trial.decay) if is_run(result) else result


def train(
    run: Run,
    trial: Trial,
    backward: Callable[[Tensor], None] = Tensor.backward,
    hypers: dict[str, Tensor] | None = None,
    decay: bool = False,
) -> float:
    """Train a run with the values it was built with, and return its validation loss.

    After every tenth of the run a pruner gets the validation loss and may end the run. Gradient evaluations are counted; epochs
    are not.

    Args:
        backward: called with the loss of every batch; `tuner.backward` where a tuner is to move values.
        hypers: tensors that the loss reads; None: the trial's values.
        decay: lr times a short warm-up and a linear decay to zero.
    """
    items, opts = list(run.batches), as_optimizers(run.optimizer)
    if not items:
        raise ValueError("the objective gave a run without batches: give one batch a step.")
    hypers = hypers_of(run, trial.params) if hypers is None else hypers
    rates = [(group, group["lr"]) for opt in opts for group in opt.param_groups] if decay else []
    schedules, transition = schedules_of(run, hypers)
    columns = schedules.evaluate(len(items), transition) if run.schedules else []
    when = tuple(run.val_steps or (len(items),))
    reports = {
        math.ceil(len(items) * i / REPORTS): i for i in range(1, REPORTS)
    }  # completed steps → number of the report
    reports.pop(len(items), None)
    total = 0.0
    for t in range(len(items) + 1):
        value = validation(run.val_loss, t) if t in when or t in reports else 0.0
        total += when.count(t) * value
        if t in reports:
            trial.record(value, reports[t])
            if trial.should_prune():
                raise Pruned
        if t < len(items):
            for opt in opts:
                opt.zero_grad()
            for name in run.schedules or ():
                for group, value in zip(transition.groups, columns[t][name]):
                    group |= {} if value is None else {name: value}
            for group, rate in rates:
                group["lr"] = rate * decay_to_zero(t, len(items))
            backward(loss_of(run, items[t], hypers))
            for opt in opts:
                opt.step()
            trial.count(1)
    return total / len(when)


def validation(val_loss: Callable[..., Tensor], t: int) -> float:
    with torch.no_grad():
        return float(call_val_loss(val_loss, t))


def hypers_of(run: Run, params: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every float among the values as a tensor, for a loss and schedules that read them; none where neither does."""
    if not (takes_hypers(run.loss) or run.schedules):
        return {}
    return {n: torch.tensor(x, dtype=torch.float64) for n, x in params.items() if isinstance(x, float)}


def loss_of(run: Run, batch: Any, hypers: dict[str, Tensor]) -> Tensor:
    return run.loss(run.model, batch, hypers) if hypers and takes_hypers(run.loss) else run.loss(run.model, batch)


def schedules_of(run: Run, hypers: dict[str, Tensor]) -> tuple[Schedules, Transition]:
    transition = Transition(as_optimizers(run.optimizer), frozenset(run.schedules or ()))
    return Schedules(run.schedules or {}, hypers, transition.values()), transition
