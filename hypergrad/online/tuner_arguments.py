"""What a tuner is given, checked at the door: before anything of the user's is looked at or changed."""

from __future__ import annotations

import math
from typing import Any


def check_numbers(mode: str, horizon: int, every: int, hyper_lr: float, total_steps: int | None) -> None:
    if mode not in ("forward", "unrolled", "implicit"):
        raise ValueError(f"mode must be 'forward', 'unrolled' or 'implicit', got {mode!r}.")
    for name, x in (("horizon", horizon), ("every", every), ("total_steps", total_steps)):
        if x is not None and (not isinstance(x, int) or isinstance(x, bool) or x < 1):
            raise ValueError(f"{name} must be a whole number from 1, got {x!r}.")
    if not (isinstance(hyper_lr, (int, float)) and math.isfinite(hyper_lr) and hyper_lr > 0):
        raise ValueError(f"hyper_lr must be a positive number, got {hyper_lr!r}.")


def check_curvature(curvature: str, mode: str, hypers: Any) -> None:
    if curvature not in ("exact", "free"):
        raise ValueError(f"curvature must be 'exact' or 'free', got {curvature!r}.")
    if curvature == "free" and mode != "forward":
        raise ValueError(f"curvature='free' is about tangents: use mode='forward' with it, not {mode!r}.")
    if curvature == "free" and hypers:
        raise ValueError(
            "tensors in the loss act through ∂g/∂h, a product in every step: curvature='free' cannot tune `hypers`; leave it out."
        )
