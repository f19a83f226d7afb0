"""Warnings that point at the user's own line.

A warning names a file and a line, by which a newcomer knows what it is about. From inside of hooks and modes that line is some
frames up: it is the first that runs code of neither this library, nor torch, nor a package whose loop calls it.
"""

from __future__ import annotations

import sys
import warnings

# packages whose frames are passed over; contextlib and functools stand between frames of ours
INSIDE = frozenset(("hypergrad", "torch", "contextlib", "functools", "tqdm", "lightning", "pytorch_lightning", "transformers",
                    "accelerate", "skorch", "sklearn", "joblib", "optuna", "hyperopt", "ray"))  # fmt: skip


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn, at the first line outside of INSIDE; at the outermost one where there is none."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _package(frame.f_globals) in INSIDE:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def _package(names: dict[str, object]) -> str:
    return str(names.get("__name__", "")).partition(".")[0]
