"""The public names, and what `import hypergrad` brings with it."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import hypergrad
from hypergrad.differentiate.modes import MODES, OPTIONS

NAMES = {"Hyperparameter", "Result", "hypergradient", "solvers", "validation"}
HEAVY = ("torchvision", "sklearn", "matplotlib", "ray", "optuna", "tensorboard")
HEAVY += ("lightning", "pytorch_lightning", "transformers", "accelerate", "skorch")


def test_names_are_there_and_documented() -> None:
    assert set(hypergrad.__all__) >= NAMES
    for name in hypergrad.__all__:
        assert (getattr(hypergrad, name).__doc__ or "").strip(), name


def test_every_mode_has_one_signature() -> None:
    """A mode takes a trajectory, a stepper and its own options, and gives a Result."""
    for name, mode in MODES.items():
        parameters = list(inspect.signature(mode).parameters.values())
        assert [p.name for p in parameters[:2]] == ["trajectory", "stepper"]
        assert tuple(p.name for p in parameters[2:]) == OPTIONS[name]
        assert all(p.default is not inspect.Parameter.empty for p in parameters[2:])
        assert inspect.signature(mode).return_annotation == "Result"


def test_signatures_are_short_enough_to_read() -> None:
    """help() shows every default in full."""
    things = [getattr(m, name) for m in (hypergrad, hypergrad.policies, hypergrad.search) for name in m.__all__]
    for thing in things:
        if inspect.isfunction(thing) or (inspect.isclass(thing) and not issubclass(thing, Exception)):
            defaults = [p.default for p in inspect.signature(thing).parameters.values()]
            assert all(len(repr(x)) <= 60 for x in defaults if x is not inspect.Parameter.empty), thing


def returning(thing: object) -> Iterator[Any]:
    """The functions of a public thing that give something back: itself, its methods, its properties."""
    members = [thing] if inspect.isfunction(thing) else []
    if inspect.isclass(thing):
        members += [x for name, x in inspect.getmembers(thing) if not name.startswith("_")]
    for x in members:
        f = x.fget if isinstance(x, property) else getattr(x, "__func__", x)
        if inspect.isfunction(f) and f.__module__.startswith("hypergrad."):
            yield f


def test_what_public_functions_return_can_be_named() -> None:
    """For annotations in a user's code. `policies` is left out: what policies hand each other is the method's own."""
    named = {name: getattr(m, name) for m in (hypergrad, hypergrad.search) for name in m.__all__}
    public, hidden = list(named.values()), set()
    for name, thing in named.items():
        for f in returning(thing):
            for word in re.findall(r"\w+", str(f.__annotations__.get("return", ""))):
                kind = f.__globals__.get(word)
                if inspect.isclass(kind) and kind.__module__.startswith("hypergrad.") and kind not in public:
                    hidden.add(f"{word}, which {name}'s {f.__name__} returns")
    assert not hidden
    assert (
        hypergrad.Recipe in public and hypergrad.Plan in public
    )  # of tuner.recipe() and tuner.plan: the test sees them


def test_import_is_light() -> None:
    code = f"import sys, hypergrad; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert not done.stdout.strip()
