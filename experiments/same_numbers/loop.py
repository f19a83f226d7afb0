"""A training loop with a tuner, of a small net, in all the ways that loops are written; recorded at every step."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hypergrad
from experiments.same_numbers.names import keywords
from experiments.same_numbers.nets import OPTIMIZERS, ROWS, net, plain_sgd, rows
from experiments.same_numbers.record import Recorder, of_tuner, weights

STEPS, QUICK = 150, 60
BATCH = 16
NAN_AT, HUGE_AT = (40, 41, 91, 92, 93), 90  # steps whose batch is NaN, or a hundred million times too large
SEVENTH = 7  # of steps at which something is otherwise
LOOK_EVERY = 25  # steps between looks at `averaged` and `best`

Scheduler = Callable[[torch.optim.Optimizer, int], Any]


@dataclass(frozen=True)
class Loop:
    """One way of writing the loop.

    Attributes:
        optimizer: a name of OPTIMIZERS; with `second` an SGD has the later layers.
        total: the tuner is told the number of steps.
        clip: threshold of `clip_grad_norm_`.
        accumulate: backward passes a step.
        zeros: gradients are set to zero, not to None.
        bad_batches: NaN and huge inputs at a few steps.
        bad_validation: the validation loss is NaN at ten steps of every thirty.
        plain_steps: every seventh step is by `loss.backward()`.
        changed: every seventh step the gradients are halved and have noise added, of which the tuner is not told.
        groups: a param group for weights, one for biases.
        scheduler: `scheduler(optimizer, steps)`, made before the tuner.
        step: `tuner.step(batch)` in place of the loop.
        penalty: the loss reads a tensor that is tuned.
        looks: read `tuner.averaged()` and `tuner.best()` in between.
        log: write a log, which is recorded at the end.
        resume: save everything half-way, make it anew, load.
        freeze: stop tuning half-way.
        tuner: further arguments of the Tuner.
    """

    optimizer: str = "sgd"
    total: bool = True
    clip: float | None = None
    accumulate: int = 1
    zeros: bool = False
    batch_norm: bool = False
    bad_batches: bool = False
    bad_validation: bool = False
    plain_steps: bool = False
    changed: bool = False
    scaler: bool = False
    second: bool = False
    groups: bool = False
    scheduler: Scheduler | None = None
    step: bool = False
    penalty: bool = False
    looks: bool = False
    log: bool = False
    resume: bool = False
    freeze: bool = False
    tuner: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, record: Recorder, quick: bool) -> None:
        steps = QUICK if quick else STEPS
        with tempfile.TemporaryDirectory() as folder:
            parts = Parts(self, steps, folder)
            for t in range(steps):
                if self.resume and t == steps // 2:
                    parts = parts.made_anew(folder)
                if self.freeze and t == steps // 2:
                    parts.tuner.freeze()
                loss = parts.take(t)
                record.add(of_tuner(parts.tuner) | {"loss": loss, "weights": weights(parts.model)})
                if self.looks and t % LOOK_EVERY == LOOK_EVERY - 1:
                    record.add(parts.looks())
            parts.tuner.close()
            if self.log:
                for line in Path(folder, "metrics.jsonl").read_text().splitlines():
                    record.add({"log": json.loads(line)})


class Parts:
    """What a loop is made of, and what a checkpoint of it has."""

    def __init__(self, loop: Loop, steps: int, folder: str):
        self.loop, self.steps = loop, steps
        self.model = net(loop.batch_norm)
        self.params = [*self.model.parameters()]
        self.train, self.val, self.now = rows(), rows(5), 0
        self.optimizers = self._optimizers()
        self.schedulers = [] if loop.scheduler is None else [loop.scheduler(opt, steps) for opt in self.optimizers]
        self.scaler = torch.amp.GradScaler("cpu") if loop.scaler else None
        options: dict[str, Any] = {"clip_norm": loop.clip, "scaler": self.scaler} | dict(loop.tuner)
        options |= {"total_steps": steps} if loop.total else {}
        options |= {"log_dir": folder} if loop.log else {}
        if loop.penalty:
            options["hypers"] = {"penalty": hypergrad.Hyperparameter(1e-3, kind="positive")}
        if loop.step:
            options["loss"] = self._loss
        optimizer = self.optimizers if loop.second else self.optimizers[0]
        self.tuner = hypergrad.Tuner(self.model, optimizer, self._val_loss, **keywords(hypergrad.Tuner, options))

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        make = OPTIMIZERS[self.loop.optimizer]
        if self.loop.second:
            return [make(self.params[:2]), plain_sgd(self.params[2:])]
        if self.loop.groups:
            biases = [p for p in self.params if p.dim() == 1]
            return [make([{"params": [p for p in self.params if p.dim() > 1]}, {"params": biases, "lr": 1e-3}])]
        return [make(self.params)]

    def _val_loss(self) -> Tensor:
        bad = self.loop.bad_validation and self.now // 10 % 3 == 1
        return cross_entropy(self.model(self.val[0]), self.val[1]) * (float("nan") if bad else 1.0)

    def _loss(self, model: nn.Module, batch: Any, hypers: Any = None) -> Tensor:
        loss = cross_entropy(model(batch[0]), batch[1])
        if self.loop.penalty:
            of = self.tuner.hypers if hypers is None else hypers
            loss = loss + of["penalty"] * sum(p.square().sum() for p in model.parameters())
        return loss

    def _batch(self, t: int) -> tuple[Tensor, Tensor]:
        picked = torch.randint(ROWS, (BATCH,))
        x, y = self.train[0][picked], self.train[1][picked]
        if self.loop.bad_batches and t in NAN_AT:
            x = x * float("nan")
        if self.loop.bad_batches and t == HUGE_AT:
            x = x * 1e8
        return x, y

    def take(self, t: int) -> float:
        """One training step; the loss of its last batch."""
        self.now = t
        if self.loop.step:
            return self.tuner.step(self._batch(t)).item()
        loss = torch.tensor(0.0)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=not self.loop.zeros)
        for _ in range(self.loop.accumulate):
            loss = self._loss(self.model, self._batch(t)) / self.loop.accumulate
            backward = Tensor.backward if self.loop.plain_steps and t % SEVENTH == 0 else self.tuner.backward
            backward(self.scaler.scale(loss) if self.scaler else loss)
        if self.loop.changed and t % SEVENTH == 0:
            for p in self.params:
                assert p.grad is not None
                p.grad.mul_(0.5).add_(torch.randn_like(p), alpha=1e-3)
        self._clip()
        for optimizer in self.optimizers:
            if self.scaler:
                self.scaler.step(optimizer)
            else:
                optimizer.step()
        if self.scaler:
            self.scaler.update()
        for scheduler in self.schedulers:
            scheduler.step()
        return loss.item()

    def _clip(self) -> None:
        if self.loop.clip is None:
            return
        if self.scaler:
            for optimizer in self.optimizers:
                self.scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(self.params, self.loop.clip)

    def looks(self) -> dict[str, Any]:
        """Weights and loss at `averaged` and `best`, and the weights afterwards."""
        found: dict[str, Any] = {}
        for name in ("averaged", "best"):
            with getattr(self.tuner, name)() as model, torch.no_grad():
                found[name] = {"weights": weights(model), "loss": self._val_loss().item()}
        return found | {"weights": weights(self.model)}

    def made_anew(self, folder: str) -> Parts:
        """The same loop in fresh objects, with the state of these from a file; torch's random numbers go on."""
        file, parts = io.BytesIO(), self._saved()
        torch.save([part.state_dict() for part in parts], file)
        self.tuner.close()
        numbers = torch.get_rng_state()
        fresh = Parts(self.loop, self.steps, folder)
        file.seek(0)
        for part, state in zip(fresh._saved(), torch.load(file, weights_only=True), strict=True):
            part.load_state_dict(state)
        torch.set_rng_state(numbers)
        return fresh

    def _saved(self) -> list[Any]:
        scaler = [self.scaler] if self.scaler else []
        return [self.model, *self.optimizers, *self.schedulers, *scaler, self.tuner]
