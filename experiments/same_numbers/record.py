"""What a case leaves behind: a list of steps, each name → a value that JSON keeps exactly."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.same_numbers.names import counts

SMALL = 8  # elements of a tensor that is written out; of a larger one its digest is kept
# keys of `stats` and of logs that differ from call to call
CLOCK = ("seconds", "peak_bytes", "compile_seconds", "run/ms_per_step")


class Skip(Exception):
    """A case that this machine cannot run, and why."""


class Recorder:
    """The steps of one case."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def add(self, values: Mapping[str, Any]) -> None:
        self.steps.append(exact(values))


def exact(x: Any) -> Any:
    """A value as JSON keeps it, without rounding. Numbers of the clock are left out of mappings."""
    if x is None or isinstance(x, (bool, int, float, str)):
        return x
    if isinstance(x, Tensor):
        kind = f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
        return f"{kind} {x.tolist() if x.numel() <= SMALL else digest([x])}"
    if isinstance(x, Mapping):
        return {str(key): exact(value) for key, value in x.items() if key not in CLOCK}
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return exact({field.name: getattr(x, field.name) for field in dataclasses.fields(x)})
    if isinstance(x, Iterable):
        return [exact(value) for value in x]
    if isinstance(x, np.generic):
        return exact(x.item())
    raise TypeError(f"a record keeps no {type(x).__name__}")


def digest(tensors: Iterable[Tensor]) -> str:
    """A digest of the tensors' bytes."""
    found = hashlib.blake2b(digest_size=8)
    for x in tensors:
        found.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def weights(model: nn.Module) -> str:
    """The digest of all parameters and buffers."""
    return digest([*model.parameters(), *model.buffers()])


def of_tuner(tuner: Any) -> dict[str, Any]:
    """All public numbers of a tuner."""
    names = ("values", "val_loss", "hypergradients", "best_val_loss", "best_step")
    return {"stats": counts(tuner.stats)} | {name: getattr(tuner, name) for name in names}
