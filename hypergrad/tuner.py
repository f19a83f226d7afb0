"""The online tuner: rides on a live `torch.optim` optimizer and moves its hyperparameters while the model trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hypergrad.coordinates import Coordinates, specification
from hypergrad.exact import Optimizers, as_optimizers, check_names, clipping, leaves
from hypergrad.graph import check_scalar
from hypergrad.guard import LR_CUT, Guard
from hypergrad.hooks import attach, check_free
from hypergrad.hyperparameters import as_hyperparameter
from hypergrad.live_values import LiveValues
from hypergrad.problem import Problem
from hypergrad.recording import Journal
from hypergrad.schedules import STEP_NAMES, tuned_at
from hypergrad.tangents import Tangents
from hypergrad.updates.transition import CLIPS, State, Transition, Values
from hypergrad.windows import Windows


class Tuner:
    r"""Tune hyperparameters of a live optimizer by gradient descent on a validation loss.

    Write `tuner.backward(loss)` in place of `loss.backward()`; everything else in the loop stays as it is. Every `every`
    steps the hypergradient dL/dφ of L = val_loss is formed from tangents dθ/dφ that have been carried along with every step
    (forward mode), and φ, the transformed values (log lr, log weight decay, logit momentum, …), takes a step of Adam.

    Args:
        model: the module that is trained.
        optimizer: its live `torch.optim` optimizer (SGD, Adam, AdamW, RMSprop), with any param groups, or a list of them.
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
        every: training steps between hyperparameter steps (mode="unrolled": each window ends in one).
        hyper_lr: step size of Adam on φ: 0.1 is about 10 % of a positive hyperparameter's value.
        total_steps: number of training steps, if known: lr is then its tuned scale times a warm-up and linear decay to zero;
            lr, momentum, … are tuned over the first 30 % of the run, weight decay and tensors in the loss from there on.
        clip_norm: threshold, if the loop calls `clip_grad_norm_` (tuner.step then calls it).
        scaler: the loop's GradScaler, if it has one.
        average: while lr, momentum, … are tuned, take the validation loss at a running average of the weights, which looks
            back over a tenth of the run so far; its tangent is the same average of the tangents.
        seed: of the random numbers that val_loss draws, a stream of its own; recorded with the run.
        log_dir: folder for TensorBoard events and `metrics.jsonl`.

    Attributes:
        values: name → tensor [n_groups] ([n_groups, 2] for betas): with `total_steps` lr's scale; where a scheduler writes the
            learning rate, the multiplier of what it writes. For tensors in the loss: their value.
        hypers: name → tensor that the loss reads.
        val_loss: the last validation loss; NaN before the first.
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
        every: int = 10,
        hyper_lr: float = 0.1,
        total_steps: int | None = None,
        clip_norm: float | None = None,
        scaler: Any = None,
        average: bool = True,
        seed: int = 0,
        log_dir: str | Path | None = None,
    ):
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
        if not callable(val_loss):
            raise TypeError("val_loss must be a function () -> scalar tensor.")
        _check_numbers(mode, horizon, every, hyper_lr, total_steps)
        self.model, self.optimizers, self.mode = model, as_optimizers(optimizer), mode
        clipping(clip_norm, None)
        written, tensors = specification(tune), leaves(hypers)
        if not written and not tensors:
            raise ValueError("nothing to tune: name hyperparameters, for example tune=('lr', 'weight_decay').")
        if any(name in CLIPS for name in written):
            raise NotImplementedError(
                "a clipping threshold cannot be tuned online: use hypergrad.hypergradient for it."
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
        self._coordinates = Coordinates(transition, spec, of_loss, tensors, hyper_lr)
        self._live = LiveValues(transition, self._coordinates, total_steps)
        before, notes = self._try(val_loss)
        notes = [*self._coordinates.notes, *notes]
        self._seed = int(seed)
        self._val_loss, self._every, self._total, self._average = val_loss, every, total_steps, average
        self._tangents = Tangents(transition, self._coordinates, model, scaler, clip_norm)
        self._guard = Guard(transition, self._problem, before)
        self._windows = Windows(self, horizon)
        self.val_loss, self.hypergradients = math.nan, {}
        self._t, self._frozen, self._closed = 0, False, False
        self._stepped: set[int] = set()  # the optimizers that have taken the present step
        self._skipped = False  # the present step is one that a fused optimizer leaves out
        self._void = False  # the present step was judged to do nothing
        self._used: tuple[Values, Tensor] = {}, self._coordinates.slope()  # by the last step
        self._losses: list[Tensor] = []
        self._choose_what_is_tuned()
        self.stats: dict[str, int] = dict.fromkeys(_STATS, 0)
        self._journal = Journal(log_dir, self._hparams(seed, hyper_lr))
        for note in notes:
            self._journal.note(0, note)
        self._detach = attach(self, self.optimizers, "_before_step", "_after_step")

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
        self._tangents.backward(loss, inputs, retain_graph)
        return None

    def step(self, batch: Any) -> Tensor:
        """Take one whole training step on a batch: loss, gradients, clipping, optimizer step. Returns the loss."""
        if self._closed:
            raise RuntimeError("this tuner is closed.")
        return self._windows.step(batch)

    def freeze(self) -> None:
        """Stop moving the hyperparameters. Tangents and validation losses go on; steps are no longer guarded."""
        self._frozen = True

    def close(self) -> None:
        """Take the hooks off the optimizer and end the recording.

        Values in the param groups stay as they are. Where a scheduler writes them it goes on alone, without our multiplier.
        """
        self._detach()
        self._closed = True
        self._journal.close()

    @property
    def values(self) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        shapes = self._coordinates.directions.shapes
        for name, shape in shapes.items():
            if name in self.hypers:
                out[name] = self.hypers[name].detach().clone()
                continue
            column = self._transition.values()[name]
            out[name] = torch.tensor([math.nan if x is None else x for x in column], dtype=torch.float64).view(shape)
        for entry, x in zip(self._coordinates.entries, self._coordinates.value, strict=True):
            if entry.group is not None:
                out[entry.name][entry.index] = x
        return out

    @contextmanager
    def averaged(self) -> Iterator[torch.nn.Module]:
        """The running average of the weights in the model, and the weights themselves back on the way out."""
        theta = self._transition.flatten(self._transition.params)
        if self._tangents.average is not None:
            self._transition.load(self._tangents.average)
        try:
            yield self.model
        finally:
            self._transition.load(theta)

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs to go on; tensors are not copied. Loads with weights_only=True."""
        return {
            "sizes": list(self._transition.sizes),
            "steps": self._t,
            "frozen": self._frozen,
            "val_loss": self.val_loss,
            "stats": {**self.stats, **self._tangents.counts},
            "guard": self._guard.state_dict(),
            "coordinates": self._coordinates.state_dict(),
            "live": self._live.state_dict(),
            "tangents": self._tangents.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. Raises ValueError where it is that of another model or of other hyperparameters."""
        try:
            sizes, names = list(state["sizes"]), list(state["coordinates"]["names"])
            missing = self.state_dict().keys() - state.keys()
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError("this is not the state_dict of a hypergrad.Tuner.") from error
        if missing:
            raise ValueError(f"this state_dict is incomplete: it lacks {', '.join(sorted(missing))}.")
        if sizes != self._transition.sizes:
            raise ValueError(
                "this state_dict belongs to another model: the optimizer's parameters differ in number or size."
            )
        mine = self._coordinates.state_dict()["names"]
        if names != mine:
            raise ValueError(f"this state_dict tunes {names}, this tuner {mine}: make the tuner with the same `tune`.")
        self._t, self._frozen, self.val_loss = int(state["steps"]), bool(state["frozen"]), float(state["val_loss"])
        self._tangents.counts |= {k: v for k, v in state["stats"].items() if k in self._tangents.counts}
        self.stats |= {k: v for k, v in state["stats"].items() if k not in self._tangents.counts}
        self._guard.load_state_dict(state["guard"])
        self._coordinates.load_state_dict(state["coordinates"])
        self._live.load_state_dict(state["live"])
        self._choose_what_is_tuned()
        self._tangents.load_state_dict(state["tangents"])
        self._windows.reset()

    # ---- before and after the optimizer's step

    def _before_step(self, i: int) -> None:
        """Write the values of this step, judge its gradients, push the tangents."""
        if len(self._transition.groups) != len(self._transition.rules):
            raise ValueError("param groups were added: close this tuner and make a new one.")
        if i in self._stepped:  # it steps more often than others: their turn is left out
            self._end_step()
        found_inf = getattr(self.optimizers[i], "found_inf", None)  # a fused optimizer is told here that it will skip
        self._skipped = found_inf is not None and bool(found_inf)
        never = self._frozen and self._total is None and not self.stats["hyper_steps"]
        self._live.write(i, self._t, untouched=never)
        self._transition.refresh()
        active = tuple(
            p.grad is not None and self._transition.optimizer_of_group[group] == i
            for p, group in zip(self._transition.params, self._transition.group_of, strict=True)
        )
        if self._void and self._tangents.pending is None:  # judged when another optimizer's turn came
            self._drop_gradients(i)
            return
        if self._skipped or not any(active):
            return
        state, pending = self._transition.read(), self._tangents.pending
        g = self._transition.flatten(
            [p.grad if a else None for p, a in zip(self._transition.params, active, strict=True)]
        )
        scale = getattr(self.optimizers[i], "grad_scale", None)  # fused optimizers unscale by themselves
        if scale is not None:
            g = g / scale
        fresh = pending if pending is not None and i not in pending.stepped else None
        loss = None if fresh is None else fresh.loss / fresh.scale
        if not self._frozen and not self._judge(i, state, g, self._windows.loss if loss is None else float(loss)):
            return
        if not self._stepped:
            self._tangents.follow(state.theta, self._t)
        values = self._use(i)
        if self.mode != "forward":
            return
        dg = self._tangents.seen(active)
        if dg is not None and scale is not None:
            dg = dg / scale
        if dg is None:
            self._count_unknown(fresh is None)
        self._tangents.push(state, g, active, values, self._used[1], dg)
        if loss is not None and not self._stepped:
            self._losses.append(loss)
        if fresh is not None:
            fresh.stepped.add(i)

    def _use(self, i: int) -> Values:
        """Note the values of this step as optimizer i uses them, and dx/dφ."""
        values, slopes = self._transition.values(), self._live.slopes(self._t)
        if len(self.optimizers) == 1:
            self._used = values, slopes
            return values
        old = self._used[0] or values
        mine = [j == i for j in self._transition.optimizer_of_group]
        merged = {
            name: [new if m else x for new, x, m in zip(values[name], old[name], mine, strict=True)] for name in values
        }
        rows = torch.tensor([e.group is None or mine[e.group] for e in self._coordinates.entries])
        self._used = merged, torch.where(rows, slopes, self._used[1])
        return values

    def _drop_gradients(self, i: int) -> None:
        """Make optimizer i do nothing. The others' gradients stay until their turn: a GradScaler wants to see them."""
        for p, group in zip(self._transition.params, self._transition.group_of, strict=True):
            if self._transition.optimizer_of_group[group] == i:
                p.grad = None

    def _judge(self, i: int, state: State, g: Tensor, loss: float | None) -> bool:
        """Whether optimizer i may step. If not, its gradients are None on return, so that it does nothing."""
        verdict = self._guard.judge(loss, g, state.theta)
        if verdict in ("false alarm", "bad data"):
            self.stats["false_alarms"] += 1
            self._coordinates.scale("lr", LR_CUT)
        if verdict == "false alarm":
            return True
        if verdict == "good":
            if not self._stepped and self._t % self._every == 0:
                self._guard.keep(state)
            return True
        self._void, self._tangents.pending = True, None
        self._drop_gradients(i)
        self._windows.reset()
        if verdict in ("bad batch", "bad data"):
            self.stats["nonfinite_steps"] += 1
            self._guard.mend_buffers()
            self._journal.note_once(
                self._t, "a loss or gradient was not finite: the step was passed over (tuner.stats['nonfinite_steps'])."
            )
        elif self._guard.roll_back():
            self.stats["rollbacks"] += 1
            cut = self._coordinates.scale("lr", 1 / LR_CUT)
            then = f"lr divided by {LR_CUT:g}" if cut else "lr is not tuned and stays: if this goes on, lower it"
            self._tangents.forget()
            self._tangents.average = None
            self._journal.note(
                self._t,
                f"blow-up (loss {math.nan if loss is None else loss:.3g}): weights taken back to the last good ones, {then}.",
            )
        return False

    def _after_step(self, i: int) -> None:
        self._live.restore(i)
        if self._skipped:
            return
        self._stepped.add(i)
        if len(self._stepped) == len(self.optimizers):
            self._end_step()

    def _end_step(self) -> None:
        """One training step is done: count it, move the hyperparameters if it is time."""
        self._stepped.clear()
        self._void = False
        self._t += 1
        self.stats |= {"steps": self._t, **self._tangents.counts}
        if self.mode == "forward" and self._t % self._every == 0:
            self._hyper_step()
        if self._choose_what_is_tuned():
            self._tangents.forget()
            if self._tangents.pending is not None:
                self._tangents.pending.dg = None

    def _choose_what_is_tuned(self) -> bool:
        """Tune what is tuned after so many steps. True where that is a change."""
        return self._coordinates.tune_only(tuned_at(self._t, self._total, self._coordinates.directions.wrt))

    def _count_unknown(self, plain: bool) -> None:
        if plain:
            self.stats["plain_steps"] += 1
            self._journal.note_once(
                self._t,
                "a step's gradients did not come from tuner.backward(loss): it trains as always, but tangents start again "
                "from zero there (tuner.stats['plain_steps']). Replace loss.backward() by tuner.backward(loss).",
            )
        else:
            self.stats["changed_gradients"] += 1
            self._journal.note_once(
                self._t,
                "the gradients were changed between tuner.backward and optimizer.step in a way hypergrad does not know: "
                "tangents start again from zero there (tuner.stats['changed_gradients']). Pass clip_norm=... if the loop "
                "clips by norm, scaler=... if it has a GradScaler.",
            )

    # ---- the hyperparameter step

    def _hyper_step(self) -> None:
        with self._where() as tangent:
            value, of_params, of_hypers, _ = self._problem.validate(self._val_loss, self._t, self._seed + self._t)
        gradient = torch.zeros(len(self._coordinates), dtype=torch.float64)
        if tangent is not None:
            along = tangent @ self._transition.flatten(of_params)
            gradient[self._coordinates.moving] = along.to("cpu", torch.float64)
        slope = self._coordinates.slope()
        for j, entry in enumerate(self._coordinates.entries):
            if entry.group is None:
                direct = of_hypers[list(self.hypers).index(entry.name)]
                gradient[j] += 0 if direct is None else float(direct[entry.index]) * slope[j]
        self.move(float(value), gradient)

    @contextmanager
    def _where(self) -> Iterator[Tensor | None]:
        """The weights at which the validation loss is taken, in the model; yields their tangent [k, n]."""
        moving = {self._coordinates.entries[j].name for j in self._coordinates.moving}
        if not self._average or not moving & STEP_NAMES:
            yield None if self._tangents.tangent is None else self._tangents.tangent.theta
            return
        with self.averaged():
            yield self._tangents.average_tangent

    def move(self, value: float, gradient: Tensor) -> None:
        """One hyperparameter step from a validation loss and dL/dφ [k]."""
        self.val_loss = value
        self.stats["val_evaluations"] += 1
        in_value = gradient / self._coordinates.slope()
        self.hypergradients = self._coordinates.directions.pack(in_value)
        if not (math.isfinite(value) and bool(torch.isfinite(gradient).all())):
            self.stats["nonfinite_hypergradients"] += 1
            self._journal.note_once(
                self._t, "a validation loss or hypergradient was not finite: hyperparameters stayed."
            )
        elif not self._frozen:
            hit = self._tangents.take_hits()
            self._coordinates.step(
                gradient, hit & torch.tensor([e.name in _SAFE_DOWN for e in self._coordinates.entries])
            )
            self._coordinates.write_hypers()
            self.stats["hyper_steps"] += 1
        self._record(gradient)

    # ---- saying things

    def _record(self, gradient: Tensor) -> None:
        coordinates, row = self._coordinates, {}
        for j, label in enumerate(coordinates.labels):
            row["hyper/" + label] = float(coordinates.value[j])
            if coordinates.kinds[j].kind == "positive":  # charts are linear: these move by orders of magnitude
                row["log10/" + label] = math.log10(row["hyper/" + label])
            if j in coordinates.moving:
                row["hypergrad/" + label] = float(gradient[j])
        losses, self._losses = self._losses, []
        if losses:
            row["loss/train"] = float(torch.stack(losses).mean())
        self._journal.scalars(self._t, {"loss/val": self.val_loss, **row})

    def _hparams(self, seed: int, hyper_lr: float) -> dict[str, Any]:
        values = self._coordinates.value.tolist()
        starts = {f"{label} start": x for label, x in zip(self._coordinates.labels, values, strict=True)}
        kinds = ", ".join(type(opt).__name__ for opt in self.optimizers)
        return {
            "optimizer": kinds,
            "mode": self.mode,
            "every": self._every,
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


# Numbers whose tangent outgrew the weights: training is chaotic there, its hypergradient is noise, and less is safe.
_SAFE_DOWN = frozenset({"lr", "momentum"})

_STATS = (
    "steps",
    "hyper_steps",
    "val_evaluations",
    "gradients",
    "hessian_products",
    "plain_steps",
    "changed_gradients",
    "nonfinite_steps",
    "nonfinite_hypergradients",
    "rollbacks",
    "false_alarms",
    "capped",
)


def _check_numbers(mode: str, horizon: int, every: int, hyper_lr: float, total_steps: int | None) -> None:
    if mode not in ("forward", "unrolled", "implicit"):
        raise ValueError(f"mode must be 'forward', 'unrolled' or 'implicit', got {mode!r}.")
    for name, x in (("horizon", horizon), ("every", every), ("total_steps", total_steps)):
        if x is not None and (not isinstance(x, int) or isinstance(x, bool) or x < 1):
            raise ValueError(f"{name} must be a whole number from 1, got {x!r}.")
    if not (isinstance(hyper_lr, (int, float)) and math.isfinite(hyper_lr) and hyper_lr > 0):
        raise ValueError(f"hyper_lr must be a positive number, got {hyper_lr!r}.")
