"""The gradient stage: the user's losses at given parameters, batches, random numbers and buffers.

Everything runs on the user's own module with parameters written in place, so that closures over the model, tied
weights, hooks and checkpointing mean what they mean in the user's loop. `Problem.untouched` puts all of it back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from hypergrad.core.batchnorm import RunningStats
from hypergrad.core.detached import is_cut
from hypergrad.core.graph import Linearization, check_scalar, explained, grad_or_none, without_hooks
from hypergrad.core.loss_tensors import LossTensors
from hypergrad.core.parameter_writes import refused
from hypergrad.core.processes import ALONE, Processes
from hypergrad.core.rank_mean import RankMean
from hypergrad.core.restore import Buffers, HostRng, Modes, Rng, Saved, untouched
from hypergrad.core.second_order import twice_differentiable
from hypergrad.core.signatures import call_val_loss, takes_hypers
from hypergrad.core.survey import check_max_norm, survey


class Validation(NamedTuple):
    """A validation loss and its gradients; None where it does not depend on a tensor."""

    value: Tensor
    of_params: list[Tensor | None]
    of_hypers: list[Tensor | None]
    of_stats: Tensor | None  # [n_b], in the running statistics that layers in eval mode read


class Problem:
    """A model with its training loss, as a function of the parameters that the optimizer holds.

    Args:
        model: the user's module.
        params: the tensors the optimizer holds.
        loss: `loss(model, batch)`; or `loss(model, batch, hypers)`, where `hypers` is not empty and the loss takes it.
        hypers: what losses read besides.
        optimizers: those that hold the parameters.
        processes: those that train the model together.

    Raises:
        TypeError, ValueError: the loss is no function; one of `hypers` is among `params`.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        params: Sequence[Tensor],
        loss: Callable[..., Tensor] | None,
        hypers: LossTensors | None = None,
        optimizers: Sequence[torch.optim.Optimizer] = (),
        processes: Processes = ALONE,
    ):
        if loss is not None and not callable(loss):
            raise TypeError(f"loss must be a function loss(model, batch) -> scalar tensor, got {type(loss).__name__}.")
        self.processes = processes
        self.model, self.params, self.loss = model, list(params), loss
        self.optimizers = optimizers
        self.loss_tensors = LossTensors() if hypers is None else hypers
        self.loss_tensors.check_apart(self.params)
        self.hypers = self.loss_tensors.leaves
        given = self.loss_tensors.given
        self.extra = (
            (given,) if given and loss is not None and takes_hypers(loss) else ()
        )  # further arguments of the loss
        self.read: set[str] = set()  # keys of `hypers` that a loss was found to depend on
        self.checked_for_writes = False  # whether val_loss was seen, after a step, not to write to parameters
        self.cut: bool | None = None  # see `is_cut`, of the first training loss whose products were taken
        self.held_buffers = Buffers(model, *self.loss_tensors.nets)
        self.device = self.params[0].device
        self.validating = False  # a validation loss is being computed
        self.stats: RunningStats | None = None  # set by `follow_running_stats`

    # ---- state that is neither θ nor the optimizer's

    def rng(self) -> Rng:
        return Rng(self.device)

    @property
    def buffers(self) -> list[Tensor]:
        """The model's buffers as they are now."""
        return self.held_buffers.now()

    def read_buffers(self) -> list[Saved]:
        return self.held_buffers.read()

    def write_buffers(self, saved: Sequence[Saved], silently: bool = False) -> None:
        """Put buffers back. silently: see `Buffers.write`."""
        self.held_buffers.write(saved, silently)

    def untouched(self) -> AbstractContextManager[None]:
        """Put parameters, buffers and random numbers back at the end, whatever happens inside."""
        return untouched(self.params, self.held_buffers, self.device)

    # ---- losses

    def training_loss(self, batch: Any) -> Tensor:
        """This process's loss of its batch."""
        if self.loss is None:
            raise ValueError("a training loss is needed here: pass loss=..., a function loss(model, batch).")
        with torch.enable_grad(), self.processes.quiet():
            try:
                loss = self.loss(self.model, batch, *self.extra)
            except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError) as error:
                raise ValueError(
                    f"loss(model, batch{', hypers' if self.extra else ''}) failed on a batch of type "
                    f"{type(batch).__name__}: {type(error).__name__}: {error}. Check what the loss takes apart: it "
                    "is called as `lambda model, batch: criterion(model(batch[0]), batch[1])` is."
                ) from error
            check_scalar(loss, "the training loss")
            return loss

    def linearize(self, batch: Any, products: bool = True) -> Linearization:
        """The training loss at the present parameters, with its gradient in them and in `hypers`.

        Where running statistics are followed and products are wanted, ⟨S, u⟩ is part of the loss and u, which is 0, the
        last of the extra leaves (see batchnorm.py); d is returned as `lin.decay`. With several processes all of it is their mean,
        but for running statistics, of which each has its own.
        """
        if self.stats is None or not products:
            with twice_differentiable():
                loss, extra, decay = self.training_loss(batch), list(self.hypers.values()), None
        else:
            with self.stats.watch_training() as update, twice_differentiable():
                loss = self.training_loss(batch)
            with torch.enable_grad():
                decay, added = update.flat()
                u = torch.zeros_like(added, requires_grad=True)
                loss, extra = loss + added @ u, [*self.hypers.values(), u]
        exact = survey(loss, self.model).exact if products else True
        if products and self.cut is None:
            self.cut = is_cut(loss)
        lin = Linearization(loss, self.params, extra, products, plain=True)
        lin.decay, lin.exact = decay, exact
        if not self.processes.alone:
            lin = RankMean(lin, self.processes, len(self.hypers))
        self._record_read(lin.extra_grads[: len(self.hypers)])
        return lin

    def _record_read(self, of_hypers: Sequence[Tensor | None]) -> None:
        self.read |= {name for name, g in zip(self.hypers, of_hypers, strict=True) if g is not None}

    def stop_following_running_stats(self) -> None:
        self.stats = None

    def follow_running_stats(self, val_loss: Callable[..., Tensor], t: int) -> None:
        """Make running statistics part of the state where the validation loss reads them."""
        stats = RunningStats(self.model)
        if stats.layers:
            self.stats = stats
            if self.validate(val_loss, t).of_stats is None:
                self.stats = None

    def check_running_stats(self) -> None:
        """Raise where they are part of the state, and the first process's are copied to the others."""
        copied = any(x.broadcast_buffers and x in self.model.modules() for x in self.processes.wrappers)
        if self.stats is not None and copied and not self.processes.alone:
            raise NotImplementedError(
                "DistributedDataParallel copies the first rank's buffers to the others before every step, and the path through "
                "running statistics that val_loss reads is differentiated for each rank's own: make it with "
                "broadcast_buffers=False, or validate in train mode."
            )

    def moves_running_stats(self, batch: Any) -> bool:
        """Whether the training loss moves the statistics that are followed: in eval() layers read them only."""
        if self.stats is None:
            return False
        with self._without_effect(None):
            return self.stats.moved_by(lambda: self.training_loss(batch))

    def unfollowed_since(self, before: Sequence[Saved]) -> list[str]:
        """Names of float buffers that changed and are not running statistics of BatchNorm."""
        every = [*self.loss_tensors.nets, self.model]
        names = {id(module): name for owner in every for name, module in owner.named_modules()}
        pairs = zip(self.held_buffers.places, self.buffers, before, strict=True)
        return [
            f"{names.get(id(module), '?')}.{name}".lstrip(".")
            for (module, name), now, then in pairs
            if now.is_floating_point() and not isinstance(module, _BatchNorm) and not torch.equal(now, then.value)
        ]

    def validate(
        self, val_loss: Callable[..., Tensor], t: int, seed: int | None = None, may_be_frozen: bool = False
    ) -> Validation:
        """This process's validation loss at the present parameters, with its gradients.

        Random numbers, buffers and modes (train, eval) are as before afterwards. With a seed the loss draws from a stream of its
        own: from training's random numbers, put back each time, it might draw the same validation batch every time.

        may_be_frozen: a loss of parameters that are all frozen now has no gradient, instead of an error.
        """
        inputs = [*self.params, *self.hypers.values()]
        with self._without_effect(seed), self.stats.as_leaves() if self.stats else nullcontext([]) as leaves:
            loss = self._call(val_loss, t, not may_be_frozen)
            wanted = [*inputs, *leaves]
            grads: list[Tensor | None] = [None] * len(wanted)
            if loss.requires_grad:
                with explained(), without_hooks(inputs):
                    grads = grad_or_none([loss], wanted)
        of_params, of_stats = grads[: len(self.params)], grads[len(inputs) :]
        if not may_be_frozen and all(g is None for g in of_params):
            raise ValueError(
                "val_loss shares no parameter with the optimizer: compute it with the model that the optimizer trains."
            )
        read = self.stats is not None and any(g is not None for g in of_stats)
        flat = self.stats.flat(of_stats) if read and self.stats else None
        self._record_read(grads[len(self.params) : len(inputs)])
        return Validation(loss.detach(), of_params, grads[len(self.params) : len(inputs)], flat)

    def evaluate(self, val_loss: Callable[..., Tensor], t: int, seed: int) -> Tensor:
        """This process's validation loss without its gradients."""
        with self._without_effect(seed):
            return self._call(val_loss, t, False).detach()

    @contextmanager
    def _without_effect(self, seed: int | None) -> Iterator[None]:
        """With gradients enabled. Random numbers, from a stream of their own with a seed, buffers and modes are put back."""
        buffers, rng, host_rng = self.read_buffers(), self.rng(), HostRng()
        modes = Modes(self.model, *self.loss_tensors.nets)
        self.validating = True
        try:
            if seed is not None:
                rng.seed(seed)
                host_rng.seed(seed)
            with torch.enable_grad(), self.processes.quiet():
                yield
        finally:
            self.validating = False
            self.write_buffers(buffers, silently=True)  # the same values
            rng.restore()
            host_rng.restore()
            modes.restore()

    def _call(self, val_loss: Callable[..., Tensor], t: int, graph: bool) -> Tensor:
        explain = partial(check_max_norm, self.model)
        with refused(self.params, self.optimizers, not self.checked_for_writes, explain):
            loss = call_val_loss(val_loss, t)
        self.checked_for_writes = self.checked_for_writes or t > 0
        check_scalar(loss, "val_loss()", graph)
        return loss
