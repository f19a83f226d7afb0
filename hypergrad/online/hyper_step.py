"""The hyperparameter step: a validation loss, its gradient along the tangents, and one step of φ."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean

import torch
from torch import Tensor

from hypergrad.core.problem import Problem
from hypergrad.core.readout import Readout
from hypergrad.logging import Journal, short
from hypergrad.online.backtracking import PAIRS, Backtracking
from hypergrad.online.best_weights import BestWeights
from hypergrad.online.hyper_vector import HyperVector
from hypergrad.online.phases import STEP_NAMES
from hypergrad.online.tangents import Tangents
from hypergrad.online.validation_noise import ValidationNoise

OTHER_DRAWS = (
    2**31
)  # seeds of second readings, far from those of the first; torch's CPU generator takes 32 bits of a seed
# Numbers whose tangent outgrew the weights: training is chaotic there, its hypergradient is noise, and less is safe.
_SAFE_DOWN = frozenset({"lr", "momentum"})


class HyperSteps:
    """Moves the hyperparameters.

    Args:
        validation: the user's validation loss.
        average: take it at the running average of the weights while lr, momentum, … are tuned.
        seed: of the random numbers that it draws.
        stats: counts, shared with the loop.
    """

    def __init__(
        self,
        problem: Problem,
        hyper_vector: HyperVector,
        tangents: Tangents,
        journal: Journal,
        validation: Callable[..., Tensor],
        average: bool,
        seed: int,
        stats: dict[str, int],
    ):
        self.problem, self.hyper_vector, self.tangents, self.journal = problem, hyper_vector, tangents, journal
        self.transition, self.validation, self.average, self.seed = tangents.transition, validation, average, seed
        self.stats, self.frozen, self.val_loss = stats, False, math.nan
        self.best: BestWeights | None = None  # is told every validation loss
        self.backtracking: Backtracking | None = None  # the same; None: lr is not tuned, or steps are replayed
        self.noise = ValidationNoise()
        self.hypergradients: dict[str, Tensor] = {}
        self.losses: list[float] = []  # of the training steps since the last record

    def take(self, t: int, warming: bool) -> bool:
        """One hyperparameter step from the tangents, after t training steps; only a look once nothing is tuned any more.

        Args:
            warming: whether the warm start is under way; its readings say nothing of the run.

        Returns:
            whether the validation loss has risen, so that training should go back (see backtracking.py).
        """
        if not self.hyper_vector.moving:
            self.val_loss = float(self.problem.evaluate(self.validation, t, self.seed + t))
            self._note_best(t, None)
            self._record(t, {})
            return self._risen(t, self.val_loss, None, warming)
        with self._where() as tangent:
            value, of_params, of_hypers, _ = self.problem.validate(self.validation, t, self.seed + t)
            again = None
            if tangent is not None and self.noise.wanted and not warming and not self.frozen:
                again = self.problem.validate(self.validation, t, self.seed + OTHER_DRAWS + t).of_params
        readout = Readout()
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
        gradient, slope = torch.zeros(len(self.hyper_vector), dtype=torch.float64), self.hyper_vector.slope()
        if tangent is not None:
            gradient[self.hyper_vector.moving] = torch.tensor(read["hypergradient"], dtype=torch.float64)
        for j, entry in enumerate(self.hyper_vector.entries):
            if entry.group is None and entry.name in found:
                direct = torch.tensor(read[f"direct {entry.name}"], dtype=torch.float64)
                gradient[j] += direct.view(found[entry.name].shape)[entry.index] * slope[j]
        theta = self.tangents.average if self._averages() else None
        self._moved(t, read["value"][0], gradient, read, theta)
        if again is not None:
            self._note_noise(t, read["hypergradient"], read["another hypergradient"])
        return self._risen(t, read["value"][0], theta, warming)

    def _note_noise(self, t: int, one: list[float], other: list[float]) -> None:
        """Say once that the validation batch is too small, where it is."""
        self.stats["val_evaluations"] += 1
        self.noise.note(one, other)
        factor = None if self.noise.wanted else self.noise.size_factor()
        if factor is not None:
            self.journal.note_once(
                t,
                "two draws of val_loss at the same weights gave hypergradients that hardly agree: tuning is mostly a random "
                f"walk. Give val_loss a batch at least {factor} times as large, or the whole validation set.",
            )

    def _risen(self, t: int, loss: float, theta: Tensor | None, warming: bool) -> bool:
        """Whether the validation loss, read at theta (None: the model's weights), is above its lowest by more than chance.

        A suspect is read again at the average of the weights: while lr is large the weights themselves jump about it.
        """
        if self.backtracking is None or self.frozen or warming:
            return False
        theta = self.transition.flatten(self.transition.params) if theta is None else theta
        average = self.tangents.average

        def read_both(other: Tensor) -> tuple[list[float], list[float]]:
            return self._read_both(t, theta if average is None else average, other)

        return self.backtracking.read(t, loss, theta, self.hyper_vector.moving, read_both)

    def _read_both(self, t: int, one: Tensor, other: Tensor) -> tuple[list[float], list[float]]:
        """The validation loss at two vectors of weights in turn, with the same random numbers, PAIRS times.

        `other` is the record's: it is read with the buffers that it had, `one` with the present ones.
        """
        assert self.backtracking is not None
        theta, found = self.transition.flatten(self.transition.params), list[Tensor]()
        buffers = self.problem.read_buffers()
        try:
            for draw in range(PAIRS):
                for weights, its_buffers in ((one, buffers), (other, self.backtracking.buffers)):
                    self.transition.load(weights)
                    self.problem.write_buffers(its_buffers)
                    found.append(self.problem.evaluate(self.validation, t, self.seed + OTHER_DRAWS + PAIRS * t + draw))
        finally:
            self.transition.load(theta)
            self.problem.write_buffers(buffers)
        self.stats["val_evaluations"] += 2 * PAIRS
        losses = torch.stack([x.reshape(()) for x in found]).tolist()  # one wait for a device
        return losses[::2], losses[1::2]

    def _ask(self, readout: Readout) -> None:
        """What a step of φ needs besides a gradient, and what is recorded of it."""
        self.tangents.ask_newton(readout)
        self.tangents.ask_hits(readout)
        if self.journal.recorder is not None and self.tangents.tangent is not None:
            weights = self.transition.flatten(self.transition.params)
            sizes = torch.linalg.vector_norm(self.tangents.tangent.theta, dim=1) / torch.linalg.vector_norm(weights)
            readout.ask("sizes", sizes)

    def _averages(self) -> bool:
        """Whether the validation loss is taken at the running average of the weights."""
        moving = {self.hyper_vector.entries[j].name for j in self.hyper_vector.moving}
        return self.average and bool(moving & STEP_NAMES)

    @contextmanager
    def _where(self) -> Iterator[Tensor | None]:
        """The weights at which the validation loss is taken, in the model; yields their tangent [k, n]."""
        if not self._averages():
            yield None if self.tangents.tangent is None else self.tangents.tangent.theta
            return
        with self.tangents.averaged():
            yield self.tangents.average_tangent

    def move(self, t: int, value: float, gradient: Tensor, theta: Tensor | None) -> None:
        """One hyperparameter step from a validation loss and dL/dφ [k]. theta: see `_moved`."""
        readout = Readout()
        self._ask(readout)
        self._moved(t, value, gradient, readout.fetch(), theta)

    def _moved(
        self, t: int, value: float, gradient: Tensor, read: Mapping[str, list[float]], theta: Tensor | None
    ) -> None:
        """theta: the weights [n] at which the loss was read; None: those in the model."""
        self.tangents.note_hits(read)
        self.val_loss, sizes = value, dict(zip(self.hyper_vector.moving, read.get("sizes", [])))
        self._note_best(t, theta)
        self.stats["val_evaluations"] += 1
        in_value = gradient / self.hyper_vector.slope()
        self.hypergradients = self.hyper_vector.directions.pack(in_value)
        if not (math.isfinite(value) and bool(torch.isfinite(gradient).all())):
            self.stats["nonfinite_hypergradients"] += 1
            self.journal.note_once(t, "a validation loss or hypergradient was not finite: hyperparameters stayed.")
        elif not self.frozen:
            hit = self.tangents.take_hits()
            sizes = {j: 0.0 if hit[j] else size for j, size in sizes.items()}  # those tangents start again
            safe_down = torch.tensor([e.name in _SAFE_DOWN for e in self.hyper_vector.entries])
            self.hyper_vector.step(gradient, hit & safe_down, self.tangents.take_newton(read))
            self.hyper_vector.write_hypers()
            self.stats["hyper_steps"] += 1
        self._record(t, sizes)

    def _note_best(self, t: int, theta: Tensor | None) -> None:
        if self.best is not None:
            self.best.read(t, self.val_loss, theta)

    def say_best(self, t: int) -> None:
        """Record, after t steps, how the run ends and where it was best; once for each answer."""
        sentence = None if self.best is None else self.best.sentence(t)
        if sentence is not None:
            self.journal.note_once(t, sentence, warn=False)

    def _record(self, t: int, sizes: Mapping[int, float]) -> None:
        losses, self.losses = self.losses, []
        recorder, labels = self.journal.recorder, self.hyper_vector.labels
        if recorder is None:
            return
        if not recorder.last and self.stats["val_evaluations"] <= 1:  # a run that begins, rather than one that goes on
            recorder.begin(self._shown([recorder.hparams[f"{label} start"] for label in labels]))
        row = self._shown(self.hyper_vector.value.tolist()) | {"loss/val": self.val_loss}
        if self.best is not None:
            row["loss/val_best"] = self.best.loss
        if losses:
            row["loss/train"] = fmean(losses)
        self.journal.scalars(t, row | self._diagnosis(sizes))

    def _shown(self, values: Sequence[float]) -> dict[str, float]:
        """Values of all that is tuned, those that move by orders of magnitude also by their logarithm: charts are linear."""
        row: dict[str, float] = {}
        for name, x, kind in zip(short(self.hyper_vector.labels), values, self.hyper_vector.kinds, strict=True):
            row[f"hyper/{name}"] = x
            if kind.kind == "positive":
                row[f"hyper/log10_{name}"] = math.log10(x)
        return row

    def _diagnosis(self, sizes: Mapping[int, float]) -> dict[str, float]:
        """Whether the hypergradients dL/dφ are to be believed, and what they cost so far in gradients per training step.

        sizes: norms of the tangents of θ over the norm of θ.
        """
        mean, noise, row = self.hyper_vector.descent.smoothed(), self.hyper_vector.descent.noise(), {}
        names = short(self.hyper_vector.labels)
        for j in self.hyper_vector.moving:
            if math.isfinite(mean[j]):
                band = {"": mean[j], "_low": mean[j] - noise[j], "_high": mean[j] + noise[j]}
                row |= {f"val_hypergradient/{names[j]}{end}": float(x) for end, x in band.items()}
        row |= {f"tangent/{names[j]}": size for j, size in sizes.items()}
        row["run/cost_over_plain"] = gradient_evaluations(self.stats) / max(self.stats["steps"], 1)
        row["run/rollbacks"] = self.stats["rollbacks"]
        row["run/backtracks"] = self.stats["backtracks"]
        row["run/steps_passed_over"] = self.stats["nonfinite_steps"] + self.stats["spikes"]
        return row


def gradient_evaluations(stats: Mapping[str, int]) -> int:
    """What `tuner.stats` amounts to in gradients of a loss; a Hessian-vector product counts as two of them.

    A forward and a backward pass are 3 products with each weight matrix, a Hessian-vector product is 4 more. A validation loss
    without its gradient, as in the last tenth of a run, is not counted; a second reading (see backtracking.py) counts as one.
    """
    return stats["gradients"] + 2 * stats["hessian_products"] + stats["val_evaluations"]
