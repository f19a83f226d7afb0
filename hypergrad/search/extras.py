"""Packages that only parts of the search need, imported when they are used."""

from __future__ import annotations

import importlib
from typing import Any

_NEEDS = "{what} needs the package {package!r}, which is not installed: pip install {pip}"
PIP = {"sklearn": "scikit-learn", "ray": "'ray[tune]'"}  # where pip's name is not the one a package is imported by


def need(module: str, what: str) -> Any:
    """Import a module, or say what to install.

    Args:
        module: its dotted name.
        what: what needs it, the beginning of the sentence.

    Raises:
        ImportError: the package is missing; the message has the line for pip.

    Example:
        >>> need("no_such_package.part", "strategy 'magic'")
        Traceback (most recent call last):
        ImportError: strategy 'magic' needs the package 'no_such_package', which is not installed: pip install no_such_package
    """
    package = module.split(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != package:
            raise
        raise ImportError(_NEEDS.format(what=what, package=package, pip=PIP.get(package, package))) from error


def made(module: str, name: str, what: str, **options: Any) -> Any:
    """An instance of a class of another library, with options of the user's.

    Args:
        module, what: as of `need`.
        name: of the class.

    Raises:
        ValueError: it does not take them.
    """
    errors = (TypeError, need("ray.tune", what).TuneError) if module.startswith("ray.") else TypeError
    try:
        return getattr(need(module, what), name)(**options)
    except errors as error:
        raise ValueError(f"options: {module}.{name} does not take them: {error}") from error
