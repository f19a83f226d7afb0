"""`tuner.step(batch)`: the tuner takes the whole training step, so that modes which replay steps can be used online.

mode="unrolled": a window of `horizon` steps is recorded (states every √horizon steps, batches, random numbers), trained by
the user's own optimizer; at its end the adjoint runs over the replayed steps, φ moves, and the next window begins where
training stands: weights and optimizer state are carried on, never reset.

mode="implicit": every `every` steps the update map's series at the present state (see modes/implicit.py).
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hypergrad.modes.implicit import implicit
from hypergrad.modes.stretch import Directions, Meter, Stretch
from hypergrad.modes.unrolled import Snapshot, Tape, adjoint, default_every
from hypergrad.problem import takes_step
from hypergrad.updates.rule import Tensors
from hypergrad.updates.transition import Transition, Values

if TYPE_CHECKING:
    from hypergrad.tuner import Tuner


class Windows:
    """The whole training step of a tuner, and the window of steps that is open."""

    def __init__(self, tuner: Tuner, horizon: int):
        self._tuner, self.horizon = weakref.ref(tuner), horizon
        self.loss: float | None = None  # of the step under way
        self.reset()

    @property
    def tuner(self) -> Tuner:
        tuner = self._tuner()
        assert tuner is not None  # it owns this object
        return tuner

    def reset(self) -> None:
        """Begin a new window at the next step."""
        self.tape = Tape(default_every(self.horizon))
        self.batches: list[Any] = []
        self.values: list[Values] = []
        self.scales: list[Tensor] = []
        self.theta: Tensor | None = None  # after the last step of the window

    def step(self, batch: Any) -> Tensor:
        tuner = self.tuner
        if tuner.mode == "implicit" and tuner._used[0] and tuner._t % tuner._every == 0:
            self._look_back(batch)
        if tuner.mode == "unrolled":
            self._record(batch)
        loss, before = tuner._problem.training_loss(batch), tuner._t
        self._train(loss)
        self.loss = None
        if tuner._t == before:  # GradScaler skipped the step
            self.reset()
        if self.batches:
            self.theta = tuner._transition.flatten(tuner._transition.params)
            self.tape.losses.append(loss.detach())
            self.values.append(self._with_clip(tuner._used[0]))
            self.scales.append(tuner._used[1])
        if len(self.batches) == self.horizon:
            self._close_window()
        return loss.detach()

    def _train(self, loss: Tensor) -> None:
        tuner, scaler = self.tuner, self.tuner._tangents.scaler
        self.loss = float(loss.detach())
        for opt in tuner.optimizers:
            opt.zero_grad()
        scaled = loss if scaler is None else scaler.scale(loss)
        if tuner.mode == "forward":
            tuner.backward(scaled)
        else:
            scaled.backward(inputs=[p for p in tuner._transition.params if p.requires_grad])
        if tuner._tangents.clip_norm is not None:
            if scaler is not None:
                for opt in tuner.optimizers:
                    scaler.unscale_(opt)
            torch.nn.utils.clip_grad_norm_(tuner._transition.params, tuner._tangents.clip_norm)
        for opt in tuner.optimizers:
            opt.step() if scaler is None else scaler.step(opt)
        if scaler is not None:
            scaler.update()

    def _record(self, batch: Any) -> None:
        """Keep what a replay of this step needs. Where weights were changed from outside, a new window begins."""
        problem, transition = self.tuner._problem, self.tuner._transition
        if self.theta is not None and not torch.equal(self.theta, transition.flatten(transition.params)):
            self.reset()
        if len(self.batches) % self.tape.every == 0:
            self.tape.snapshots.append(Snapshot(transition.read(), problem.read_buffers()))
        self.tape.rng.append(problem.rng())
        self.batches.append(batch)

    def _with_clip(self, values: Values) -> Values:
        m = self.tuner._tangents.clip_norm
        return values if m is None else values | {"clip_norm": [float(m)]}

    def _stretch(self, batches: list[Any], values: list[Values], per_step: bool) -> Stretch:
        tuner = self.tuner
        clip = None if tuner._tangents.clip_norm is None else "clip_norm"
        names = list(tuner._coordinates.directions.wrt)
        transition = Transition(tuner.optimizers, frozenset(names), clip)
        directions = Directions(transition, names, tuner.hypers, len(batches) if per_step else None)
        steps = len(batches)
        shift = tuner._t - steps if per_step else tuner._t

        def val_loss(t: int) -> Tensor:
            return tuner._val_loss(shift + t) if takes_step(tuner._val_loss) else tuner._val_loss()

        return Stretch(tuner._problem, transition, batches, values, directions, val_loss, (steps,))

    def _close_window(self) -> None:
        tuner, transition = self.tuner, self.tuner._transition
        self.tape.snapshots.append(Snapshot(transition.read(), tuner._problem.read_buffers()))
        stretch = self._stretch(self.batches, self.values, per_step=True)
        with tuner._problem.untouched():
            result = adjoint(stretch, self.tape, Meter(tuner._problem.device))
        gradient = torch.stack([self._in_phi(result.gradients, t) for t in range(len(self.batches))]).sum(0)
        tuner._tangents.counts["hessian_products"] += result.stats["hessian_products"]
        tuner._tangents.counts["gradients"] += result.stats["gradient_evaluations"]
        self.reset()
        tuner.move(float(result.value), gradient)

    def _in_phi(self, gradients: Tensors, t: int) -> Tensor:
        """Step t's share of dL/dφ [k]: its gradient in the value times the value's slope at that step."""
        entries = self.tuner._coordinates.entries
        shares = torch.stack([gradients[e.name][t][e.index] for e in entries])
        return shares.to("cpu", torch.float64) * self.scales[t]

    def _look_back(self, batch: Any) -> None:
        tuner = self.tuner
        values, scale = tuner._used
        stretch = self._stretch([batch], [self._with_clip(values)], per_step=False)
        result = implicit(stretch, look_back=self.horizon)
        shares = torch.stack([result.gradients[e.name][e.index] for e in tuner._coordinates.entries])
        tuner.move(float(result.value), shares.to("cpu", torch.float64) * scale)
