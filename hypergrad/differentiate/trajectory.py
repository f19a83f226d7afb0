"""What every mode of differentiation takes and gives: a trajectory of training, and the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hypergrad.core.graph import Linearization
from hypergrad.core.problem import Problem
from hypergrad.core.shown import rounded, shown, shown_dict, shown_list
from hypergrad.differentiate.checkpoints import Checkpoint
from hypergrad.differentiate.wrt import Directions
from hypergrad.optimizers.binding import State, Values
from hypergrad.optimizers.ema import EMA, Averaged
from hypergrad.optimizers.rule import Tensors
from hypergrad.optimizers.transition import Tangent, Transition


@dataclass(repr=False)
class Result:
    """A hypergradient. Printed, tensors of many numbers are their shape and norm.

    Attributes:
        value: the validation loss, 0-d.
        gradients: name -> derivative of `value` in that hyperparameter's value. Shape [n_groups] for names of param groups
            ([n_groups, 2] for betas), [] for a clipping threshold, the tensor's own shape for hyperparameters in the
            loss; with per="parameter" [n_params], with per="element" [n], in the order of the optimizer's groups, in place of
            [n_groups]; with per_step one more leading dimension [steps].
        stats: steps, seconds, peak_bytes (growth of memory), gradient_evaluations (gradients of the training loss),
            hessian_products, growth_rate (of the tangent's or adjoint's norm, per step, natural log: the finite-time Lyapunov
            exponent), nonfinite_share (of steps after which that norm was not finite), warnings (sentences; one says when
            training is too chaotic for its hypergradient to be of use, and what smooths it). For mode="unrolled" also
            replay_mismatch (largest relative difference of a replayed step's loss) and replayed_exactly (whether replayed
            weights were the same, bit for bit). For mode="implicit" also solver_iterations (products that the solver asked for;
            terms with look_back), solver_residual (‖b − A x‖/‖b‖; with look_back the part of it in θ) and, without look_back,
            gradient_norm. With compile=True also compile_seconds (of the wall), compiled_graphs (made in this call),
            compiled_steps and eager_steps (steps, vjps and jvps that compiled graphs and the eager code computed).
        initial: derivative of `value` in the weights before the first step (the optimizer's tensors held fixed), for each
            parameter in the order of the optimizer's groups; None for one that is frozen, and for modes other than "unrolled".
    """

    value: Tensor
    gradients: dict[str, Tensor]
    stats: dict[str, Any] = field(default_factory=dict)
    initial: list[Tensor | None] | None = None

    def __repr__(self) -> str:
        initial = "" if self.initial is None else f", initial={shown_list(self.initial)}"
        return f"Result(value={shown(self.value)}, gradients={shown_dict(self.gradients)}, stats={rounded(self.stats)}{initial})"


class Share(NamedTuple):
    """One validation step's share of the objective: value, gradients in θ [n], in running statistics, in the loss's tensors."""

    value: Tensor
    theta: Tensor
    stats: Tensor | None
    direct: Tensors
    averaged: bool  # θ is the average of the weights

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
    """

    problem: Problem
    transition: Transition
    batches: Sequence[Any]
    values: Sequence[Values]
    directions: Directions
    val_loss: Callable[..., Tensor]
    val_steps: tuple[int, ...]

    def gradient(self, lin: Linearization) -> Tensor:
        return self.transition.flatten(lin.grads)

    def restore(self, at: Checkpoint, silently: bool = False) -> None:
        """Put a checkpoint's parameters and buffers into the model. silently: see `Binding.load`."""
        self.transition.load(at.state.theta, silently=silently)
        self.problem.write_buffers(at.buffers, silently=silently)

    def ill_conditioned_decay(self, state: State, g: Tensor, t: int) -> Tensor | None:
        """The param groups in which the derivative in weight_decay is about lr·θ/eps, [n_groups] bool; None where none can be."""
        if not self.directions.differentiates("weight_decay"):
            return None
        return self.transition.ill_conditioned_decay(state, g, self.values[t])

    @property
    def averaged(self) -> bool:
        return isinstance(self.transition, Averaged)

    def validate(self, t: int, state: State) -> Share:
        """Step t's share of the objective and its gradients, at a state whose parameters and buffers are in the model.

        With several processes they are their mean, but for the gradient in running statistics, which is each one's own.
        """
        weight = self.val_steps.count(t) / len(self.val_steps)
        with self._evaluated_weights(state):
            found = self.problem.validate(self.val_loss, t)
        params, hypers = self.problem.params, self.problem.hypers
        value = self.problem.processes.mean(found.value)
        rows = self.problem.processes.means([*found.of_params, *found.of_hypers], [*params, *hypers.values()])
        of_params, of_hypers = rows[: len(params)], rows[len(params) :]
        direct = {
            name: torch.zeros_like(x) if g is None else g * weight
            for (name, x), g in zip(hypers.items(), of_hypers, strict=True)
        }
        stats = None if found.of_stats is None else found.of_stats * weight
        theta = self.transition.flatten(of_params) * weight
        return Share(value * weight, theta, stats, direct, self.averaged)

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
        return [x if p.requires_grad else None for p, x in pairs]  # autograd computes none for frozen ones

    def add_direct(self, gradients: Tensors, direct: Tensors) -> None:
        """Add the direct dependence of the validation loss on tensors in the training loss, once."""
        for name, g in direct.items():
            if name in gradients:
                target = gradients[name][-1] if self.directions.steps is not None else gradients[name]
                target += g
