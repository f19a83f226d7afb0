"""Tuners that read no clock: runs repeat, with products in every step."""

from __future__ import annotations

import torch

from hypergrad.online.calibration import Calibration

PLACE = "hypergrad.online.tuner_parts.Calibration"  # where a tuner takes its own from


def without_clock(device: torch.device, active: bool, given: bool = False, *_: float) -> Calibration:
    """A plan that is given rules from the first step."""
    return Calibration(device, False)
