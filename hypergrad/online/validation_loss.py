"""The `val_loss` of a model and a loader: endless random batches on the model's device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler

from hypergrad.core.signatures import positional

MODES = ("auto", "eval", "train")


def validation(
    model: Module,
    loader: Iterable[Any],
    criterion: Callable[..., Tensor],
    *,
    size: int | None = None,
    mode: str = "auto",
) -> Callable[[], Tensor]:
    """A `val_loss` for `Tuner`, `hypergradient` and `tune_run`: the loss of a random batch of a loader, again and again.

    A tuner seeds torch's random numbers for every reading of the validation loss, by the number of steps done, and puts them back
    afterwards. Examples are drawn from them: every reading has another batch, two readings that are to be compared have the same
    one, and a run that goes on from a state draws what it would have drawn. Nothing has to be saved for it. Called by yourself,
    it moves torch's random numbers, as dropout does.

    **How large a batch.** The noise of a validation batch is noise of the hypergradient, which may be a small difference of large
    numbers. Begin with some hundreds of examples, or the whole set where it is small; it is read once in ten steps or so. A
    tuner compares the hypergradients of two draws in its first readings, and says how many times as large the batch should be
    where they hardly agree.

    **Which mode.** `mode="auto"`: no dropout, whose masks would be noise of every reading, and BatchNorm as training has it, by
    mean and variance of the validation batch, which should be as large as a training batch at least. `mode="eval"` is what the
    model will be used in: BatchNorm by its running statistics. Their dependence on the weights is part of a hypergradient by
    mode="unrolled" or "forward", but not of what `tuner.backward` carries along, which then warns. `mode="train"` leaves every
    layer as training has it, dropout too. Running statistics are put back in each.

    Args:
        model: the module that is trained, as it was given to the tuner.
        loader: a DataLoader, or a list of batches, of examples that training does not see. Of a DataLoader over a dataset with
            indices the examples are drawn at random whatever `shuffle` is, from those that its sampler has, and loaded in this
            process, so a set that is slow to decode is best kept in memory. One over an IterableDataset is read on and on, and
            from its beginning in a run that goes on from a state. Not `iter(loader)`, which ends.
        criterion: `criterion(outputs, targets)` with outputs = model(inputs) for batches of two, (inputs, targets). A function
            whose first argument is called `model` is called as `criterion(model, batch)`; so is any function where batches are
            something else, such as dicts.
        size: examples of a reading; None: the loader's batch size. From the number of examples on it is the whole set.
        mode: "auto", "eval" or "train"; layers are as before afterwards.

    Returns:
        A function without arguments. It gives a scalar with its graph.

    Raises:
        TypeError, ValueError: with what to do; about batches at the first call.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, 2.0)
        >>> data = torch.utils.data.TensorDataset(torch.ones(10, 1), torch.zeros(10, 1))
        >>> val_loss = validation(model, torch.utils.data.DataLoader(data, batch_size=4), torch.nn.MSELoss())
        >>> val_loss().item()  # (2 · 1 − 0)²
        4.0
        >>> val_loss
        validation(4 of 10 examples, mode='auto')
        >>> batches = [{"x": torch.ones(3, 1)}]
        >>> validation(model, batches, lambda model, batch: model(batch["x"]).sum())().item()
        6.0
    """
    return ValidationLoss(model, loader, criterion, size, mode)


class ValidationLoss:
    """What `validation` returns."""

    def __init__(
        self, model: Module, loader: Iterable[Any], criterion: Callable[..., Tensor], size: int | None, mode: str
    ):
        if not isinstance(model, Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
        if isinstance(criterion, type) or not callable(criterion):
            shown = f"{criterion.__name__}()" if isinstance(criterion, type) else "a function"
            raise TypeError(f"criterion is called as criterion(outputs, targets): pass {shown}, not {criterion!r}.")
        if mode not in MODES:
            raise ValueError(f"mode must be 'auto', 'eval' or 'train', got {mode!r}.")
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ValueError(f"size is a number of examples, 1 or more; got {size!r}.")
        self.model, self.criterion, self.mode = model, criterion, mode
        self.batches = _batches(loader, size)
        taken = positional(criterion)
        self.takes_model = taken is not None and [p.name for p in taken.parameters[:1]] == ["model"]

    def __call__(self) -> Tensor:
        device = next(iter(self.model.parameters())).device
        batch = moved(self.batches.draw(), device)
        with self._in_mode():
            loss = self._loss(batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"criterion must return one number, got {got}: take its mean, as by reduction='mean'.")
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise ValueError(
                "the validation loss has no gradient: it must not be computed under torch.no_grad() or inference_mode(), "
                "detached, or from an argmax; accuracy has no gradient either."
            )
        return loss

    def __repr__(self) -> str:
        return f"validation({self.batches}, mode={self.mode!r})"

    def _loss(self, batch: Any) -> Tensor:
        pair = isinstance(batch, (tuple, list)) and len(batch) == 2
        if pair and not self.takes_model:
            return self.criterion(self.model(batch[0]), batch[1])
        if isinstance(self.criterion, Module):
            raise TypeError(
                f"a batch is {_described(batch)}, not a pair (inputs, targets): pass criterion=f with a function "
                "f(model, batch) that returns the loss, such as lambda model, batch: model(**batch).loss."
            )
        return self.criterion(self.model, batch)

    @contextmanager
    def _in_mode(self) -> Iterator[None]:
        stay: tuple[type[Module], ...] = {"auto": (_BatchNorm,), "eval": (), "train": (Module,)}[self.mode]
        training = [module for module in self.model.modules() if module.training and not isinstance(module, stay)]
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True


def moved(batch: Any, device: torch.device) -> Any:
    """The tensors of a batch on a device, in containers of the same kinds."""
    if isinstance(batch, Tensor) or (hasattr(batch, "to") and not isinstance(batch, Module)):
        return batch.to(device)
    if isinstance(batch, Mapping):
        found = {key: moved(x, device) for key, x in batch.items()}
        if isinstance(batch, dict) and type(batch) is not dict:
            same = copy.copy(batch)
            same.update(found)
            return same
        return found
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(moved(x, device) for x in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(moved(x, device) for x in batch)
    return batch


class _Examples:
    """Random examples of a dataset with indices."""

    def __init__(self, loader: DataLoader[Any], size: int):
        self.loader, self.size = loader, size
        self.everything = type(loader.sampler) in (SequentialSampler, RandomSampler)
        self.dataset: Any = loader.dataset

    def draw(self) -> Any:
        if self.everything:
            places = torch.arange(len(self.dataset))
        else:
            places = torch.tensor(list(self.loader.sampler))
            if len(places) == 0:
                raise ValueError("the sampler of the loader has no examples.")
        if self.size < len(places):
            places = places[torch.randperm(len(places))[: self.size]]
        chosen = places.tolist()
        get = getattr(self.dataset, "__getitems__", None)
        return self.loader.collate_fn(get(chosen) if get else [self.dataset[i] for i in chosen])

    def __repr__(self) -> str:
        n = len(self.dataset)
        return f"{min(self.size, n):,} of {n:,} examples"


class _Listed:
    """A random one of a list of batches."""

    def __init__(self, batches: Sequence[Any]):
        self.batches = batches

    def draw(self) -> Any:
        return self.batches[int(torch.randint(len(self.batches), ()))]

    def __repr__(self) -> str:
        return f"1 of {len(self.batches):,} batches"


class _Stream:
    """The next batch; the same once more where random numbers are those of the last call, as in readings to be compared."""

    def __init__(self, batches: Iterable[Any]):
        self.batches, self.iterator, self.key, self.last = batches, iter(()), None, None

    def draw(self) -> Any:
        key = torch.get_rng_state()
        if self.key is None or not torch.equal(key, self.key):
            self.key, self.last = key, self._next()
        torch.rand(())  # the next call's random numbers are others
        return self.last

    def _next(self) -> Any:
        for _ in range(2):
            for batch in self.iterator:
                return batch
            self.iterator = iter(self.batches)
        raise ValueError("the loader has no batches, or none any more.")

    def __repr__(self) -> str:
        return "the next batch"


def _batches(loader: Any, size: int | None) -> _Examples | _Listed | _Stream:
    """How batches are drawn from a loader."""
    if isinstance(loader, Iterator):
        raise TypeError(
            "loader is an iterator, which comes to an end: pass the DataLoader itself, rather than iter(loader)."
        )
    if isinstance(loader, DataLoader):
        if isinstance(loader.dataset, IterableDataset):
            return _without_size(_Stream(loader), size)
        if len(loader.dataset) == 0:  # type: ignore[arg-type]
            raise ValueError("the dataset of the loader has no examples.")
        if loader.batch_size is not None:
            return _Examples(loader, size or loader.batch_size)
        if size is not None and loader.batch_sampler is not None:
            return _Examples(loader, size)
        return _without_size(_Stream(loader), size)
    if isinstance(loader, Dataset):
        raise TypeError("loader is a Dataset, whose items are examples: pass DataLoader(dataset, batch_size=256).")
    if isinstance(loader, Tensor) or not isinstance(loader, Iterable):
        raise TypeError(f"loader must be a DataLoader, or a list of batches; got {type(loader).__name__}.")
    if not isinstance(loader, Sequence):
        return _without_size(_Stream(loader), size)
    if len(loader) == 0:
        raise ValueError("loader has no batches.")
    return _without_size(_Listed(loader), size)


def _without_size(batches: Any, size: int | None) -> Any:
    if size is not None:
        raise ValueError(
            "size is for a DataLoader over a dataset with indices; here batches are taken as they come: make them larger."
        )
    return batches


def _described(batch: Any) -> str:
    return f"a {type(batch).__name__}" + (f" of {len(batch)}" if isinstance(batch, (tuple, list)) else "")
