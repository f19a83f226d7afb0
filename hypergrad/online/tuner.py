"""The online tuner: moves the hyperparameters of a live `torch.optim` optimizer while the model trains."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hypergrad.core.data_parallel import check_in_time, processes_of
from hypergrad.core.graph import check_scalar
from hypergrad.core.loss_tensors import LossTensors, set_free
from hypergrad.core.problem import Problem
from hypergrad.differentiate.arguments import Optimizers, as_optimizers, check_names, clipping
from hypergrad.online.hooks import attach, check_free, leave_uncompiled
from hypergrad.online.hyper_vector import specification
from hypergrad.online.plan import Plan, as_plan
from hypergrad.online.policies import DEFAULT, check
from hypergrad.online.policies.policy import Policy
from hypergrad.online.tuner_arguments import (
    NO_COPY,
    check_cost,
    check_few,
    check_names_to_tune,
    check_numbers,
    check_objects,
)
from hypergrad.online.tuner_parts import Options, build
from hypergrad.online.tuner_state import compacted, load_state, state_of
from hypergrad.online.tuner_view import TunerView
from hypergrad.optimizers.transition import Transition


class Tuner(TunerView):
    r"""Tune hyperparameters of a live optimizer by gradient descent on a validation loss.

    Write `tuner.backward(loss)` in place of `loss.backward()`; everything else in the loop stays as it is. Every `every`
    steps the hypergradient dL/dφ of L = val_loss is formed from tangents dθ/dφ that have been carried along with every step, or
    with one step in a few, as `cost` allows (forward mode), and φ, the transformed values (log lr, log weight decay, logit
    momentum, …), takes a step: of Adam, slowed by disagreement; lr climbs by Newton's step (docs/online.md). Every number keeps
    within a factor of 4 of its mean so far. Where the validation loss has risen by more than chance, weights go back to where
    it was lowest, and lr is divided by 4 (see backtracking.py). In DistributedDataParallel every rank makes its tuner, and what
    counts is the mean over ranks (docs/distributed.md).

    Args:
        model: the module that is trained, or the DistributedDataParallel module around it. Its layers may be frozen by
            `requires_grad_(False)` in mid-run, and unfrozen: what they were trained to before goes on to count
            (frozen_layers.py), which costs their backward pass.
        optimizer: its live optimizer, with any param groups, or a list of them: any that `hypergrad.hypergradient` takes.
        val_loss: `val_loss()` → scalar: the loss of a validation batch, computed with the model's own parameters. Random
            numbers and buffers are put back after it; it must not call backward. Called as `val_loss(t)`, t the number of
            steps done, where it has a required argument.
        tune: names in param_groups, or name → Hyperparameter(start, bounds, kind). One value for each group; groups whose
            value is 0 while others' is not stay at 0.
        hypers: name → Hyperparameter, tensor, number or net: what the loss reads besides, as `tuner.hypers[name]`. A tensor or
            net of your own is tuned in place, so that loss and val_loss may read it as they always did; its values stay when the
            tuner is closed, and until then it requires a gradient. Leave it out of the optimizer; its `.grad` stays as it is. All
            are free, whatever their name, unless a Hyperparameter's kind or bounds say otherwise. What no loss has read by the
            first step is an error there.
        loss: `loss(model, batch)`, or `loss(model, batch, hypers)`; for `tuner.step(batch)`.
        mode: "forward", the default; with `tuner.step` also "unrolled" (the adjoint over windows of `horizon` steps) and
            "implicit" (the update map's series, `horizon` terms). Forward mode carries a tangent, a few copies of the weights,
            and forms a Hessian product in every step, for every number that is tuned: two names in eight param groups are 16
            numbers, a tensor counts its elements. More than 16 are an error unless mode="forward" is written out; the other modes
            cost the same for any number.
        horizon: steps of a window that is replayed (mode="unrolled"), or terms of the series (mode="implicit").
        every: training steps between hyperparameter steps (mode="unrolled": each window ends in one); None is 10, or more where
            `cost` needs it; then, in the first 30 % of total_steps, so many that there are nine readings, but 5 at least.
        hyper_lr: step size on φ: 0.1 is about 10 % of a positive hyperparameter's value; lr may climb by 7 such steps at once.
        total_steps: number of training steps, if known: lr is then its tuned scale times a warm-up and linear decay to zero, or
            times a scheduler's shape; lr, momentum, … are tuned over the first 30 % of the run, or on while lr climbs, to 80 % at
            most; weight decay and tensors in the loss from there to 90 %. Steps beyond them are warned of once: lr stays at its
            last, smallest value there. A run that ends earlier leaves lr where its decay had come to, and before 30 % weight
            decay untuned. After a warm start weight decay is kept where it decays the weights by 0.01 to 50 e-foldings over the
            rest of the run, unless it has a start or bounds of its own.
        clip_norm, clip_value: threshold, if the loop calls `clip_grad_norm_` or `clip_grad_value_` over all parameters
            (tuner.step then calls it). One of them: which comes first would matter.
        scaler: the loop's GradScaler, if it has one.
        average: while lr, momentum, … are tuned, take the validation loss at a running average of the weights, which looks
            back over a tenth of the run so far; its tangent is the same average of the tangents.
        warm_start: take lr's start (unless given by Hyperparameter(start=…)) as a hint only, and find it from slope and
            curvature along the first steps. Momentum, if it is tuned too and not given, then begins at 0.9 (where a lower one
            was typed, only in runs of 400 steps or more).
        cost: a bound on the seconds of a run, over those of a plain one; None: none. What a Hessian product and a validation
            loss cost is measured in twelve steps, once lr's start is found, and becomes a plan (see plan.py): products are
            formed in one step of so many (in between the tangent of the gradient is taken for 0), and val_loss is read more
            rarely where it is costly; phases are shorter where that is not enough. Without total_steps the bound is kept in every
            thousand steps. Lr's warm start and the measuring come before there is a plan: a short run, or one with a bound near
            1, may cost more. The plan is `tuner.plan`, and part of the state. For mode="forward".
        plan: that of an earlier run, or the dict that its `state_dict` gave: no clock is read, and that run repeats bit for bit.
            It rules from the step on at which it was made.
        seed: of the random numbers that val_loss draws, a stream of its own; recorded with the run.
        log_dir: the run's own folder, for TensorBoard and `metrics.jsonl`; at `load_state_dict` rows of later steps are dropped.
        on_log: `on_log(metrics, step)`, called with each row of `metrics.jsonl` (tag → float) and the number of steps done; works
            without a log_dir too. For other loggers: docs/integrations.md. What it raises is raised by `optimizer.step()`.
        keep_best: keep the weights and buffers at the best validation loss so far, one copy, in host memory: see `best`.
        policies: the rules of the online method, with their constants; None: `hypergrad.policies.DEFAULT`. Or that list with
            some left out (`hypergrad.policies.without`) or changed (`replaced`). docs/online.md tells what each is for.

    Attributes:
        values: name → tensor [n_groups] ([n_groups, 2] for betas). lr's is its scale: lr over its shape, which is that of a
            scheduler (what it writes over the group's initial lr), or with `total_steps` hypergrad's. For tensors in the loss:
            their value.
        applied: the same as the last step used them. Beside a scheduler, param_groups and get_last_lr() show what it wrote.
        hypers: name → tensor or net that the loss reads.
        val_loss: the last validation loss; NaN before the first.
        best_val_loss: the one at the weights of `best`, and
        best_step: the number of steps done there, 0 before training; NaN and −1 where none are kept.
        hypergradients: name → dL/dvalue at the last hyperparameter step, shaped like `values`.
        stats: counts of what happened, a copy.

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
        >>> bool(tuner.values["lr"] > 1e-5), tuner.stats["steps"]
        (True, 200)
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: Optimizers,
        val_loss: Callable[..., Tensor],
        tune: str | Sequence[str] | Mapping[str, Any] = ("lr", "weight_decay"),
        hypers: Mapping[str, Any] | None = None,
        loss: Callable[..., Tensor] | None = None,
        mode: str | None = None,
        horizon: int = 20,
        every: int | None = None,
        hyper_lr: float = 0.1,
        total_steps: int | None = None,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        scaler: Any = None,
        average: bool = True,
        warm_start: bool = True,
        cost: float | None = 2.0,
        plan: Plan | Mapping[str, Any] | None = None,
        seed: int = 0,
        log_dir: str | Path | None = None,
        keep_best: bool = True,
        policies: Sequence[Policy] | None = None,
        on_log: Callable[[dict[str, float], int], object] | None = None,
    ):
        check_objects(model, val_loss, scaler, on_log)
        asked, mode = mode is not None, mode or "forward"
        check_numbers(mode, horizon, 10 if every is None else every, hyper_lr, total_steps)
        plan = as_plan(plan)
        check_cost(cost, plan, mode)
        self.model, self.optimizers, self.mode = model, as_optimizers(optimizer), mode
        clip = clipping(clip_norm, clip_value)
        written, given = specification(tune), LossTensors(hypers)
        given.check_movable()
        tensors = given.leaves
        check_names_to_tune(written, tensors)
        policies = check(DEFAULT if policies is None else policies)
        check_free(self.optimizers)
        processes = processes_of(model, self.optimizers)
        self.hypers = given.given
        transition = Transition(self.optimizers, frozenset(written))
        check_names([*written, *tensors], transition.values(), tensors)
        options = Options(
            mode,
            horizon,
            10 if every is None else every,
            every is not None,
            hyper_lr,
            total_steps,
            average,
            warm_start,
            int(seed),
            cost,
            plan,
        )
        problem = Problem(model, transition.params, loss, given, self.optimizers, processes)
        put_back = given.require_gradients()
        try:
            parts = build(
                problem, transition, val_loss, written, options, clip, scaler, log_dir, on_log, keep_best, policies
            )
            if not asked:
                check_few(len(parts.loop.vector))
        except BaseException:
            set_free(put_back)
            raise
        self._free = weakref.finalize(self, set_free, put_back)
        self._loop, self._window, self._journal = parts.loop, parts.window, parts.loop.journal
        self._hyper, self._vector = self._loop.hyper, self._loop.vector
        self._closed = self._started = False
        for note in parts.notes:
            self._journal.note(0, note)
        leave_uncompiled(Tuner, "backward", "step", "close")
        timed = self._loop.bound.calibration.time_own
        self._detach = attach(self._loop, self.optimizers, "before_step", "after_step", "after_load", timed)

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
        self._check_processes()
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
        self._check_processes()
        return self._window.step(batch)

    def _check_processes(self) -> None:
        """At the first training step: raise where the model came into DistributedDataParallel after the tuner."""
        if not (self._started or self._closed):
            check_in_time(self._loop.problem.processes, self.model, self.optimizers)
        self._started = True

    def freeze(self) -> None:
        """Stop moving the hyperparameters. Tangents and validation losses go on; steps are no longer guarded."""
        self._hyper.freeze()

    def close(self) -> None:
        """Take the hooks off the optimizer and end the recording.

        Values in the param groups stay as they are. Where a scheduler writes them it goes on alone, from the lr it was made with.
        """
        self._detach()
        self._loop.tangents.forward.remove()
        self._free()
        self._loop.tangents.frozen.remove()
        self._closed = True
        self._hyper.progress.say_end(self._loop.t)
        self._journal.close()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles of the hooks on an optimizer do not follow: a copy of a tuner would tune nothing."""
        raise TypeError(NO_COPY)

    def state_dict(self, *, compact: bool = False) -> dict[str, Any]:
        """Everything that `load_state_dict` needs to go on; tensors are not copied. Loads with weights_only=True.

        Args:
            compact: leave out weights, buffers and optimizer tensors to go back to (docs/online.md, State): about half of it. A
                run goes on from it by the same steps, bit for bit, until one would have gone back further than here.
        """
        self._journal.flush()
        state = state_of(self._loop)
        return compacted(state) if compact else state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. Raises ValueError, before anything is written, where it is of another version, model, list of
        policies or choice of hyperparameters. Another total_steps is warned of, and so are, at the next step, weights other
        than those it was saved beside: model and optimizer have states of their own, to be loaded in any order."""
        load_state(self._loop, state)
        self._window.reset()
