"""A dataclass of arguments at the top of an experiment is its command line."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from typing import Any


def arg(default: Any, help: str, **quick: Any) -> Any:
    """Declare one argument; ``quick=`` is its value under ``--quick`` where none is given."""
    return dataclasses.field(default=default, metadata={"help": help, **quick})


def parse(cls, argv: list[str] | None = None):
    """Read ``argv`` into the dataclass ``cls``: one option a field, typed by its default."""
    parser = argparse.ArgumentParser(prog=f"python -m {_module(cls)}", description=cls.__doc__)
    for field in dataclasses.fields(cls):
        default, option = field.default, "--" + field.name.replace("_", "-")
        text = field.metadata["help"].replace("%", "%%")
        if default is False:
            parser.add_argument(option, action="store_true", default=argparse.SUPPRESS, help=text)
            continue
        many = isinstance(default, tuple)
        kind = str if default in (None, ()) else type(default[0] if many else default)
        shown = " ".join(map(str, default)) if many else default
        parser.add_argument(
            option,
            type=kind,
            nargs="+" if many else None,
            default=argparse.SUPPRESS,
            help=text if default in (None, ()) else f"{text} (default: {shown})",
            metavar=kind.__name__.upper(),
        )
    given = vars(parser.parse_args(argv))
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return cls(**(_quick_values(cls) | given if given.get("quick") else given))


def command(args) -> str:
    """The command that gives these arguments: what differs from the defaults, without this machine's own paths."""
    cls = type(args)
    base = cls(**_quick_values(cls), quick=True) if args.quick else cls()
    words = ["python", "-m", _module(cls)] + (["--quick"] if args.quick else [])
    for field in dataclasses.fields(cls):
        value = getattr(args, field.name)
        if value == getattr(base, field.name) or str(value).startswith(("/", "~")):
            continue
        words.append("--" + field.name.replace("_", "-"))
        words += [] if value is True else map(str, value if isinstance(value, tuple) else (value,))
    return shlex.join(words)


def _quick_values(cls) -> dict[str, Any]:
    return {field.name: field.metadata["quick"] for field in dataclasses.fields(cls) if "quick" in field.metadata}


def _module(cls) -> str:
    spec = getattr(sys.modules[cls.__module__], "__spec__", None)
    return spec.name if spec else cls.__module__
