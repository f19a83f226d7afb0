"""The parts of a tuner, made and put together once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hypergrad.core.hyperparameters import as_hyperparameter
from hypergrad.core.problem import Problem
from hypergrad.logging import Journal
from hypergrad.online.best_weights import BestWeights
from hypergrad.online.hyper_step import HyperSteps
from hypergrad.online.hyper_vector import HyperVector
from hypergrad.online.loop import OnlineLoop
from hypergrad.online.low_rank_hessian import LowRankHessian
from hypergrad.online.lr_searches import LrSearches
from hypergrad.online.outer_optimizer import OuterOptimizer
from hypergrad.online.param_groups import ParamGroupWriter
from hypergrad.online.policies.backtracking import Backtracking
from hypergrad.online.policies.divergence_guard import DivergenceGuard
from hypergrad.online.policies.lr_warm_start import LrWarmStart
from hypergrad.online.policies.phases import Phases
from hypergrad.online.policies.policy import Policy, find
from hypergrad.online.progress import Progress
from hypergrad.online.recovery import Recovery
from hypergrad.online.replay_window import ReplayWindow
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
    "nonfinite_steps",
    "spikes",
    "nonfinite_hypergradients",
    "rollbacks",
    "backtracks",
    "false_alarms",
    "capped",
)


@dataclass(frozen=True)
class Options:
    """Arguments of a tuner, as in `Tuner`, that its parts read."""

    mode: str
    horizon: int
    every: int
    hyper_lr: float
    total_steps: int | None
    average: bool
    warm_start: bool
    curvature: str
    seed: int


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
    hypers: Mapping[str, Any] | None,
    options: Options,
    clip: tuple[str | None, float],
    scaler: Any,
    log_dir: str | Path | None,
    keep_best: bool,
    policies: Sequence[Policy],
) -> Parts:
    """The parts of a tuner; nothing of the user's is changed.

    Args:
        written: name → what the user wrote for it, for names of param groups.
        hypers: the same for tensors in the loss.
    """
    spec = {name: as_hyperparameter(name, x) for name, x in written.items()}
    of_loss = {name: as_hyperparameter(name, x) for name, x in (hypers or {}).items()}
    vector = HyperVector(transition, spec, of_loss, problem.hypers)
    forward, total = options.mode == "forward", options.total_steps
    writer = ParamGroupWriter(transition, vector, total)
    before, notes = _try(problem, val_loss, forward)
    starts_are_hints = options.warm_start and forward and writer.writes_lr_alone()
    search = LrSearches(find(policies, LrWarmStart), starts_are_hints)
    low_rank = LowRankHessian(search) if options.curvature == "free" else None
    tangents = Tangents(transition, vector, problem.model, scaler, clip, low_rank)
    outer = OuterOptimizer(vector, policies, options.hyper_lr)
    counts: dict[str, int] = dict.fromkeys(COUNTED, 0)
    journal = Journal(log_dir, _recorded(vector, transition, options))
    record, back = None, find(policies, Backtracking)
    if back and forward and any(e.name == "lr" and e.group is not None for e in vector.entries):
        record = back.start(transition, problem, before, total)
    best = BestWeights(transition, problem) if keep_best else None
    if best is not None:
        best.read(0, before)
    progress = Progress(journal, outer, best, counts)
    hyper = HyperSteps(
        problem, outer, tangents, progress, val_loss, options.average, options.seed, best, record, counts
    )
    guard = find(policies, DivergenceGuard)
    judge = None if guard is None else guard.start(transition, problem, before)
    recovery = Recovery(judge, problem, outer, tangents, journal, counts)
    watch = StartWatch(search.common.policy, problem, transition, search.active and not transition.maximizes)
    starts = Starts(policies, search, watch, outer, tangents, writer, journal, total, starts_are_hints)
    loop = OnlineLoop(hyper, writer, starts, recovery, find(policies, Phases), options.mode, options.every, total)
    return Parts(loop, ReplayWindow(loop, options.horizon), [*vector.notes, *notes])


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


def _try(problem: Problem, val_loss: Callable[..., Tensor], forward: bool) -> tuple[float, list[str]]:
    """Call the validation loss once, so that a wrong one is said before anything starts. Its value, and notes."""
    try:
        value = float(problem.validate(val_loss, 0).value)
    except NameError:  # it reads the tuner, which does not exist yet
        return math.nan, []
    problem.follow_running_stats(val_loss, 0)
    if problem.stats is None or not forward:
        return value, []
    problem.stop_following_running_stats()
    return value, [
        "val_loss runs BatchNorm in eval mode: the path from weights to running statistics is not part of the hypergradients "
        "that tuner.backward carries along. Validate in train mode, or use tuner.step with mode='unrolled', which has it."
    ]
