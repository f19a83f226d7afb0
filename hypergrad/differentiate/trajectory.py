"""What every mode of differentiation takes and gives: a trajectory of training, and the result."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hypergrad.core.graph import Linearization
from hypergrad.core.problem import Problem
from hypergrad.differentiate.diagnostics import Diagnostics
from hypergrad.differentiate.wrt import Directions
from hypergrad.optimizers.binding import State, Values
from hypergrad.optimizers.ema import EMA, Averaged
from hypergrad.optimizers.rule import Tensors
from hypergrad.optimizers.transition import Tangent, Transition

if TYPE_CHECKING:
    from hypergrad.differentiate.compile.compiled import Compiled


@dataclass
class Result:
    """A hypergradient.

    Attributes:
        value: the validation loss, 0-d.
        gradients: name -> derivative of `value` in that hyperparameter's value. Shape [n_groups] for names of param groups
            ([n_groups, 2] for betas), [] for a clipping threshold, the tensor's own shape for hyperparameters in the
            loss; with per="parameter" [n_params], with per="element" [n], in the order of the optimizer's groups, in place of
            [n_groups]; with per_step one more leading dimension [steps].
        stats: steps, seconds, peak_bytes (growth of memory), gradient_evaluations (gradients of the training loss),
            hessian_products, growth_rate (of the tangent's or adjoint's norm, per step, natural log: the finite-time Lyapunov
            exponent), nonfinite_share (of steps after which that norm was not finite), warnings (sentences; one says when
            training is too chaotic for its hypergradient to be of use, and what smooths it), for mode="unrolled" replay_mismatch
            (largest relative difference of a loss when played again) and replayed_exactly (weights bit for bit the same then),
            and for mode="implicit" solver_iterations (products that the solver asked for; terms of a look-back),
            solver_residual (‖b − A x‖/‖b‖; of a look-back the part of it in θ) and, without look_back, gradient_norm; with
            compile=True compile_seconds (of the wall), compiled_graphs (made in this call), compiled_steps and eager_steps
            (steps, adjoints and tangents that graphs and the eager code played).
        initial: derivative of `value` in the weights before the first step (the optimizer's tensors held fixed), for each
            parameter in the order of the optimizer's groups; None for one that is frozen, and for modes other than "unrolled".
    """

    value: Tensor
    gradients: dict[str, Tensor]
    stats: dict[str, Any] = field(default_factory=dict)
    initial: list[Tensor | None] | None = None


class Share(NamedTuple):
    """One validation step's share of the objective: value, gradients in θ [n], in running statistics, in the loss's tensors."""

    value: Tensor
    theta: Tensor
    stats: Tensor | None
    direct: Tensors
    averaged: bool  # θ stands for the average of the weights

    def along(self, tangent: Tangent) -> Tensor:
        """Derivatives along tangents [k]."""
        out = (tangent.slots[EMA] if self.averaged else tangent.theta) @ self.theta
        return out if self.stats is None or tangent.stats is None else out + tangent.stats @ self.stats

    def added_to(self, lam: Tangent) -> Tangent:
        """The adjoint with this share of the objective."""
        theta, slots, stats = lam.theta, lam.slots, lam.stats
        if self.averaged:
            slots = slots | {EMA: slots[EMA] + self.theta}
        else:
            theta = theta + self.theta
        if self.stats is not None:
            stats = self.stats if stats is None else stats + self.stats
        return Tangent(theta, slots, stats)


@dataclass
class Trajectory:
    """A trajectory of training to be differentiated: the argument of every mode.

    Args:
        values: the hyperparameters of every step.
        val_steps: numbers of completed steps at which the validation loss is taken; their mean is differentiated.
        compiled: what plays steps in place of the eager code, with compile=True.
    """

    problem: Problem
    transition: Transition
    batches: Sequence[Any]
    values: Sequence[Values]
    directions: Directions
    val_loss: Callable[..., Tensor]
    val_steps: tuple[int, ...]
    compiled: Compiled | None = None

    def gradient(self, lin: Linearization) -> Tensor:
        return self.transition.flatten(lin.grads)

    @property
    def averaged(self) -> bool:
        return isinstance(self.transition, Averaged)

    def validate(self, t: int, state: State) -> Share:
        """Step t's share of the objective and its gradients, at a state whose parameters and buffers are in the model."""
        weight = self.val_steps.count(t) / len(self.val_steps)
        with self._evaluated_weights(state):
            found = self.problem.validate(self.val_loss, t)
        direct = {
            name: torch.zeros_like(x) if g is None else g * weight
            for (name, x), g in zip(self.problem.hypers.items(), found.of_hypers, strict=True)
        }
        stats = None if found.of_stats is None else found.of_stats * weight
        theta = self.transition.flatten(found.of_params) * weight
        return Share(found.value * weight, theta, stats, direct, self.averaged)

    @contextmanager
    def _evaluated_weights(self, state: State) -> Iterator[None]:
        """The averaged weights in the model, where there is an average."""
        if not self.averaged:
            yield
            return
        self.transition.load(state.slots[EMA])
        try:
            yield
        finally:
            self.transition.load(state.theta)

    def initial(self, lam: Tangent) -> list[Tensor | None]:
        """dL/dθ₀ of each parameter from the adjoint before the first step. The average starts at θ₀."""
        theta = lam.theta + lam.slots[EMA] if self.averaged else lam.theta
        pairs = zip(self.transition.params, self.transition.split(theta), strict=True)
        return [x if p.requires_grad else None for p, x in pairs]  # autograd does not look into frozen ones

    def add_direct(self, gradients: Tensors, direct: Tensors) -> None:
        """Add the direct dependence of the validation loss on tensors in the training loss, once."""
        for name, g in direct.items():
            if name in gradients:
                target = gradients[name][-1] if self.directions.steps is not None else gradients[name]
                target += g


@contextmanager
def evaluation(trajectory: Trajectory) -> Iterator[Diagnostics]:
    """Run a mode on the user's model in place and leave everything as it was found."""
    with trajectory.problem.untouched():
        trajectory.problem.follow_running_stats(trajectory.val_loss, trajectory.val_steps[-1])
        diagnostics, before = Diagnostics(trajectory.problem.device), trajectory.problem.read_buffers()
        yield diagnostics
        for name in trajectory.directions.unreached(trajectory.problem.read):
            diagnostics.extra["warnings"].append(
                f"nothing depends on hypers[{name!r}], neither the training loss, nor a schedule, nor val_loss: gradient 0."
            )
        moved = trajectory.problem.unfollowed_since(before) if diagnostics.moved is None else diagnostics.moved
        if moved:
            diagnostics.extra["warnings"].append(
                f"training changes the buffers {', '.join(moved)}; a path through them to the validation loss is not part of the "
                "hypergradient. hypergrad.check tells whether that matters here."
            )
            warnings.warn(diagnostics.extra["warnings"][-1], stacklevel=4)
