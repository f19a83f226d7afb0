"""The parts of a tuner, made and put together once."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import Module

from hypergrad.core.hyperparameters import as_hyperparameter
from hypergrad.core.multi_tensor import norms
from hypergrad.core.problem import Problem
from hypergrad.logging import Journal
from hypergrad.online.best_weights import BestWeights
from hypergrad.online.calibration import Calibration
from hypergrad.online.cost_bound import CostBound
from hypergrad.online.first_step_checks import FirstStepChecks
from hypergrad.online.hyper_step import HyperSteps
from hypergrad.online.hyper_vector import HyperVector
from hypergrad.online.loop import OnlineLoop
from hypergrad.online.lr_searches import LrSearches
from hypergrad.online.outer_optimizer import OuterOptimizer
from hypergrad.online.param_groups import ParamGroupWriter
from hypergrad.online.plan import Plan, tangents_price
from hypergrad.online.policies.backtracking import Backtracking
from hypergrad.online.policies.divergence_guard import DivergenceGuard
from hypergrad.online.policies.lr_warm_start import LrWarmStart
from hypergrad.online.policies.phases import Phases
from hypergrad.online.policies.policy import Policy, find
from hypergrad.online.progress import Progress
from hypergrad.online.recipe import recipe_of
from hypergrad.online.recovery import Recovery
from hypergrad.online.replay_window import ReplayWindow
from hypergrad.online.settled_values import SettledValues
from hypergrad.online.start_watch import StartWatch
from hypergrad.online.starts import Starts
from hypergrad.online.tangents import Tangents
from hypergrad.optimizers.transition import Transition

COUNTED = (
    "steps",
    "hyper_steps",
    "val_evaluations",
    "gradients",
    "hessian_products",
    "plain_steps",
    "changed_gradients",
    "repeated_steps",
    "written_weights",
    "nonfinite_steps",
    "spikes",
    "nonfinite_hypergradients",
    "rollbacks",
    "backtracks",
    "false_alarms",
    "capped",
    "nonfinite_products",
)


@dataclass(frozen=True)
class Options:
    """Arguments of a tuner, as in `Tuner`, that its parts read."""

    mode: str
    horizon: int
    every: int
    every_is_fixed: bool
    hyper_lr: float
    total_steps: int | None
    average: bool
    warm_start: bool
    seed: int
    cost: float | None
    plan: Plan | None


@dataclass(frozen=True)
class Parts:
    """What is made of them."""

    loop: OnlineLoop
    window: ReplayWindow
    notes: list[str]  # sentences for the user


def build(
    problem: Problem,
    transition: Transition,
    val_loss: Callable[..., Tensor],
    written: Mapping[str, Any],
    options: Options,
    clip: tuple[str | None, float],
    scaler: Any,
    log_dir: str | Path | None,
    on_log: Callable[[dict[str, float], int], object] | None,
    keep_best: bool,
    policies: Sequence[Policy],
) -> Parts:
    """The parts of a tuner; nothing of the user's is changed.

    Args:
        written: name → what the user wrote for it, for names of param groups.
    """
    spec = {name: as_hyperparameter(name, x) for name, x in written.items()}
    vector = HyperVector(transition, spec, problem.loss_tensors.specs, problem.hypers)
    same = (
        replace(options, seed=0),
        vector.labels,
        vector.value.tolist(),
    )  # each rank has a stream of its own whatever the seed
    problem.processes.check_same("the arguments of a Tuner, and its values,", same)
    forward, total = options.mode == "forward", options.total_steps
    writer = ParamGroupWriter(transition, vector, total)
    before = _try(problem, val_loss)
    if not forward:
        problem.check_running_stats()
    starts_are_hints = options.warm_start and forward and writer.writes_lr_from_groups()
    search = LrSearches(find(policies, LrWarmStart), starts_are_hints)
    processes = problem.processes
    wanted = forward and (options.cost is not None or options.plan is not None)
    price = tangents_price(len(transition.slot_names))
    calibration = Calibration(problem.device, wanted, options.plan is not None, price)
    tangents = Tangents(transition, vector, problem, scaler, clip, calibration, processes)
    outer = OuterOptimizer(vector, policies, options.hyper_lr)
    counts: dict[str, int] = dict.fromkeys(COUNTED, 0)
    journal = Journal(log_dir, _recorded(vector, transition, options), on_log, processes.rank > 0)
    phases = find(policies, Phases)
    numbers = Counter(entry.name for entry in vector.entries)
    mean = (float(len(vector)), 1.0) if phases is None else phases.in_the_mean(total, numbers, vector.hypers)
    bound = CostBound(
        options.cost, options.plan, options.every, options.every_is_fixed, total, mean, calibration, journal, processes
    )
    record, back = None, find(policies, Backtracking)
    if back and forward and any(e.name == "lr" and e.group is not None for e in vector.entries):
        record = back.start(transition, problem, before, total)
    best = BestWeights(transition, problem) if keep_best else None
    if best is not None:
        best.read(0, before)
    settled = SettledValues(writer, counts)
    recipe = partial(recipe_of, problem.model, writer, settled, counts)
    progress = Progress(journal, outer, writer, best, counts, settled, recipe, replays=not forward)
    hyper = HyperSteps(
        problem, outer, tangents, progress, val_loss, options.average, options.seed, best, record, counts
    )
    guard = find(policies, DivergenceGuard)
    judge = None if guard is None else guard.start(transition, problem, before)
    recovery = Recovery(judge, problem, outer, tangents, journal, counts)
    watch = StartWatch(search.common.policy, problem, transition, search.active and not transition.maximizes)
    starts = Starts(policies, search, watch, outer, tangents, writer, journal, total, starts_are_hints)
    checks = FirstStepChecks(hyper, not math.isnan(before), forward)
    loop = OnlineLoop(
        hyper,
        writer,
        starts,
        recovery,
        find(policies, Phases),
        checks,
        options.mode,
        options.every,
        total,
        bound,
    )
    return Parts(loop, ReplayWindow(loop, options.horizon), [*vector.notes, *writer.take_notes()])


def _recorded(vector: HyperVector, transition: Transition, options: Options) -> dict[str, Any]:
    """What is written down with a run of how it began."""
    starts = {f"{label} start": x for label, x in zip(vector.labels, vector.value.tolist(), strict=True)}
    kinds = ", ".join(type(opt).__name__ for opt in transition.optimizers)
    return {
        "optimizer": kinds,
        "mode": options.mode,
        "every": options.every,
        "hyper_lr": options.hyper_lr,
        "seed": options.seed,
        **starts,
    }


def _try(problem: Problem, val_loss: Callable[..., Tensor]) -> float:
    """Call the validation loss once, so that a wrong one is said before anything starts. Its value; NaN where it cannot yet."""
    held = list({id(p): p for p in [*problem.params, *problem.model.parameters()]}.values())
    sizes = norms(held, 1)
    try:
        value = float(problem.processes.mean(problem.validate(val_loss, 0).value))
    except NameError:  # it reads the tuner, which does not exist yet
        return math.nan
    _check_unchanged(problem.model, held, sizes)
    problem.follow_running_stats(val_loss, 0)
    return value


def _check_unchanged(model: Module, held: Sequence[Tensor], sizes: Tensor) -> None:
    """Raise where parameters are not of the sizes that they had."""
    now, names = norms(held, 1), {id(p): name for name, p in model.named_parameters()}
    other = ((now != sizes) & ~(now.isnan() & sizes.isnan())).tolist()
    changed = [names.get(id(p), "of the optimizer") for p, flag in zip(held, other, strict=True) if flag]
    if changed:
        raise ValueError(
            f"val_loss changes parameters ({', '.join(changed[:4])}): it is called between training steps, and must leave them "
            "as it finds them. Guard what the model updates by itself, such as a momentum encoder, with `if self.training`, and "
            "call model.eval() in val_loss."
        )
