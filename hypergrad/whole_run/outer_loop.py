"""The outer loop of `tune_run`: at which φ and horizon the next evaluation is, and what is kept of the last ones."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hypergrad.core.shown import rounded, shown_dict
from hypergrad.core.user_warnings import warn_user
from hypergrad.whole_run.run_objective import Evaluation, WholeRunObjective
from hypergrad.whole_run.step_rules import OuterSteps, Point, listed, vector

CARRIED = 2.0  # the first step at a horizon over the last step at the horizon before it; at most the very first step
LR_CUT = math.log(10)  # by which log lr is lowered where the value or hypergradient of the start is not finite


@dataclass(repr=False)
class RunResult:
    """The result of `tune_run`. Printed, its history is left out.

    Attributes:
        values: name → tensor, shape [n_groups] for names of param groups, the tensor's own for those in the loss. The best at the
            last horizon; never NaN.
        value: the objective there, NaN where no run of the last horizon ended finite.
        history: a row an outer step: step, horizon, value, seed_values, best (whether it was the best so far at its horizon),
            size (of the step that led away from it, in that of the first), gradient_norm (of dL/dφ; None where it was not
            needed, or not finite), values, run_equivalents (so far). Values of different horizons are different objectives:
            compare within one.
        run_equivalents: cost of all of it in plain whole runs: (gradients + 2 × Hessian products) over steps of the run.
        best_step: the row of `history` with `values`.
        stats: steps (of the whole run), seconds, gradient_evaluations, hessian_products, halvings, not_finite (evaluations),
            stopped (why it ended), warnings (sentences).
    """

    values: dict[str, Tensor]
    value: float
    history: list[dict[str, Any]]
    run_equivalents: float
    best_step: int
    stats: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return (
            f"RunResult(values={shown_dict(self.values)}, value={self.value:.6g}, run_equivalents={self.run_equivalents:.6g}, "
            f"best_step={self.best_step}, stats={rounded(self.stats)})"
        )


class OuterLoop:
    """Evaluations of the objective, from the shortest horizon to the last.

    Args:
        objective: a function of φ.
        horizons: increasing shares of the run.
        outer, outer_lr: as of `OuterSteps`.
        outer_steps: evaluations in all.
        state: a `state_dict` to go on from; None: from the beginning.
    """

    def __init__(
        self,
        objective: WholeRunObjective,
        horizons: tuple[float, ...],
        outer: str,
        outer_lr: float,
        outer_steps: int,
        state: Mapping[str, Any] | None = None,
    ):
        self.objective, self.horizons, self.outer_steps = objective, horizons, outer_steps
        self.rule = outer, outer_lr, len(objective.hyper_vector)
        self.phi, self.level, self.steps = objective.start[0], 0, OuterSteps(*self.rule)
        self.finite: list[float] | None = None  # the start, once a shorter horizon has been finite there
        self.last = listed(self.phi)  # the best φ of the last horizon that had one
        self.history: list[dict[str, Any]] = []
        self.counts = {"gradient_evaluations": 0, "hessian_products": 0, "halvings": 0, "not_finite": 0}
        self.seconds, self.stopped, self.warnings = 0.0, "", list(objective.hyper_vector.notes)
        if state is not None:
            self._restore(state)

    def done(self) -> bool:
        return bool(self.stopped) or len(self.history) >= self.outer_steps

    def step(self) -> Evaluation:
        """Evaluate φ, record it, and choose the next φ."""
        began, horizon = time.perf_counter(), self.horizons[self.level]
        best = self.steps.best
        found = self.objective.evaluate(self.phi, horizon, best and best.value)
        point = Point(found.value, self.phi, found.gradient, len(self.history))
        better = self.steps.take(point)
        self.counts["gradient_evaluations"] += found.gradients
        self.counts["hessian_products"] += found.products
        self.counts["halvings"] += not better
        if not math.isfinite(point.value) or (not point.is_finite() and (best is None or point.value <= best.value)):
            self._note_not_finite(point, horizon)
        self.history.append(
            {
                "step": point.step,
                "horizon": horizon,
                "value": found.value,
                "seed_values": found.seed_values,
                "best": better,
                "size": float(self.steps.size.max()),
                "gradient_norm": float(torch.linalg.vector_norm(found.gradient)) if point.is_finite() else None,
                "values": {name: x.tolist() for name, x in self.objective.values(self.phi).items()},
                "run_equivalents": self.cost(),
            }
        )
        self._move()
        self.seconds += time.perf_counter() - began
        return found

    def _note_not_finite(self, point: Point, horizon: float) -> None:
        self.counts["not_finite"] += 1
        what = "hypergradient" if math.isfinite(point.value) else "value"
        self.warnings.append(
            f"outer step {point.step}, horizon {horizon:.3g}: the {what} is not finite; stepped back and halved."
        )

    def _move(self) -> None:
        """Choose φ of the next evaluation, at the next horizon where this one has ended."""
        if self.steps.best is None:
            self._retreat()
            return
        self.last = listed(self.steps.best.phi)
        phi = self.objective.clip(self.steps.next())
        stuck = bool((phi == self.steps.best.phi).all()) or self.steps.exhausted()
        if self.level == len(self.horizons) - 1:
            self.phi = phi
            self.stopped = "steps have become too small to matter" if stuck else ""
        elif stuck or self.steps.stalled() or self._share_is_used():
            self.finite = listed(self.objective.start[0]) if self.level == 0 else self.finite
            size = min(1.0, CARRIED * float(self.steps.size.max()))
            self.level, self.phi, self.steps = self.level + 1, self.steps.best.phi, OuterSteps(*self.rule, size)
        else:
            self.phi = phi

    def _share_is_used(self) -> bool:
        return len(self.history) >= self.outer_steps * (self.level + 1) // len(self.horizons)

    def _retreat(self) -> None:
        """Choose the next φ where nothing at this horizon was finite: half way to the start; at the first horizon lr over 10."""
        if self.finite is not None:
            self.phi = (self.phi + vector(self.finite)) / 2
            return
        cut = self.objective.clip(torch.where(self.objective.hyper_vector.is_lr, self.phi - LR_CUT, self.phi))
        if bool((cut == self.phi).all()):
            raise ValueError(
                "the value or hypergradient of the start is not finite, so there is no step to take: start where a run of "
                f"the first horizon, {self.horizons[0]:.3g}, ends finite (a smaller lr), or put a shorter horizon before it."
            )
        self.phi = cut

    def cost(self) -> float:
        """Cost so far, in plain whole runs."""
        return self.objective.cost(self.counts["gradient_evaluations"], self.counts["hessian_products"])

    def result(self) -> RunResult:
        best = self.steps.best if self.level == len(self.horizons) - 1 else None
        if best is None:
            self.warnings.append(
                f"no evaluation at horizon {self.horizons[-1]:.3g} was finite: values are of a shorter one."
            )
        if self.warnings:
            warn_user(" ".join(self.warnings))
        phi = vector(self.last) if best is None else best.phi
        same = [row["step"] for row in self.history if row["best"]]
        stats = self.counts | {
            "steps": self.objective.steps,
            "seconds": self.seconds,
            "stopped": self.stopped or "all outer steps are taken",
            "warnings": list(self.warnings),
        }
        return RunResult(
            self.objective.values(phi),
            math.nan if best is None else best.value,
            self.history,
            self.cost(),
            best.step if best is not None else same[-1] if same else 0,
            stats,
        )

    def state_dict(self) -> dict[str, Any]:
        names = "level", "finite", "last", "history", "counts", "seconds", "stopped", "warnings"
        return {name: getattr(self, name) for name in names} | {
            "phi": listed(self.phi),
            "steps": self.steps.state_dict(),
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        for name, x in state.items():
            if name not in ("phi", "steps"):
                setattr(self, name, x)
        self.phi = vector(state["phi"])
        self.steps.load_state_dict(state["steps"])
