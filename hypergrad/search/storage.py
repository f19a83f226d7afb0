"""Where a study is kept: a storage of Optuna, often a journal file, to which one call of `optimize` at a time may write."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from hypergrad.search.extend import extended, moved
from hypergrad.search.extras import need
from hypergrad.search.space import Space
from hypergrad.search.stored_data import check_attributes

NAME = "hypergrad.search"  # of the study in its storage
IDENTITY = "hypergrad.search"  # the user attribute that identifies the study


def open_storage(storage: Any) -> Any:
    """Optuna's storage from a path, a URL, or itself; None: in memory.

    Raises:
        ValueError: a file that is no journal.
    """
    optuna = need("optuna", "a search")
    if storage is None:
        return optuna.storages.InMemoryStorage()
    if isinstance(storage, optuna.storages.BaseStorage):
        return storage
    if isinstance(storage, str) and not is_path(storage):
        return optuna.storages.get_storage(storage)
    if not is_path(storage):
        raise TypeError(f"storage must be a path, a URL or a storage of Optuna, got {type(storage).__name__}.")
    path = Path(storage)
    if path.is_dir():
        raise ValueError(f"storage {path} is a folder: name a file in it, such as {path / 'study.journal'}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    backend = optuna.storages.journal.JournalFileBackend(str(path))
    try:
        return optuna.storages.JournalStorage(backend)
    except Exception as error:
        raise ValueError(f"storage {path} is a file, but no journal of a study: choose another name.") from error


def is_path(storage: Any) -> bool:
    return isinstance(storage, os.PathLike) or (isinstance(storage, str) and "://" not in storage)


def opened_again(storage: Any, name: str, pruner: Any) -> Any:
    """A study in a process beside the one that opened it, where nothing is drawn."""
    optuna = need("optuna", "a search")
    sampler = optuna.samplers.RandomSampler(seed=0)
    return optuna.load_study(study_name=name, storage=open_storage(storage), sampler=sampler, pruner=pruner)


def sign_of(study: Any) -> float:
    """The sign with which a study's values are least at the best: −1 where it maximises."""
    return -1.0 if study.direction.name == "MAXIMIZE" else 1.0


def open_study(storage: Any, identity: dict[str, Any], pruner: Any, wider: Space | None = None) -> Any:
    """The study in a storage; a new one where the storage is empty.

    Args:
        identity: what tells one study from another, its direction too.
        wider: a space that the study goes on with where it is not that of the storage; None: there it is another study.

    Raises:
        ValueError: it is another study; the message says what differs.
    """
    optuna = need("optuna", "a search")
    names = optuna.get_all_study_names(storage)
    if names and NAME not in names:
        raise ValueError(
            f"the storage holds another study, {names[0]!r}, which is not of hypergrad.search: choose another storage."
        )
    create = partial(
        optuna.create_study,
        storage=storage,
        pruner=pruner,
        sampler=optuna.samplers.RandomSampler(seed=0),
        direction=identity.get("direction", "minimize"),
        load_if_exists=True,
    )
    number = max((i for i in range(1, len(names) + 1) if _name(i) in names), default=1)
    study = create(study_name=_name(number))
    if number > 1 and IDENTITY not in study.user_attrs:  # an extension that was cut off
        optuna.delete_study(study_name=_name(number), storage=storage)
        number -= 1
        study = create(study_name=_name(number))
    check_attributes(study.get_trials(deepcopy=False))
    known = study.user_attrs.get(IDENTITY)
    if known is None:
        study.set_user_attr(IDENTITY, identity)
        return study
    known = {"direction": "minimize"} | known
    differs = [key for key in identity if known.get(key) != identity[key]]
    if not differs:
        return study
    why = ""
    if differs == ["space"] and wider is not None:
        try:
            trials = moved(study, wider)
        except ValueError as error:
            why = f" A space can be extended, but {error}."
        else:
            new = extended(study, trials, wider, _name(number + 1), create, IDENTITY)
            new.set_user_attr(IDENTITY, identity)  # last: now it is complete
            return new
    elif differs == ["space"]:
        why = " A space can be extended, but not where all of its points are listed: their numbers would be others."
    key = differs[0]
    raise ValueError(
        f"the storage holds another study: its {key} is {known.get(key)!r}, not {identity[key]!r}.{why} Choose another storage, "
        "or call optimize as before to go on with it."
    )


def _name(number: int) -> str:
    """The name of a study, and of those that it was extended to."""
    return NAME if number == 1 else f"{NAME} {number}"


@contextmanager
def locked(storage: Any) -> Iterator[None]:
    """Lock a journal file for one call of `optimize`. A storage that is not a file needs no lock."""
    if not is_path(storage):
        yield
        return
    filelock = need("filelock", "a storage in a file")
    lock = filelock.FileLock(f"{storage}.in_use")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise ValueError(
            f"storage {storage} is in use by another call of optimize: wait for it, or choose another."
        ) from None
    try:
        yield
    finally:
        lock.release()
        with suppress(OSError):
            Path(lock.lock_file).unlink()


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Within this context Optuna neither prints messages on stderr nor warns of what is experimental."""
    optuna = need("optuna", "a search")
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            warnings.filterwarnings(
                "ignore", "Clip non-finite values"
            )  # of the Gaussian process, for losses of infinity
            yield
    finally:
        optuna.logging.set_verbosity(before)
