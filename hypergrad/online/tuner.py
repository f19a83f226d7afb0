"""The online tuner: rides on a live `torch.optim` optimizer and moves its hyperparameters while the model trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hypergrad.core.graph import check_scalar
from hypergrad.core.hyperparameters import as_hyperparameter
from hypergrad.core.problem import Problem
from hypergrad.differentiate.arguments import Optimizers, as_optimizers, check_names, clipping, leaves
from hypergrad.logging import Journal
from hypergrad.online.backtracking import Backtracking
from hypergrad.online.best_weights import BestWeights
from hypergrad.online.divergence_guard import DivergenceGuard
from hypergrad.online.hooks import attach, check_free
from hypergrad.online.hyper_step import HyperSteps
from hypergrad.online.hyper_vector import HyperVector, specification
from hypergrad.online.loop import OnlineLoop
from hypergrad.online.low_rank_hessian import EVERY, LowRankHessian
from hypergrad.online.lr_warm_start import LrWarmStart
from hypergrad.online.param_groups import ParamGroupWriter
from hypergrad.online.replay_window import ReplayWindow
from hypergrad.online.tangents import Tangents
from hypergrad.online.tuner_arguments import check_curvature, check_numbers
from hypergrad.optimizers.transition import CLIPS, Transition


class Tuner:
    r"""Tune hyperparameters of a live optimizer by gradient descent on a validation loss.

    Write `tuner.backward(loss)` in place of `loss.backward()`; everything else in the loop stays as it is. Every `every`
    steps the hypergradient dL/dφ of L = val_loss is formed from tangents dθ/dφ that have been carried along with every step
    (forward mode), and φ, the transformed values (log lr, log weight decay, logit momentum, …), takes a step: of Adam, slowed by
    disagreement; lr climbs by Newton's step (see outer_optimizer.py). Every number keeps within a factor of 4 of its mean so far.
    Where the validation loss has risen by more than chance, weights go back to where it was lowest, and lr is divided by 4 (see
    backtracking.py).

    Args:
        model: the module that is trained.
        optimizer: its live optimizer, with any param groups, or a list of them: any that `hypergrad.hypergradient` takes.
        val_loss: `val_loss()` → scalar: the loss of a validation batch, computed with the model's own parameters. Random
            numbers and buffers are put back after it; it must not call backward. Called as `val_loss(t)`, t the number of
            steps done, where it has a required argument.
        tune: names in param_groups, or name → Hyperparameter(start, bounds, kind). One value for each group; groups whose
            value is 0 while others' is not stay at 0.
        hypers: name → Hyperparameter: tensors that the loss reads as `tuner.hypers[name]`.
        loss: `loss(model, batch)`, or `loss(model, batch, hypers)` with `hypers`; for `tuner.step(batch)`.
        mode: "forward"; with `tuner.step` also "unrolled" (the adjoint over windows of `horizon` steps) and "implicit" (the
            update map's series, `horizon` terms).
        horizon: steps of a window that is replayed (mode="unrolled"), or terms of the series (mode="implicit").
        every: training steps between hyperparameter steps (mode="unrolled": each window ends in one); None is 10, with
            curvature="free" 20.
        hyper_lr: step size on φ: 0.1 is about 10 % of a positive hyperparameter's value; lr may climb by 7 such steps at once.
        total_steps: number of training steps, if known: lr is then its tuned scale times a warm-up and linear decay to zero;
            lr, momentum, … are tuned over the first 30 % of the run, or on while lr climbs, to 80 % at most; weight decay and
            tensors in the loss from there to 90 %.
            After a warm start weight decay is kept where it decays the weights by 0.01 to 50 e-foldings over the rest of the
            run, unless it has a start or bounds of its own.
        clip_norm: threshold, if the loop calls `clip_grad_norm_` (tuner.step then calls it).
        scaler: the loop's GradScaler, if it has one.
        average: while lr, momentum, … are tuned, take the validation loss at a running average of the weights, which looks
            back over a tenth of the run so far; its tangent is the same average of the tangents.
        warm_start: take lr's start (unless given by Hyperparameter(start=…), or written by a scheduler) as a hint only, and find
            it from slope and curvature along the first steps. Momentum, if it is tuned too and not given, then begins at 0.9
            (where a lower one was typed, only in runs of 400 steps or more).
        curvature: "exact" forms one Hessian-vector product Hz a step and tuned number, at the price of two gradients. "free", for
            large models, forms one in 40 gradients, whatever is tuned, besides those of the warm start (at most 30 a number). In
            between Hz := Bz, B positive semi-definite of rank 8 with Bv = Hv along the tangent v last measured, and tangents
            forget: z' = 0.98 ((∂Φ/∂s) z + ∂Φ/∂φ). T steps then cost at most 1.1 T + 60 k gradients with k numbers in the warm
            start; B takes 8 copies of the weights. Its hypergradients are approximate: they look back about 50 steps, and
            curvature never measured counts as 0, so lr may end a factor of a few off, and a weight decay typed far too high may
            stay too high. Only for numbers in param groups and mode="forward".
        seed: of the random numbers that val_loss draws, a stream of its own; recorded with the run.
        log_dir: folder for TensorBoard events and `metrics.jsonl`.
        keep_best: keep the weights and buffers at the best validation loss so far, one copy, in host memory: see `best`.

    Attributes:
        values: name → tensor [n_groups] ([n_groups, 2] for betas): with `total_steps` lr's scale; where a scheduler writes the
            learning rate, the multiplier of what it writes. For tensors in the loss: their value.
        hypers: name → tensor that the loss reads.
        val_loss: the last validation loss; NaN before the first.
        best_val_loss: the one at the weights of `best`, and
        best_step: the number of steps done there, 0 before training; NaN and −1 where none are kept.
        hypergradients: name → dL/dvalue at the last hyperparameter step, shaped like `values`.
        stats: counts of what happened.

    Raises:
        ValueError, TypeError, NotImplementedError: before anything changes, with what to do.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(3, 1)
        >>> x, y = torch.randn(64, 3), torch.randn(64, 1)
        >>> sgd = torch.optim.SGD(model.parameters(), lr=1e-5)
        >>> tuner = Tuner(model, sgd, lambda: ((model(x[32:]) - y[32:]) ** 2).mean(), tune=("lr",))
        >>> for _ in range(200):
        ...     loss = ((model(x[:32]) - y[:32]) ** 2).mean()
        ...     sgd.zero_grad()
        ...     tuner.backward(loss)
        ...     sgd.step()
        >>> bool(tuner.values["lr"] > 1e-5), tuner.stats["hyper_steps"]
        (True, 20)
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: Optimizers,
        val_loss: Callable[..., Tensor],
        tune: str | Sequence[str] | Mapping[str, Any] = ("lr", "weight_decay"),
        hypers: Mapping[str, Any] | None = None,
        loss: Callable[..., Tensor] | None = None,
        mode: str = "forward",
        horizon: int = 20,
        every: int | None = None,
        hyper_lr: float = 0.1,
        total_steps: int | None = None,
        clip_norm: float | None = None,
        scaler: Any = None,
        average: bool = True,
        warm_start: bool = True,
        curvature: str = "exact",
        seed: int = 0,
        log_dir: str | Path | None = None,
        keep_best: bool = True,
    ):
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
        if not callable(val_loss):
            raise TypeError("val_loss must be a function () -> scalar tensor.")
        every = (EVERY if curvature == "free" else 10) if every is None else every
        check_numbers(mode, horizon, every, hyper_lr, total_steps)
        check_curvature(curvature, mode, hypers)
        self.model, self.optimizers, self.mode = model, as_optimizers(optimizer), mode
        clipping(clip_norm, None)
        written, tensors = specification(tune), leaves(hypers)
        if not written and not tensors:
            raise ValueError("nothing to tune: name hyperparameters, for example tune=('lr', 'weight_decay').")
        if any(name in CLIPS for name in written):
            raise NotImplementedError(
                "a clipping threshold cannot be tuned online: use hypergrad.hypergradient for it."
            )
        if "initial_accumulator_value" in written:
            raise NotImplementedError(
                "initial_accumulator_value acts before the first step alone: use hypergrad.hypergradient for it."
            )
        check_free(self.optimizers)
        if scaler is not None and not hasattr(scaler, "get_scale"):
            raise TypeError(f"scaler must be a torch.amp.GradScaler, got {type(scaler).__name__}.")
        transition = Transition(self.optimizers, frozenset(written))
        check_names([*written, *tensors], transition.values(), tensors)
        spec = {name: as_hyperparameter(name, x) for name, x in written.items()}
        of_loss = {name: as_hyperparameter(name, x) for name, x in (hypers or {}).items()}
        self.hypers = tensors
        self._transition, self._problem = transition, Problem(model, transition.params, loss, tensors)
        self._hyper_vector = HyperVector(transition, spec, of_loss, tensors, hyper_lr)
        live = ParamGroupWriter(transition, self._hyper_vector, total_steps)
        before, notes = self._try(val_loss)
        warm = LrWarmStart(warm_start and mode == "forward" and live.writes_lr_alone())
        secant = LowRankHessian(warm) if curvature == "free" else None
        tangents = Tangents(transition, self._hyper_vector, model, scaler, clip_norm, secant)
        self.stats: dict[str, int] = dict.fromkeys(_STATS, 0)
        self._journal = Journal(log_dir, self._hparams(every, hyper_lr, seed))
        self._hyper = HyperSteps(
            self._problem, self._hyper_vector, tangents, self._journal, val_loss, average, int(seed), self.stats
        )
        if mode == "forward" and any(e.name == "lr" and e.group is not None for e in self._hyper_vector.entries):
            self._hyper.backtracking = Backtracking(transition, self._problem, before, total_steps)
        self._best = self._hyper.best = BestWeights(transition, self._problem) if keep_best else None
        if self._best is not None:
            self._best.read(0, before)
        guard = DivergenceGuard(transition, self._problem, before)
        self._loop = OnlineLoop(self._hyper, live, guard, warm, mode, every, total_steps)
        self._window = self._loop.window = ReplayWindow(self._loop, horizon)
        self._closed = False
        for note in [*self._hyper_vector.notes, *notes]:
            self._journal.note(0, note)
        self._detach = attach(self._loop, self.optimizers, "before_step", "after_step")

    # ---- what a loop calls

    def backward(self, loss: Tensor, *, inputs: Any = None, retain_graph: bool = False, **unknown: Any) -> None:
        """Do what `loss.backward()` does, bit for bit, and carry the tangents along.

        Args:
            loss: scalar, or the scaler's `scaler.scale(loss)`. Several calls before a step add up.
            inputs, retain_graph: as in `torch.Tensor.backward`.
        """
        if unknown:
            raise NotImplementedError(f"tuner.backward does not take {sorted(unknown)}: only inputs and retain_graph.")
        check_scalar(loss, "the loss")
        if self._closed or self.mode != "forward":
            if not self._closed:
                raise NotImplementedError(
                    f"mode={self.mode!r} replays steps: use tuner.step(batch) in place of this loop."
                )
            return loss.backward(inputs=inputs, retain_graph=retain_graph)
        inputs = [inputs] if isinstance(inputs, Tensor) else inputs
        self._loop.tangents.backward(loss, inputs, retain_graph)
        return None

    def step(self, batch: Any) -> Tensor:
        """Take one whole training step on a batch: loss, gradients, clipping, optimizer step. Returns the loss."""
        if self._closed:
            raise RuntimeError("this tuner is closed.")
        return self._window.step(batch)

    def freeze(self) -> None:
        """Stop moving the hyperparameters. Tangents and validation losses go on; steps are no longer guarded."""
        self._hyper.frozen = True

    def close(self) -> None:
        """Take the hooks off the optimizer and end the recording.

        Values in the param groups stay as they are. Where a scheduler writes them it goes on alone, without our multiplier.
        """
        self._detach()
        self._closed = True
        self._hyper.say_best(self._loop.t)
        self._journal.close()

    @property
    def val_loss(self) -> float:
        return self._hyper.val_loss

    @property
    def best_val_loss(self) -> float:
        return math.nan if self._best is None else self._best.loss

    @property
    def best_step(self) -> int:
        return -1 if self._best is None else self._best.step

    @property
    def hypergradients(self) -> dict[str, Tensor]:
        return self._hyper.hypergradients

    @property
    def values(self) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        shapes = self._hyper_vector.directions.shapes
        for name, shape in shapes.items():
            if name in self.hypers:
                out[name] = self.hypers[name].detach().clone()
                continue
            column = self._transition.values()[name]
            out[name] = torch.tensor([math.nan if x is None else x for x in column], dtype=torch.float64).view(shape)
        for entry, x in zip(self._hyper_vector.entries, self._hyper_vector.value, strict=True):
            if entry.group is not None:
                out[entry.name][entry.index] = x
        return out

    @contextmanager
    def averaged(self) -> Iterator[torch.nn.Module]:
        """The running average of the weights in the model, and the weights themselves back on the way out."""
        with self._loop.tangents.averaged():
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
        if self._best is None:
            raise RuntimeError("no best weights are kept: make the tuner with keep_best=True.")
        with self._best.in_model():
            yield self.model

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs to go on; tensors are not copied. Loads with weights_only=True."""
        loop = self._loop
        return {
            "sizes": list(self._transition.sizes),
            "steps": loop.t,
            "frozen": self._hyper.frozen,
            "val_loss": self.val_loss,
            "stats": {**self.stats, **loop.tangents.counts},
            "guard": loop.guard.state_dict(),
            "warm": loop.warm.state_dict(),
            "hyper_vector": self._hyper_vector.state_dict(),
            "live": loop.live.state_dict(),
            "tangents": loop.tangents.state_dict(),
            "backtracking": None if (back := self._hyper.backtracking) is None else back.state_dict(),
            "best": None if self._best is None else self._best.state_dict(),
            "validation noise": self._hyper.noise.state_dict(),
            "used": {"values": dict(loop.used[0]), "slopes": loop.used[1]},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. Raises ValueError where it is that of another model or of other hyperparameters."""
        try:
            sizes, names = list(state["sizes"]), list(state["hyper_vector"]["names"])
            missing = _missing(self.state_dict(), state)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError("this is not the state_dict of a hypergrad.Tuner.") from error
        if missing:
            raise ValueError(f"this state_dict is incomplete: it lacks {', '.join(missing)}.")
        if sizes != self._transition.sizes:
            raise ValueError(
                "this state_dict belongs to another model: the optimizer's parameters differ in number or size."
            )
        mine = self._hyper_vector.state_dict()["names"]
        if names != mine:
            raise ValueError(f"this state_dict tunes {names}, this tuner {mine}: make the tuner with the same `tune`.")
        loop, counts = self._loop, self._loop.tangents.counts
        loop.t, self._hyper.frozen, self._hyper.val_loss = (
            int(state["steps"]),
            state["frozen"],
            float(state["val_loss"]),
        )
        counts.update({k: v for k, v in state["stats"].items() if k in counts})
        self.stats.update({k: v for k, v in state["stats"].items() if k in self.stats})
        loop.guard.load_state_dict(state["guard"])
        loop.warm.load_state_dict(state["warm"])
        self._hyper_vector.load_state_dict(state["hyper_vector"])
        loop.live.load_state_dict(state["live"])
        loop.choose_what_is_tuned()
        loop.tangents.load_state_dict(state["tangents"])
        if self._best is not None:
            self._best.load_state_dict(state["best"])
        self._hyper.noise.load_state_dict(state["validation noise"])
        if self._hyper.backtracking is not None and state["backtracking"] is not None:
            self._hyper.backtracking.load_state_dict(state["backtracking"])
        loop.used = dict(state["used"]["values"]), state["used"]["slopes"].clone()
        self._window.reset()

    def _hparams(self, every: int, hyper_lr: float, seed: int) -> dict[str, Any]:
        values = self._hyper_vector.value.tolist()
        starts = {f"{label} start": x for label, x in zip(self._hyper_vector.labels, values, strict=True)}
        kinds = ", ".join(type(opt).__name__ for opt in self.optimizers)
        return {
            "optimizer": kinds,
            "mode": self.mode,
            "every": every,
            "hyper_lr": hyper_lr,
            "seed": seed,
            **starts,
        }

    def _try(self, val_loss: Callable[..., Tensor]) -> tuple[float, list[str]]:
        """Call the validation loss once, so that a wrong one is said before anything starts. Its value, and notes."""
        try:
            value = float(self._problem.validate(val_loss, 0).value)
        except NameError:  # it reads the tuner, which does not exist yet
            return math.nan, []
        self._problem.follow_running_stats(val_loss, 0)
        if self._problem.stats is None or self.mode != "forward":
            return value, []
        self._problem.stats = None
        return value, [
            "val_loss runs BatchNorm in eval mode: the path from weights to running statistics is not part of the hypergradients "
            "that tuner.backward carries along. Validate in train mode, or use tuner.step with mode='unrolled', which has it."
        ]


_STATS = (
    "steps",
    "hyper_steps",
    "val_evaluations",
    "gradients",
    "hessian_products",
    "plain_steps",
    "changed_gradients",
    "nonfinite_steps",
    "spikes",
    "nonfinite_hypergradients",
    "rollbacks",
    "backtracks",
    "false_alarms",
    "capped",
)


def _missing(mine: Mapping[str, Any], state: Mapping[str, Any]) -> list[str]:
    """What a tuner's state_dict lacks, two levels deep."""
    out = [name for name in mine if name not in state]
    for name in (
        "guard",
        "warm",
        "hyper_vector",
        "live",
        "tangents",
        "backtracking",
        "best",
        "validation noise",
        "used",
    ):
        if state.get(name) is not None and mine[name] is not None:
            out += [f"{name}/{key}" for key in mine[name] if key not in state[name]]
    return out
