"""The public names, and what `import hypergrad` brings with it."""

from __future__ import annotations

import inspect
import subprocess
import sys

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


def test_import_is_light() -> None:
    code = f"import sys, hypergrad; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert not done.stdout.strip()
