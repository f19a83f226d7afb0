"""What a tuner shows of a run: values, losses, hypergradients, the averaged and the best weights. Nothing here changes it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from hypergrad.core.shown import shown
from hypergrad.online.loop import OnlineLoop
from hypergrad.online.plan import Plan
from hypergrad.online.recipe import Recipe


class TunerView:
    """The part of `Tuner` that is read; what each is says its docstring."""

    model: torch.nn.Module
    _loop: OnlineLoop

    def __repr__(self) -> str:
        """What is tuned and its present values, of tensors in the loss the shape; steps done; the best validation loss.

        Example:
            >>> import hypergrad
            >>> model, y = torch.nn.Linear(3, 1), torch.full((64, 1), 0.5)
            >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-4)
            >>> hypergrad.Tuner(model, sgd, lambda: (0 * model(y.expand(64, 3)) - y).square().mean(), total_steps=1000)
            Tuner(lr=0.1, weight_decay=0.0001; 0 of 1,000 steps; best validation loss 0.25 after step 0)
        """
        total, hypers = self._loop.total, self._loop.vector.hypers
        tuned: list[str] = []
        for name, x in self.values.items():
            if name in hypers:  # the user's own, maybe on a GPU, which is not waited for
                tuned.append(f"{name} of shape {tuple(x.shape)}")
            else:
                tuned.append(f"{name}={shown(x[0] if x.shape == (1,) else x)}")
        parts = [
            ", ".join(tuned),
            f"{self._loop.t:,} steps" if total is None else f"{self._loop.t:,} of {total:,} steps",
        ]
        if self.best_step >= 0:
            parts.append(f"best validation loss {self.best_val_loss:.4g} after step {self.best_step:,}")
        return f"Tuner({'; '.join(parts)})"

    @property
    def stats(self) -> dict[str, int]:
        return dict(self._loop.counts)

    @property
    def plan(self) -> Plan | None:
        """What `cost` has become, or what was given; None: no bound, or not measured yet."""
        return self._loop.bound.plan or self._loop.bound.given

    @property
    def val_loss(self) -> float:
        return self._loop.hyper.val_loss

    @property
    def best_val_loss(self) -> float:
        return math.nan if self._loop.hyper.best is None else self._loop.hyper.best.loss

    @property
    def best_step(self) -> int:
        return -1 if self._loop.hyper.best is None else self._loop.hyper.best.step

    @property
    def hypergradients(self) -> dict[str, Tensor]:
        return self._loop.hyper.hypergradients

    @property
    def values(self) -> dict[str, Tensor]:
        return self._loop.vector.by_name(self._loop.writer.present())

    @property
    def applied(self) -> dict[str, Tensor]:
        return self._loop.vector.by_name(self._loop.writer.present() | self._loop.writer.applied, values=False)

    def recipe(self) -> Recipe:
        """What a plain run should use: `print(tuner.recipe())` is Python code that makes its optimizer and scheduler.

        A number that was tuned is the mean over the last third of its phase (settled_values.py), in its transform: of lr's and
        weight decay's logarithm. lr is the peak of `hypergrad.schedules.scheduler`, the shape that the tuner gives it with
        total_steps; beside a scheduler of yours, what that is made with. What stands against the recipe is in its `doubts`, and
        in the code as comments. With a log_dir it is in TensorBoard's Text tab at the end of the run.

        Example:
            >>> import hypergrad
            >>> model, x = torch.nn.Linear(3, 1), torch.randn(64, 3)
            >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            >>> tuner = hypergrad.Tuner(model, sgd, lambda: model(x).square().mean(), tune="lr", total_steps=1000)
            >>> print(tuner.recipe())
            import torch
            import hypergrad
            # From hypergrad.Tuner after 0 steps; tuned: lr.
            # Do not trust it as it stands:
            #   nothing moved: no hyperparameter step was taken.
            #   the run had 0 steps: below 400 numbers have hardly settled.
            #   it is of the first 0 of 1,000 steps.
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            scheduler = hypergrad.schedules.scheduler(optimizer, total_steps=1000)  # .step() after every optimizer.step()
        """
        return self._loop.hyper.progress.recipe(self._loop.t)

    @contextmanager
    def averaged(self) -> Iterator[torch.nn.Module]:
        """The running average of the weights in the model, and the weights themselves back on the way out."""
        with self._loop.tangents.average.in_model():
            yield self.model

    @contextmanager
    def best(self) -> Iterator[torch.nn.Module]:
        """The weights and buffers at the best validation loss in the model; what was there back on the way out.

        Where the loss was read at the running average of the weights, that average is what was kept. Best is the lowest reading,
        but where readings are noisy, as on random batches, the one with the least max(reading, mean of the last 5), as the lowest
        is luck there (see best_weights.py). Tensors in the loss stay as they are. Random numbers go on afterwards as if none
        had been drawn inside. To end a run with these weights:

            with tuner.best() as model:
                best = copy.deepcopy(model.state_dict())
            model.load_state_dict(best)

        Raises:
            RuntimeError: with keep_best=False, and where no finite validation loss has been read yet.
        """
        if self._loop.hyper.best is None:
            raise RuntimeError("no best weights are kept: make the tuner with keep_best=True.")
        with self._loop.hyper.best.in_model():
            yield self.model
