"""What is read from a disk is data: nothing in a file can run.

Two places would unpickle. A checkpoint is loaded with `weights_only=True`, and refused when it is written if it could not be.
Optuna's CMA-ES keeps its state pickled among the attributes of trials; a study that has anything else there is refused.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from hypergrad.search.objective import WrongType

_NUMPY = {("numpy", "dtype"), ("numpy", "ndarray")}
_NUMPY |= {(f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("scalar", "_reconstruct")}
_CMA = {("cmaes._cma", "CMA"), ("cmaes._sepcma", "SepCMA"), ("cmaes._cmawm", "CMAwM")}
_OPTIMIZER = ":optimizer:"  # in the names of attributes, between the kind of CMA-ES and the number of the piece


def save_state(state: Any, file: Path) -> None:
    """Write a checkpoint that `load_state` reads.

    Raises:
        WrongType: it holds objects that are not data.
    """
    torch.save(state, file)
    try:
        torch.load(file, weights_only=True, mmap=True, map_location="meta")  # reads names and shapes, no numbers
    except pickle.UnpicklingError as error:
        names = ", ".join(torch.serialization.get_unsafe_globals_in_checkpoint(file)) or "objects"
        raise WrongType(
            f"trial.checkpoint was given {names}: a checkpoint is read back as data, tensors, numbers, strings, and lists and "
            "dicts of them, as state_dict() gives them. Make tensors of numpy's arrays; of other objects keep what makes them."
        ) from error


def load_state(file: Path) -> Any:
    """Read a checkpoint.

    Raises:
        ValueError: it holds more than data; nothing of it has run.
    """
    try:
        return torch.load(file, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{file} holds more than data, and is not loaded: {str(error).splitlines()[-1]}") from error


class _CmaState(pickle.Unpickler):
    """Reads the state of CMA-ES, and classes of nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NUMPY | _CMA:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


def check_attributes(trials: list[Any]) -> None:
    """Refuse trials of Optuna in which CMA-ES would find anything but its state.

    Raises:
        ValueError: there is one; nothing of it has run.
    """
    for trial in trials:
        for kind in {name.split(":")[0] for name in trial.system_attrs if _OPTIMIZER in name}:
            pieces = [trial.system_attrs.get(f"{kind}{_OPTIMIZER}{i}") for i in range(len(trial.system_attrs))]
            try:
                _CmaState(io.BytesIO(bytes.fromhex("".join(x for x in pieces if x is not None)))).load()
            except Exception as error:
                raise ValueError(
                    f"trial {trial.number} of this storage has something else where CMA-ES keeps its state ({error}), which "
                    "Optuna would run: do not use this storage."
                ) from error
