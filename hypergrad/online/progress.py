"""What is recorded of a run at every hyperparameter step: values, losses, and whether the hypergradients are to be believed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from hypergrad.logging import Journal, short, tagged
from hypergrad.online.best_weights import BestWeights
from hypergrad.online.outer_optimizer import OuterOptimizer
from hypergrad.online.param_groups import ParamGroupWriter
from hypergrad.online.recipe import Recipe
from hypergrad.online.settled_values import SettledValues


class Progress:
    """Writes rows to the journal.

    Args:
        writer: knows the lr that was really used.
        best: the best weights, where they are kept.
        counts: what happened, for `tuner.stats`.
        settled: follows the values.
        recipe: what a plain run should use, after so many steps.
        replays: whether a step's own gradient is not among the counted ones, which are those of replayed steps.
    """

    def __init__(
        self,
        journal: Journal,
        outer: OuterOptimizer,
        writer: ParamGroupWriter,
        best: BestWeights | None,
        counts: Mapping[str, int],
        settled: SettledValues,
        recipe: Callable[[int], Recipe],
        replays: bool,
    ):
        self.writer, self.settled, self.recipe, self.replays = writer, settled, recipe, replays
        self.journal, self.outer, self.vector, self.best, self.counts = journal, outer, outer.vector, best, counts
        self.losses: list[float] = []  # of the training steps since the last row

    @property
    def on(self) -> bool:
        return self.journal.on

    def note_training_loss(self, loss: float) -> None:
        self.losses.append(loss)

    def record(self, t: int, val_loss: float, sizes: Mapping[int, float], first: bool) -> None:
        """A row after t training steps.

        Args:
            sizes: norms of the tangents of θ over the norm of θ.
            first: of the run.
        """
        losses, self.losses = self.losses, []
        journal = self.journal
        if not journal.on:
            return
        if not journal.begun and first:  # a run that begins, rather than one that goes on
            journal.begin(self._shown([journal.hparams[f"{label} start"] for label in self.vector.labels]))
        row = self._shown(self.vector.value.tolist()) | self._applied() | {"loss/val": val_loss}
        if self.best is not None:
            row["loss/val_best"] = self.best.loss
        if losses:
            row["loss/train"] = fmean(losses)
        journal.scalars(t, row | self._diagnosis(sizes))

    def _shown(self, values: Sequence[float]) -> dict[str, float]:
        """Values of all that is tuned, those that move by orders of magnitude also by their logarithm: charts are linear."""
        row: dict[str, float] = {}
        for name, x, kind in zip(tagged(self.vector.labels), values, self.vector.kinds, strict=True):
            row[f"hyper/{name}"] = x
            if kind.kind == "positive":
                row[f"hyper/log10_{name}"] = math.log10(x)
        return row

    def _applied(self) -> dict[str, float]:
        """As the last step used them: every lr, its scale times its shape, and what else something else writes."""
        row: dict[str, float] = {}
        for name, e in zip(short(self.vector.labels), self.vector.entries, strict=True):
            key = (e.name, e.group)
            if e.group is not None and key in self.writer.applied and (e.name == "lr" or key in self.writer.bases):
                row[name.replace(e.name, f"{e.name}/applied", 1)] = self.writer.applied[e.name, e.group]
        return row

    def _diagnosis(self, sizes: Mapping[int, float]) -> dict[str, float]:
        """Whether the hypergradients dL/dφ are to be believed, and what they cost so far, in gradients of a plain run."""
        mean, noise, row, counts = self.outer.smoothed(), self.outer.noise(), {}, self.counts
        names = tagged(self.vector.labels)
        for j in self.vector.moving:
            if math.isfinite(mean[j]):
                band = {"": mean[j], "_low": mean[j] - noise[j], "_high": mean[j] + noise[j]}
                row |= {f"val_hypergradient/{names[j]}{end}": float(x) for end, x in band.items()}
        row |= {f"tangent/{names[j]}": size for j, size in sizes.items()}
        row["run/cost_over_plain"] = cost_over_plain(counts, self.replays)
        row["run/rollbacks"] = counts["rollbacks"]
        row["run/backtracks"] = counts["backtracks"]
        row["run/steps_passed_over"] = counts["nonfinite_steps"] + counts["spikes"]
        return row

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self.losses), "settled": self.settled.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.losses = list(state["losses"])
        self.settled.load_state_dict(state["settled"])

    def say_end(self, t: int) -> None:
        """Record, after t steps, how the run ends, where it was best, and what a plain run should use; once for each answer."""
        sentence = None if self.best is None else self.best.sentence(t)
        if sentence is not None:
            self.journal.note_once(t, sentence, warn=False)
        if t and self.journal.recorder is not None:
            self.journal.recipe(t, self.recipe(t).code())


def gradient_evaluations(stats: Mapping[str, int]) -> int:
    """What `tuner.stats` amounts to in gradients of a loss; a Hessian-vector product counts as two of them.

    A forward and a backward pass are 3 products with each weight matrix, a Hessian-vector product is 4 more. A validation loss
    without its gradient, as in the last tenth of a run, is not counted; a second reading (see backtracking.py) counts as one.
    """
    return stats["gradients"] + 2 * stats["hessian_products"] + stats["val_evaluations"]


def cost_over_plain(stats: Mapping[str, int], replays: bool = False) -> float:
    """Gradient evaluations over those of a plain run, which takes one gradient a call of `tuner.backward`.

    Args:
        replays: of mode="unrolled" and "implicit", where a step takes one gradient that `stats` does not count.

    Example:
        A hundred steps of four accumulated gradients each; 50 Hessian-vector products, 20 validation losses.

        >>> cost_over_plain({"steps": 100, "gradients": 400, "hessian_products": 50, "val_evaluations": 20})
        1.3
    """
    own = stats["steps"] if replays else stats["gradients"]
    extra = own if replays else 0
    return (gradient_evaluations(stats) + extra) / max(own, 1)
