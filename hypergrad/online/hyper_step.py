"""The hyperparameter step: a validation loss, its gradient along the tangents, and one step of φ."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hypergrad.core.problem import Problem
from hypergrad.core.readout import Readout
from hypergrad.online.best_weights import BestWeights
from hypergrad.online.outer_optimizer import OuterOptimizer
from hypergrad.online.policies.backtracking import LossRecord
from hypergrad.online.policies.phases import STEP_NAMES
from hypergrad.online.progress import Progress
from hypergrad.online.tangents import Tangents
from hypergrad.online.validation_noise import ValidationNoise

# Seeds of second readings, far from those of the first: torch's CPU generator takes 32 bits of a seed
OTHER_DRAWS = 2**31
DRAWS_OF_A_RANK = 2**24  # from one process's seeds to the next one's: each draws validation batches of its own


class HyperSteps:
    """Moves the hyperparameters.

    Args:
        validation: the user's validation loss.
        average: take it at the running average of the weights while lr, momentum, … are tuned.
        seed: of the random numbers that it draws.
        best: is told every validation loss; None: no weights are kept.
        record: is told every validation loss and says when to go back; None: Backtracking is left out, lr is not tuned, or steps
            are replayed.
        counts: what happened, for `tuner.stats`.
    """

    def __init__(
        self,
        problem: Problem,
        outer: OuterOptimizer,
        tangents: Tangents,
        progress: Progress,
        validation: Callable[..., Tensor],
        average: bool,
        seed: int,
        best: BestWeights | None,
        record: LossRecord | None,
        counts: dict[str, int],
    ):
        self.problem, self.outer, self.vector, self.tangents = problem, outer, outer.vector, tangents
        self.transition, self.progress, self.journal = tangents.transition, progress, progress.journal
        self.processes = problem.processes
        self.validation, self.average, self.counts = validation, average, counts
        self.seed = seed + DRAWS_OF_A_RANK * self.processes.rank
        self.best, self.record = best, record
        self.noise = ValidationNoise()
        self.frozen, self.val_loss = False, math.nan
        self.validated = 0  # how often the loss was taken with its gradient
        self.moved = False  # φ has taken a step
        self.hypergradients: dict[str, Tensor] = {}

    def freeze(self) -> None:
        self._set_frozen(True)

    def _set_frozen(self, frozen: bool) -> None:
        self.frozen, self.tangents.forward.allowed = frozen, not frozen

    def take(self, t: int, warming: bool, coupled: bool, twice: bool) -> bool:
        """One hyperparameter step from the tangents, after t training steps; once nothing is tuned any more, the loss alone.

        Args:
            warming: whether the warm start is under way; its readings say nothing of the run.
            coupled: whether optimizers go down losses of their own that depend on the same parameters, as in a GAN: a rise is no
                sign of a large lr there.
            twice: whether a second draw of the loss, which tells how noisy it is, may be paid for.

        Returns:
            whether the validation loss has risen, so that training should go back (see backtracking.py).
        """
        if not self.vector.moving:
            self.val_loss = self._mean_losses([self.problem.evaluate(self.validation, t, self.seed + t)])[0]
            theta = self._weights_read()
            self._note_best(t, theta)
            self.progress.record(t, self.val_loss, {}, self.validated <= 1)
            return self._risen(t, self.val_loss, theta, warming or coupled)
        again = None
        with self._where() as tangent:
            frozen = not all(p.requires_grad for p in self.transition.params)  # those that have no tangent
            with self.tangents.calibration.time_reading():
                value, of_params, of_hypers, _ = self.problem.validate(self.validation, t, self.seed + t, frozen)
            if twice and tangent is not None and self.noise.wanted and not warming and not self.frozen:
                again = self.problem.validate(self.validation, t, self.seed + OTHER_DRAWS + t, frozen).of_params
        readout = Readout(self.processes)
        readout.ask("value", value)
        if tangent is not None:
            readout.ask("hypergradient", tangent @ self.transition.flatten(of_params))
            if again is not None:
                readout.ask("another hypergradient", tangent @ self.transition.flatten(again))
        found = {name: g for name, g in zip(self.problem.hypers, of_hypers, strict=True) if g is not None}
        for name, g in found.items():
            readout.ask(f"direct {name}", g)
        self._ask(readout)
        read = readout.fetch()
        gradient = self._gradient(read, {name: g.shape for name, g in found.items()})
        theta = self._weights_read()
        self._move(t, read["value"][0], gradient, read, theta)
        if again is not None:
            self._note_noise(t, read["hypergradient"], read["another hypergradient"])
        return self._risen(t, read["value"][0], theta, warming or coupled)

    # dL/dφ_j = ∂L/∂θ · dθ/dφ_j + ∂L/∂x_j · dx_j/dφ_j
    def _gradient(self, read: Mapping[str, list[float]], direct: Mapping[str, torch.Size]) -> Tensor:
        """dL/dφ [k]. direct: the shapes of ∂L/∂x of tensors that the validation loss reads itself."""
        gradient, slope = torch.zeros(len(self.vector), dtype=torch.float64), self.vector.slope()
        if "hypergradient" in read:
            gradient[self.vector.moving] = torch.tensor(read["hypergradient"], dtype=torch.float64)
        for j, entry in enumerate(self.vector.entries):
            if entry.group is None and entry.name in direct:
                of_value = torch.tensor(read[f"direct {entry.name}"], dtype=torch.float64)
                gradient[j] += of_value.view(direct[entry.name])[entry.index] * slope[j]
        return gradient

    def _note_noise(self, t: int, one: list[float], other: list[float]) -> None:
        """Say once that the validation batch is too small, where it is."""
        self.counts["val_evaluations"] += 1
        self.noise.note(one, other)
        factor = None if self.noise.wanted else self.noise.size_factor()
        if factor is not None:
            self.journal.note_once(
                t,
                "two draws of val_loss at the same weights gave hypergradients that hardly agree: tuning is mostly a random "
                f"walk. Give val_loss a batch at least {factor} times as large, or the whole validation set.",
            )

    def _risen(self, t: int, loss: float, theta: Tensor | None, warming: bool) -> bool:
        """Whether the validation loss, read at theta, is above its lowest by more than chance.

        A suspect is read again at the average of the weights: while lr is large the weights themselves jump about it.
        """
        if self.record is None or self.frozen or warming or theta is None:
            return False
        average = self.tangents.average.theta

        def read_both(other: Tensor) -> tuple[list[float], list[float]]:
            return self._read_both(t, theta if average is None else average, other)

        return self.record.read(t, loss, theta, self.vector.moving, read_both)

    def _read_both(self, t: int, one: Tensor, other: Tensor) -> tuple[list[float], list[float]]:
        """The validation loss at two vectors of weights in turn, with the same random numbers, several times.

        `other` is the record's: it is read with the buffers that it had, `one` with the present ones.
        """
        assert self.record is not None
        theta, found, pairs = self.transition.flatten(self.transition.params), list[Tensor](), self.record.policy.pairs
        buffers = self.problem.read_buffers()
        try:
            for draw in range(pairs):
                for weights, its_buffers in ((one, buffers), (other, self.record.buffers)):
                    self.transition.load(weights)
                    self.problem.write_buffers(its_buffers)
                    found.append(self.problem.evaluate(self.validation, t, self.seed + OTHER_DRAWS + pairs * t + draw))
        finally:
            self.transition.load(theta)
            self.problem.write_buffers(buffers)
        self.counts["val_evaluations"] += 2 * pairs
        losses = self._mean_losses(found)
        return losses[::2], losses[1::2]

    def _ask(self, readout: Readout) -> None:
        """What a step of φ needs besides a gradient, and what is recorded of it."""
        self.tangents.curvature.ask_newton(readout)
        self.tangents.cap.ask(readout)
        if self.progress.on and self.tangents.tangent is not None:
            weights = self.transition.flatten(self.transition.params)
            sizes = torch.linalg.vector_norm(self.tangents.tangent.theta, dim=1) / torch.linalg.vector_norm(weights)
            readout.ask_own("sizes", sizes)

    def _mean_losses(self, losses: Sequence[Tensor]) -> list[float]:
        """The means over processes, by one wait for a device."""
        readout = Readout(self.processes)
        readout.ask("losses", torch.stack([x.reshape(()) for x in losses]))
        return readout.fetch()["losses"]

    def _weights_read(self) -> Tensor | None:
        """A copy of the weights [n] at which the validation loss is read, one for all that keep them; None: nobody does."""
        if self.best is None and self.record is None:
            return None
        average = self.tangents.average.theta if self._averages() else None
        return self.transition.flatten(self.transition.params) if average is None else average.clone()

    def _averages(self) -> bool:
        """Whether the validation loss is taken at the running average of the weights."""
        moving = {self.vector.entries[j].name for j in self.vector.moving} - self.vector.hypers.keys()
        return self.average and bool(moving & STEP_NAMES)

    @contextmanager
    def _where(self) -> Iterator[Tensor | None]:
        """The weights at which the validation loss is taken, in the model; yields their tangent [k, n]."""
        frozen = self.tangents.frozen
        with frozen.differentiable(frozen.present()):
            if not self._averages():
                yield None if self.tangents.tangent is None else self.tangents.tangent.theta
                return
            with self.tangents.average.in_model():
                yield self.tangents.average.tangent

    def move(self, t: int, value: float, gradient: Tensor, theta: Tensor | None) -> None:
        """One hyperparameter step from a validation loss and dL/dφ [k]. theta: see `_move`."""
        readout = Readout(self.processes)
        self._ask(readout)
        self._move(t, value, gradient, readout.fetch(), theta)

    def _move(
        self, t: int, value: float, gradient: Tensor, read: Mapping[str, list[float]], theta: Tensor | None
    ) -> None:
        """theta: the weights [n] at which the loss was read; None: those in the model."""
        self.tangents.cap.note(read)
        self.val_loss, sizes = value, dict(zip(self.vector.moving, read.get("sizes", [])))
        self._note_best(t, theta)
        self.counts["val_evaluations"] += 1
        self.validated += 1
        in_value = gradient / self.vector.slope()
        self.hypergradients = self.vector.directions.pack(in_value)
        if not (math.isfinite(value) and bool(torch.isfinite(gradient).all())):
            self.counts["nonfinite_hypergradients"] += 1
            self.journal.note_once(t, "a validation loss or hypergradient was not finite: hyperparameters stayed.")
        elif not self.frozen:
            hit = self.tangents.take_hits()
            sizes = {j: 0.0 if hit[j] else size for j, size in sizes.items()}  # those tangents start again
            self.outer.step(gradient, hit, self.tangents.curvature.take_newton(read))
            self.vector.write_hypers()
            self.progress.settled.note()
            self.moved = True
            self.counts["hyper_steps"] += 1
        self.progress.record(t, self.val_loss, sizes, self.validated <= 1)

    def _note_best(self, t: int, theta: Tensor | None) -> None:
        if self.best is not None:
            self.best.read(t, self.val_loss, theta)

    def state_dict(self) -> dict[str, Any]:
        return {
            "frozen": self.frozen,
            "val_loss": self.val_loss,
            "validated": self.validated,
            "moved": self.moved,
            "noise": self.noise.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._set_frozen(bool(state["frozen"]))
        self.val_loss = float(state["val_loss"])
        self.validated, self.moved = int(state["validated"]), bool(state["moved"])
        self.noise.load_state_dict(state["noise"])
