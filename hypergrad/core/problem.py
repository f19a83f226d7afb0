"""The gradient stage: the user's losses at given parameters, with batches, random numbers and buffers in hand.

Everything runs on the user's own module with parameters written in place, so that closures over the model, tied
weights, hooks and checkpointing mean what they mean in the user's loop. `Problem.untouched` puts all of it back.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from hypergrad.core import multi_tensor
from hypergrad.core.batchnorm import RunningStats
from hypergrad.core.graph import Linearization, check_scalar, grad_or_none, survey, without_hooks


class Rng:
    """The state of torch's random number generators, on CPU and on the parameters' device."""

    def __init__(self, device: torch.device):
        self.device = device
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def seed(self, seed: int) -> None:
        """Seed the generators whose state is kept here."""
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes a millisecond
        if self.cuda is not None:
            with torch.cuda.device(self.device):
                torch.cuda.manual_seed(seed)

    def equals(self, other: Rng) -> bool:
        same = torch.equal(self.cpu, other.cpu)
        return same and (self.cuda is None or (other.cuda is not None and torch.equal(self.cuda, other.cuda)))

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)


_TAKES_STEP: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()  # a signature takes a while to read


def takes_step(val_loss: Callable[..., Tensor]) -> bool:
    """Whether a validation loss wants the step number: it has a required positional argument, or `t=None`."""
    with suppress(KeyError, TypeError):  # TypeError: it cannot be hashed, or not be held weakly
        return _TAKES_STEP[val_loss]
    answer = _wants_step(val_loss)
    with suppress(TypeError):
        _TAKES_STEP[val_loss] = answer
    return answer


def _wants_step(val_loss: Callable[..., Tensor]) -> bool:
    try:
        parameters = inspect.signature(val_loss).parameters.values()
    except (TypeError, ValueError):
        return False
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    positional = [p for p in parameters if p.kind in kinds]
    return any(p.default is inspect.Parameter.empty or (p.name == "t" and p.default is None) for p in positional)


def takes_hypers(loss: Callable[..., Tensor]) -> bool:
    """Whether a loss takes hypers beside model and batch: a third positional argument that is required or `None`, or *args."""
    try:
        parameters = inspect.signature(loss).parameters.values()
    except (TypeError, ValueError):
        return True
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
        return True
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return any(p.default in (inspect.Parameter.empty, None) for p in [p for p in parameters if p.kind in kinds][2:3])


class Saved(NamedTuple):
    """A buffer: the tensor itself, and a copy of its value."""

    tensor: Tensor
    value: Tensor


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
        loss: `loss(model, batch)`, or `loss(model, batch, hypers)` where `hypers` is not empty.
        hypers: name -> leaf tensor that the loss reads.
        hand_over: False where they are not an argument of the loss: schedules alone read them.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        params: Sequence[Tensor],
        loss: Callable[..., Tensor] | None,
        hypers: dict[str, Tensor] | None = None,
        hand_over: bool = True,
    ):
        self.model, self.params, self.loss = model, list(params), loss
        self.hypers = hypers or {}
        self.extra = (self.hypers,) if self.hypers and hand_over else ()  # arguments of the loss beside model and batch
        self.read: set[str] = set()  # keys of `hypers` that a loss was found to depend on
        self.places = [(m, name) for m in model.modules() for name, b in m._buffers.items() if b is not None]
        self.device = self.params[0].device
        self.stats: RunningStats | None = None  # set by `follow_running_stats`

    # ---- state that is neither θ nor the optimizer's

    def rng(self) -> Rng:
        return Rng(self.device)

    @property
    def buffers(self) -> list[Tensor]:
        """The model's buffers as they are now: a module may put another tensor in a buffer's place."""
        return [module._buffers[name] for module, name in self.places]  # type: ignore[misc]

    def read_buffers(self) -> list[Saved]:
        return [Saved(b, x) for b, x in zip(self.buffers, multi_tensor.copies(self.buffers), strict=True)]

    def write_buffers(self, saved: Sequence[Saved], silently: bool = False) -> None:
        """Put buffers back. silently: without the notice of graphs that hold them (see `Binding.load`)."""
        for (module, name), (tensor, _) in zip(self.places, saved, strict=True):
            module._buffers[name] = tensor
        multi_tensor.write([tensor.data if silently else tensor for tensor, _ in saved], [value for _, value in saved])

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Put parameters, buffers and random numbers back on the way out, whatever happens inside."""
        theta = multi_tensor.copies(self.params)
        buffers, rng = self.read_buffers(), self.rng()
        try:
            yield
        finally:
            multi_tensor.write(self.params, theta)
            self.write_buffers(buffers)
            rng.restore()

    # ---- losses

    def training_loss(self, batch: Any) -> Tensor:
        if self.loss is None:
            raise ValueError("a training loss is needed here: pass loss=..., a function loss(model, batch).")
        with torch.enable_grad():
            try:
                loss = self.loss(self.model, batch, *self.extra)
            except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError) as error:
                raise ValueError(
                    f"loss(model, batch{', hypers' if self.extra else ''}) failed on a batch of type "
                    f"{type(batch).__name__}: {type(error).__name__}: {error}. Check what the loss takes apart."
                ) from error
            check_scalar(loss, "the training loss")
            return loss

    def linearize(self, batch: Any, products: bool = True) -> Linearization:
        """The training loss at the present parameters, with its gradient in them and in `hypers`.

        Where running statistics are followed and products are wanted, ⟨S, u⟩ is part of the loss and u, which is 0, the
        last of the extra leaves (see batchnorm.py); d is returned as `lin.decay`.
        """
        if self.stats is None or not products:
            loss, extra, decay = self.training_loss(batch), list(self.hypers.values()), None
        else:
            with self.stats.watch_training() as update:
                loss = self.training_loss(batch)
            with torch.enable_grad():
                decay, added = update.flat()
                u = torch.zeros_like(added, requires_grad=True)
                loss, extra = loss + added @ u, [*self.hypers.values(), u]
        exact = survey(loss, self.model).exact if products else True
        lin = Linearization(loss, self.params, extra, products)
        lin.decay, lin.exact = decay, exact
        self._note(lin.extra_grads[: len(self.hypers)])
        return lin

    def _note(self, of_hypers: Sequence[Tensor | None]) -> None:
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

    def unfollowed_since(self, before: Sequence[Saved]) -> list[str]:
        """Names of float buffers that changed and are not running statistics of BatchNorm."""
        names = {id(module): name for name, module in self.model.named_modules()}
        pairs = zip(self.places, self.buffers, before, strict=True)
        return [
            f"{names.get(id(module), '?')}.{name}".lstrip(".")
            for (module, name), now, then in pairs
            if now.is_floating_point() and not isinstance(module, _BatchNorm) and not torch.equal(now, then.value)
        ]

    def validate(self, val_loss: Callable[..., Tensor], t: int, seed: int | None = None) -> Validation:
        """The validation loss at the present parameters, with its gradients.

        Random numbers and buffers are as before afterwards. With a seed the loss draws from a stream of its own: put back
        to where training stands it might see the same validation batch every time.
        """
        inputs = [*self.params, *self.hypers.values()]
        with self._aside(seed), self.stats.as_leaves() if self.stats else nullcontext([]) as leaves:
            loss = self._call(val_loss, t)
            with without_hooks(inputs):
                grads = grad_or_none([loss], [*inputs, *leaves])
        of_params, of_stats = grads[: len(self.params)], grads[len(inputs) :]
        if all(g is None for g in of_params):
            raise ValueError(
                "val_loss shares no parameter with the optimizer: compute it with the model that the optimizer trains."
            )
        read = self.stats is not None and any(g is not None for g in of_stats)
        flat = self.stats.flat(of_stats) if read and self.stats else None
        self._note(grads[len(self.params) : len(inputs)])
        return Validation(loss.detach(), of_params, grads[len(self.params) : len(inputs)], flat)

    def look(self, val_loss: Callable[..., Tensor], t: int, seed: int) -> Tensor:
        """The validation loss alone."""
        with self._aside(seed):
            return self._call(val_loss, t).detach()

    @contextmanager
    def _aside(self, seed: int | None) -> Iterator[None]:
        """With gradients enabled; random numbers and buffers are put back, and drawn from a stream of its own with a seed."""
        buffers, rng = self.read_buffers(), self.rng()
        try:
            if seed is not None:
                rng.seed(seed)
            with torch.enable_grad():
                yield
        finally:
            self.write_buffers(buffers, silently=True)  # the same values
            rng.restore()

    @staticmethod
    def _call(val_loss: Callable[..., Tensor], t: int) -> Tensor:
        loss = val_loss(t) if takes_step(val_loss) else val_loss()
        check_scalar(loss, "val_loss()")
        return loss
