"""`tuner.step(batch)`: the tuner takes the whole training step, so that modes which replay steps can be used online.

mode="unrolled": a window of `horizon` steps is recorded (states every √horizon steps, batches, random numbers), trained by
the user's own optimizer; at its end the adjoint runs over the replayed steps, φ moves, and the next window begins where
training stands: weights and optimizer state are carried on, never reset.

mode="implicit": every `every` steps the update map's series at the present state (see differentiate/implicit.py).
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hypergrad.core.problem import takes_step
from hypergrad.differentiate.checkpoints import Snapshot, default_every
from hypergrad.differentiate.diagnostics import Meter
from hypergrad.differentiate.implicit import implicit
from hypergrad.differentiate.reverse import adjoint
from hypergrad.differentiate.tape import Tape
from hypergrad.differentiate.trajectory import Stretch
from hypergrad.differentiate.wrt import Directions
from hypergrad.optimizers.binding import State, Values
from hypergrad.optimizers.rule import Tensors
from hypergrad.optimizers.transition import Transition

if TYPE_CHECKING:
    from hypergrad.online.loop import Ride


class Windows:
    """The whole training step of a tuner, and the window of steps that is open."""

    def __init__(self, ride: Ride, horizon: int):
        self._ride, self.horizon = weakref.ref(ride), horizon
        self.loss: Tensor | None = None  # of the step under way
        self.read_at: Tensor | None = None  # the weights [n] of the last validation loss, where the best are kept
        self.reset()

    @property
    def ride(self) -> Ride:
        ride = self._ride()
        assert ride is not None  # it owns this object
        return ride

    def reset(self) -> None:
        """Begin a new window at the next step."""
        self.tape = Tape(default_every(self.horizon))
        self.batches: list[Any] = []
        self.values: list[Values] = []
        self.scales: list[Tensor] = []
        self.after: State | None = None  # after the last step of the window

    def step(self, batch: Any) -> Tensor:
        ride = self.ride
        if ride.mode == "implicit" and ride.used[0] and ride.t % ride.every == 0:
            self._look_back(batch)
        if ride.mode == "unrolled":
            self._record(batch)
        loss, before = ride.problem.training_loss(batch), ride.t
        self._train(loss)
        self.loss = None
        if ride.t == before:  # GradScaler skipped the step
            self.reset()
        if self.batches:
            self.after = ride.transition.read()
            self.tape.losses.append(loss.detach())
            self.values.append(self._with_clip(ride.used[0]))
            self.scales.append(ride.used[1])
        if len(self.batches) == self.horizon:
            self._close_window()
        return loss.detach()

    def _train(self, loss: Tensor) -> None:
        ride, scaler = self.ride, self.ride.tangents.scaler
        self.loss = loss.detach()
        for opt in ride.optimizers:
            opt.zero_grad()
        scaled = loss if scaler is None else scaler.scale(loss)
        if ride.mode == "forward":
            ride.tangents.backward(scaled, None, False)
        else:
            scaled.backward(inputs=[p for p in ride.transition.params if p.requires_grad])
        if ride.tangents.clip_norm is not None:
            if scaler is not None:
                for opt in ride.optimizers:
                    scaler.unscale_(opt)
            torch.nn.utils.clip_grad_norm_(ride.transition.params, ride.tangents.clip_norm)
        for opt in ride.optimizers:
            opt.step() if scaler is None else scaler.step(opt)
        if scaler is not None:
            scaler.update()

    def _record(self, batch: Any) -> None:
        """Keep what a replay of this step needs. Where the state was changed from outside, a new window begins."""
        problem, transition = self.ride.problem, self.ride.transition
        state = transition.read()
        if self.after is not None and not state.equals(self.after):
            self.reset()
        if len(self.batches) % self.tape.every == 0:
            self.tape.snapshots.append(Snapshot(state, problem.read_buffers()))
        self.tape.rng.append(problem.rng())
        self.batches.append(batch)

    def _with_clip(self, values: Values) -> Values:
        m = self.ride.tangents.clip_norm
        return values if m is None else values | {"clip_norm": [float(m)]}

    def _stretch(self, batches: list[Any], values: list[Values], per_step: bool) -> Stretch:
        ride = self.ride
        clip = None if ride.tangents.clip_norm is None else "clip_norm"
        names = list(ride.coordinates.directions.wrt)
        transition = Transition(ride.optimizers, frozenset(names), clip)
        directions = Directions(transition, names, ride.problem.hypers, len(batches) if per_step else None)
        steps = len(batches)
        shift = ride.t - steps if per_step else ride.t

        def val_loss(t: int) -> Tensor:
            if ride.hyper.best is not None:
                self.read_at = transition.flatten(ride.problem.params)
            ride.problem.rng().seed(ride.hyper.seed + shift + t)  # a stream of its own, as in HyperSteps.take
            return ride.hyper.validation(shift + t) if takes_step(ride.hyper.validation) else ride.hyper.validation()

        return Stretch(ride.problem, transition, batches, values, directions, val_loss, (steps,))

    def _close_window(self) -> None:
        ride, transition = self.ride, self.ride.transition
        self.tape.snapshots.append(Snapshot(transition.read(), ride.problem.read_buffers()))
        stretch = self._stretch(self.batches, self.values, per_step=True)
        with ride.problem.untouched():
            result = adjoint(stretch, self.tape, Meter(ride.problem.device))
        gradient = (self._shares(result.gradients) * torch.stack(self.scales)).sum(0)
        ride.tangents.counts["hessian_products"] += result.stats["hessian_products"]
        ride.tangents.counts["gradients"] += result.stats["gradient_evaluations"]
        self.reset()
        ride.hyper.move(ride.t, float(result.value), gradient, self.read_at)

    def _shares(self, gradients: Tensors) -> Tensor:
        """The derivative in each number's value at each step, [steps, k]; times the value's slope there it is that in φ."""
        entries = self.ride.coordinates.entries
        return torch.stack([gradients[e.name][:, *e.index] for e in entries], dim=1).to("cpu", torch.float64)

    def _look_back(self, batch: Any) -> None:
        ride = self.ride
        values, scale = ride.used
        stretch = self._stretch([batch], [self._with_clip(values)], per_step=False)
        result = implicit(stretch, look_back=self.horizon)
        shares = torch.stack([result.gradients[e.name][e.index] for e in ride.coordinates.entries])
        gradient = shares.to("cpu", torch.float64) * scale
        ride.hyper.move(ride.t, float(result.value), gradient, self.read_at)
