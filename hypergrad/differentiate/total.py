"""The objective and its gradients, summed over the steps of an adjoint."""

from __future__ import annotations

import torch
from torch import Tensor

from hypergrad.differentiate.one_step import StepVJP
from hypergrad.differentiate.trajectory import Trajectory
from hypergrad.optimizers.binding import State
from hypergrad.optimizers.rule import Tensors, parts
from hypergrad.optimizers.transition import CLIPS, Tangent


class Total:
    """The objective and its gradient arrays, summed over steps."""

    def __init__(self, trajectory: Trajectory):
        self.trajectory = trajectory
        self.value = trajectory.transition.params[0].new_zeros(()).detach()
        self.gradients = trajectory.directions.zeros()

    def validate(self, t: int, lam: Tangent, state: State) -> Tangent:
        """Add the validation loss after t steps, where it is part of the objective; the adjoint with it."""
        if t not in self.trajectory.val_steps:
            return lam
        share = self.trajectory.validate(t, state)
        self.value = self.value + share.value
        self.trajectory.add_direct(self.gradients, share.direct)
        return share.added_to(lam)

    def add(self, t: int, vjp: StepVJP) -> None:
        """Add step t's share of the gradients."""
        directions, fine, lam_h, lam_clip = self.trajectory.directions, vjp.fine, vjp.of_groups, vjp.of_clip
        scheduled = directions.schedules.vjp(t, lambda name: self._shares(name, lam_h, lam_clip))
        in_loss = dict(zip(self.trajectory.problem.hypers, vjp.of_hypers, strict=True))
        for name, array in self.gradients.items():
            target = array if directions.steps is None else array[t]
            if name in self.trajectory.problem.hypers:
                for g in (in_loss[name], scheduled.get(name)):
                    target += 0 if g is None else g
            elif name in directions.fine.per:
                if fine:
                    target += torch.stack([fine[part] for part in parts(name)], -1).view(target.shape)
            else:
                target += self._shares(name, lam_h, lam_clip).view(target.shape)

    def _shares(self, name: str, lam_h: list[Tensors], lam_clip: Tensor | None) -> Tensor:
        """The derivative in a name: [n_groups], [n_groups, 2] of betas, [] of what belongs to no group."""
        if name in CLIPS:
            return self.value.new_zeros(()) if lam_clip is None else lam_clip
        if name in self.trajectory.directions.ungrouped:  # the average's decay
            return torch.as_tensor(lam_h[0].get(name, 0)).to(self.value)
        rows = [[torch.as_tensor(lam.get(part, 0)).to(self.value) for part in parts(name)] for lam in lam_h]
        return torch.stack([torch.stack(row) for row in rows]).squeeze(-1)
