"""`tuner.step(batch)`: the tuner takes the whole training step, so that modes which replay steps can be used online.

mode="unrolled": a window of `horizon` steps is recorded (states every √horizon steps, batches, random numbers), trained by
the user's own optimizer; at its end the adjoint runs over the replayed steps, φ moves, and the next window begins where
training stands: weights and optimizer state are carried on, never reset.

mode="implicit": every `every` steps the update map's series at the present state (see differentiate/implicit.py).
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from hypergrad.core.detached import is_cut
from hypergrad.core.float64 import on_host
from hypergrad.core.second_order import twice_differentiable
from hypergrad.core.signatures import call_val_loss
from hypergrad.core.survey import survey
from hypergrad.differentiate.checkpoints import Checkpoint, default_every
from hypergrad.differentiate.diagnostics import Diagnostics
from hypergrad.differentiate.eager import EagerStepper
from hypergrad.differentiate.implicit import implicit
from hypergrad.differentiate.reverse import adjoint
from hypergrad.differentiate.tape import Tape
from hypergrad.differentiate.trajectory import Trajectory
from hypergrad.differentiate.wrt import Directions
from hypergrad.online.loop import OnlineLoop
from hypergrad.optimizers.binding import State, Values
from hypergrad.optimizers.rule import Tensors
from hypergrad.optimizers.transition import Transition

_CLIPS = {"clip_norm": torch.nn.utils.clip_grad_norm_, "clip_value": torch.nn.utils.clip_grad_value_}


class ReplayWindow:
    """The whole training step of a tuner, and the window of steps that is open."""

    def __init__(self, loop: OnlineLoop, horizon: int):
        self.loop, self.horizon = loop, horizon
        self.read_at: Tensor | None = None  # the weights [n] of the last validation loss, where the best are kept
        self.reset()

    def reset(self) -> None:
        """Begin a new window at the next step."""
        self.dropped = self.loop.recovery.dropped  # steps that did nothing, until the window began
        self.tape = Tape(default_every(self.horizon))
        self.batches: list[Any] = []
        self.values: list[Values] = []
        self.scales: list[Tensor] = []
        self.after: State | None = None  # after the last step of the window
        self.trained: list[bool] = []  # the parameters that require gradients in the window

    def step(self, batch: Any) -> Tensor:
        loop = self.loop
        if loop.recovery.dropped > self.dropped:  # in a step that was not taken here
            self.reset()
        if loop.mode == "implicit" and loop.used.values and loop.t % loop.every == 0:
            self._look_back(batch)
        if loop.mode == "unrolled":
            self._record(batch)
        with nullcontext() if loop.mode == "forward" else twice_differentiable():  # as when it is replayed
            loss, before = loop.problem.training_loss(batch), loop.t
        if loop.mode != "forward" and not loop.first_checks.done:
            loop.tangents.note_read(survey(loss, loop.problem.model).leaves)
            loop.tangents.cut = is_cut(loss)
        self._train(loss)
        if (
            loop.t == before or loop.recovery.dropped > self.dropped
        ):  # GradScaler skipped the step, or it was passed over
            self.reset()
        if self.batches:
            self.after = loop.transition.read()
            self.tape.after_step(loop.problem.processes.mean(loss.detach()))  # as a replay's
            self.values.append(self._with_clip(loop.used.values))
            self.scales.append(loop.used.slopes)
        if len(self.batches) == self.horizon:
            self._close_window()
        return loss.detach()

    def _train(self, loss: Tensor) -> None:
        loop, scaler = self.loop, self.loop.tangents.scaler
        for opt in loop.optimizers:
            opt.zero_grad()
        scaled = loss if scaler is None else scaler.scale(loss)
        if loop.mode == "forward":
            loop.tangents.backward(scaled, None, False, whole=True)
        else:
            params = [p for p in loop.transition.params if p.requires_grad]
            scaled.backward(inputs=params)
            for p, grad in zip(params, loop.problem.processes.means([p.grad for p in params], params), strict=True):
                p.grad = grad
        clip, threshold = loop.tangents.clip
        if clip is not None:
            if scaler is not None:
                for opt in loop.optimizers:
                    scaler.unscale_(opt)
            _CLIPS[clip](loop.transition.params, threshold)
        loop.given_loss = loss.detach()
        try:
            for opt in loop.optimizers:
                opt.step() if scaler is None else scaler.step(opt)
        finally:
            loop.given_loss = None
        if scaler is not None:
            scaler.update()

    def _record(self, batch: Any) -> None:
        """Keep what a replay of this step needs. Where state or what is trained was changed from outside, a window begins."""
        problem, transition = self.loop.problem, self.loop.transition
        state, trained = transition.read(), [p.requires_grad for p in transition.params]
        if self.after is not None and not (state.equals(self.after) and trained == self.trained):
            self.reset()
        self.trained = trained
        self.batches.append(batch)
        last = len(self.batches) == self.horizon
        self.tape.before_step(Checkpoint(state, problem.read_buffers()), problem.rng(), last)

    def _with_clip(self, values: Values) -> Values:
        clip, threshold = self.loop.tangents.clip
        return values if clip is None else values | {clip: [threshold]}

    def _trajectory(self, batches: list[Any], values: list[Values], per_step: bool) -> Trajectory:
        loop = self.loop
        clip, _ = loop.tangents.clip
        names = list(loop.vector.directions.wrt)
        transition = Transition(loop.optimizers, frozenset(names), clip)
        directions = Directions(transition, names, loop.problem.hypers, len(batches) if per_step else None)
        steps = len(batches)
        shift = loop.t - steps if per_step else loop.t

        def val_loss(t: int) -> Tensor:
            if loop.hyper.best is not None:
                self.read_at = transition.flatten(loop.problem.params)
            loop.problem.rng().seed(loop.hyper.seed + shift + t)  # a stream of its own, as in HyperSteps.take
            return call_val_loss(loop.hyper.validation, shift + t)

        return Trajectory(loop.problem, transition, batches, values, directions, val_loss, (steps,))

    def _close_window(self) -> None:
        loop, transition = self.loop, self.loop.transition
        self.tape.end(Checkpoint(transition.read(), loop.problem.read_buffers()))
        trajectory = self._trajectory(self.batches, self.values, per_step=True)
        with loop.problem.untouched():
            result = adjoint(trajectory, EagerStepper(trajectory), self.tape, Diagnostics(loop.problem.device))
        gradient = (self._shares(result.gradients) * torch.stack(self.scales)).sum(0)
        loop.tangents.count(result.stats["gradient_evaluations"], result.stats["hessian_products"])
        self.reset()
        loop.hyper.move(loop.t, float(result.value), gradient, self.read_at)

    def _shares(self, gradients: Tensors) -> Tensor:
        """The derivative in each number's value at each step, [steps, k]; times the value's slope there it is that in φ."""
        entries = self.loop.vector.entries
        return on_host(torch.stack([gradients[e.name][(slice(None), *e.index)] for e in entries], dim=1))

    def _look_back(self, batch: Any) -> None:
        loop = self.loop
        values, scale = loop.used.values, loop.used.slopes
        trajectory = self._trajectory([batch], [self._with_clip(values)], per_step=False)
        result = implicit(trajectory, EagerStepper(trajectory), look_back=self.horizon)
        loop.tangents.count(result.stats["gradient_evaluations"], result.stats["hessian_products"])
        shares = torch.stack([result.gradients[e.name][e.index] for e in loop.vector.entries])
        gradient = on_host(shares) * scale
        loop.hyper.move(loop.t, float(result.value), gradient, self.read_at)
