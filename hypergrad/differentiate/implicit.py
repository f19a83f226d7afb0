"""Implicit mode: differentiate the point that training has reached, not the steps to it.

At a minimum θ* of F(θ, h) = ℓ(θ, h) + Σ_groups w/2 ‖θ‖² the implicit function theorem gives

    dL/dh = ∂L/∂h − (∂L/∂θ) (∂²F/∂θ²)⁻¹ ∂²F/∂θ∂h          ∂²F/∂θ∂w = θ, in its group

for hyperparameters in the loss and for coupled weight decay. lr, momentum, betas and decoupled decay do not move a
minimum: for them this mode raises, unless `look_back` is given. (Bengio 2000; Lorraine et al. 2019, arXiv 1911.02590.)

With `look_back=i` the fixed point is that of the update map s' = Φ(s, h) itself, at the present state and the last batch,
with the inverse cut off after i terms (Clarke et al. 2022, arXiv 2110.10461, eq. 6), momentum and all:

    dL/dh ≈ ∂L/∂h + Σ_{j<i} (∂Φ/∂h)ᵀ ((∂Φ/∂s)ᵀ)ʲ ∂L/∂s
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hypergrad.differentiate.diagnostics import Diagnostics
from hypergrad.differentiate.evaluation import evaluation
from hypergrad.differentiate.one_step import StepVJP, step_vjp
from hypergrad.differentiate.stepper import Stepper
from hypergrad.differentiate.total import Total
from hypergrad.differentiate.trajectory import Result, Trajectory
from hypergrad.optimizers.binding import State
from hypergrad.optimizers.transition import Tangent
from hypergrad.solvers import Solve, cg


def implicit(
    trajectory: Trajectory, stepper: Stepper, solver: Solve | None = None, look_back: int | None = None
) -> Result:
    """Train through the trajectory, then differentiate the point reached as a fixed point."""
    if look_back is not None and (not isinstance(look_back, int) or isinstance(look_back, bool) or look_back < 1):
        raise ValueError(f"look_back must be a whole number of terms from 1, got {look_back!r}.")
    if look_back is not None and solver is not None:
        raise ValueError("pass solver (a linear solve at a minimum) or look_back (the update map's series), not both.")
    if solver is not None and not callable(solver):
        raise TypeError(
            f"solver must be a function solve(matvec, b), got {type(solver).__name__}: see hypergrad.solvers."
        )
    if look_back is None:
        _check_minimum_depends_on(trajectory)
    with evaluation(trajectory) as diagnostics:
        state = trajectory.transition.read()
        last = len(trajectory.batches) - 1
        for t in range(last + 1 if look_back is None else last):
            state, _ = stepper.step(state, t, diagnostics)
        if look_back is not None:
            return _series(trajectory, stepper, state, look_back, diagnostics)
        return _at_minimum(trajectory, state, solver or cg, diagnostics)


def _check_minimum_depends_on(trajectory: Trajectory) -> None:
    for name in trajectory.directions.wrt:
        if name in trajectory.problem.hypers:
            continue
        if name != "weight_decay":
            raise NotImplementedError(
                f"mode='implicit' cannot differentiate in {name!r}: the minimum that training converges to does not depend "
                "on it. Use mode='unrolled' or 'forward', or look_back=5 for the update map's truncated series."
            )
    for t in range(len(trajectory.batches)):
        for slope in trajectory.directions.schedules.slopes(t):
            if slope.part != "weight_decay" and slope.of.keys() & set(trajectory.directions.wrt):
                raise NotImplementedError(
                    f"mode='implicit' cannot differentiate in a schedule of {slope.part!r}: the minimum that training converges "
                    "to does not depend on it. Use mode='unrolled' or 'forward', or look_back=5."
                )
    decays = trajectory.values[-1].get("weight_decay", [])
    for rule, wd in zip(trajectory.transition.rules, decays, strict=False):
        if getattr(rule, "decoupled", False) and (wd or trajectory.directions.differentiates("weight_decay")):
            raise NotImplementedError(
                "mode='implicit' cannot handle decoupled weight decay (AdamW), or that of an optimizer without an update rule: "
                "its fixed point need not be a minimum of the loss plus a penalty. Use torch.optim.Adam (coupled decay), "
                "mode='unrolled', or look_back=5."
            )


def _distinct(batches: Any) -> list[Any]:
    """Each batch object once: a full-batch run repeats one."""
    return list({id(b): b for b in batches}.values())


class _Objective:
    """F: the mean training loss over the distinct batches, plus coupled weight decay, with the present random numbers."""

    def __init__(self, trajectory: Trajectory, state: State, diagnostics: Diagnostics):
        self.trajectory, self.diagnostics = trajectory, diagnostics
        self.transition, problem = trajectory.transition, trajectory.problem
        rng = problem.rng()
        self.lins = []
        batches = _distinct(trajectory.batches)
        problem.processes.check_same("the number of distinct batches", len(batches))
        for batch in batches:
            rng.restore()
            self.lins.append(problem.linearize(batch))
            diagnostics.gradients += 1
        self.decay = torch.zeros_like(state.theta)
        for (a, b), group in zip(self.transition.ranges, self.transition.group_of, strict=True):
            self.decay[a:b] = trajectory.values[-1]["weight_decay"][group] or 0.0
        self.theta, self.calls = state.theta, 0
        sign = [-1.0 if getattr(rule, "maximize", False) else 1.0 for rule in self.transition.rules]
        signs = torch.cat([self.theta.new_full((b - a,), sign[g]) for (a, b), g in self._ranges()])
        self.sign = signs if -1.0 in sign else None  # None: every group minimizes

    def _ranges(self) -> Any:
        return zip(self.transition.ranges, self.transition.group_of, strict=True)

    def _mean(self, rows: list[Tensor]) -> Tensor:
        """The mean over batches, negated where a group maximizes."""
        mean = rows[0] if len(rows) == 1 else torch.stack(rows).mean(0)
        return mean if self.sign is None else self.sign * mean

    def gradient(self) -> Tensor:
        return torch.addcmul(self._mean([self.trajectory.gradient(lin) for lin in self.lins]), self.decay, self.theta)

    def hessian(self, v: Tensor) -> Tensor:
        views = self.transition.split(v)
        rows = [self.transition.flatten(lin.product(views)) for lin in self.lins]
        self.diagnostics.products += len(rows)
        self.calls += 1
        return torch.addcmul(self._mean(rows), self.decay, v)

    def into_hypers(self, v: Tensor) -> list[Tensor | None]:
        """(∂²F/∂θ∂h)ᵀ v for the tensors in the loss."""
        total: list[Tensor | None] = [None] * len(self.trajectory.problem.hypers)
        if not total:
            return total
        views, n = self.transition.split(v if self.sign is None else self.sign * v), len(self.transition.params)
        for lin in self.lins:
            for i, g in enumerate(lin.product(views, into_extra=True)[n:]):
                if g is not None:
                    total[i] = g / len(self.lins) + (0 if total[i] is None else total[i])  # type: ignore[operator]
        return total


def _at_minimum(trajectory: Trajectory, state: State, solver: Solve, diagnostics: Diagnostics) -> Result:
    steps, total = len(trajectory.batches), Total(trajectory)
    lam = total.validate(steps, Tangent.zeros(state), state)
    if lam.stats is not None and any(map(trajectory.problem.moves_running_stats, _distinct(trajectory.batches))):
        raise NotImplementedError(
            "mode='implicit' leaves out the path through BatchNorm's running statistics, which val_loss reads: validate in train "
            "mode, train with those layers in eval mode, or use mode='unrolled' or 'forward', which have it."
        )
    v, trajectory.problem.stats = lam.theta, None
    objective = _Objective(trajectory, state, diagnostics)
    x = solver(objective.hessian, v)
    if not isinstance(x, Tensor) or x.shape != v.shape:
        what = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"solver(matvec, b) must return a tensor of b's shape {tuple(v.shape)}, got {what}.")
    diagnostics.extra |= {
        "solver_iterations": objective.calls,
        "solver_residual": _ratio(objective.hessian(x) - v, v),
        "gradient_norm": float(torch.linalg.vector_norm(objective.gradient())),
    }
    decay = [{"weight_decay": state.theta.new_zeros(())} for _ in trajectory.transition.groups]
    for (a, b), group in zip(trajectory.transition.ranges, trajectory.transition.group_of, strict=True):
        decay[group]["weight_decay"] = decay[group]["weight_decay"] - x[a:b] @ state.theta[a:b]
    per = trajectory.directions.fine
    fine = {part: per.summed(part, -x * state.theta) for part in per.of_part}  # weight decay's: others are refused
    of_hypers = [None if g is None else -g for g in objective.into_hypers(x)]
    total.add(steps - 1, StepVJP(lam, decay, None, of_hypers, fine))
    return Result(total.value, total.gradients, diagnostics.stats(steps))


def _series(trajectory: Trajectory, stepper: Stepper, state: State, terms: int, diagnostics: Diagnostics) -> Result:
    """The series on the update map of the last batch, at the state before it; the loss is taken after it."""
    steps, total, problem = len(trajectory.batches), Total(trajectory), trajectory.problem
    buffers, rng = problem.read_buffers(), problem.rng()
    after, _ = stepper.step(state, steps - 1, diagnostics)
    lam = total.validate(steps, Tangent.zeros(state), after)
    trajectory.transition.load(state.theta)
    problem.write_buffers(buffers)
    rng.restore()
    lin = problem.linearize(trajectory.batches[-1])
    diagnostics.gradients += 1
    first = lam.theta
    for left in reversed(range(terms)):
        vjp = step_vjp(trajectory, state, steps - 1, lin, lam, trajectory.gradient(lin), retain=left > 0)
        diagnostics.products += 1
        total.add(steps - 1, vjp)
        lam = vjp.lam
    # x = Σ_{j<i} (Jᵀ)ʲ λ leaves λ − (I − Jᵀ) x = (Jᵀ)ⁱ λ
    diagnostics.extra |= {"solver_iterations": terms, "solver_residual": _ratio(lam.theta, first)}
    return Result(total.value, total.gradients, diagnostics.stats(steps))


def _ratio(a: Tensor, b: Tensor) -> float:
    return float(torch.linalg.vector_norm(a) / torch.linalg.vector_norm(b).clamp_min(torch.finfo(b.dtype).tiny))
