"""Measures, once in a run, what tuning costs: seconds of a product and of a validation loss, in plain steps.

In twelve steps, once lr's start is found, products are formed in every third one (why an odd number says plan.py). The other
eight are plain steps but for the tangents, which are taken through them (plan.py). Whole steps are timed, with all that the
user's loop does in them; medians leave out what a loop does now and then, such as an evaluation.
No clock is read after that.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from statistics import median
from typing import Any

import torch

from hypergrad.core.processes import Processes
from hypergrad.core.readout import Readout

FIRST = 10  # the earliest step of which one is timed
STEPS = 12
BETWEEN = 3  # products in one step of so many


class Calibration:
    """Times steps and validation losses.

    Args:
        device: of the weights; it is waited for in the steps that are timed.
        active: False where no plan is wanted, and once it is made.
        given: there is a plan: the same steps are taken as where it was made, but no clock is read.
        tangents: what those of one number add to a step without a product, in plain steps.
    """

    def __init__(self, device: torch.device, active: bool, given: bool = False, tangents: float = 0.15):
        self.device, self.active, self.given, self.tangents = device, active, given, tangents
        self.timing = False  # the present step is timed
        self.began = self.read = 0.0  # when it began, and the seconds of a validation loss in it
        self.formed: list[float] = []  # seconds of steps with products
        self.plain: list[float] = []  # of those without
        self.readings: list[float] = []

    def clock(self) -> float:
        """Seconds: of the processor where it computes, as other programs do not slow those; else of the clock on the wall."""
        if self.given:
            return 0.0
        if self.device.type == "cpu":
            return time.process_time()
        torch.get_device_module(self.device).synchronize()
        return time.perf_counter()

    @contextmanager
    def time_reading(self) -> Iterator[None]:
        """What runs inside is a validation loss with its gradient."""
        if not self.active:
            yield
            return
        start = self.clock()
        yield
        self.read = self.clock() - start
        self.readings.append(self.read)

    @property
    def complete(self) -> bool:
        return bool(len(self.formed) + len(self.plain) >= STEPS and self.readings)

    def step_done(self, t: int, k: int, formed: bool, searching: bool) -> None:
        """t steps are done, the last with products or without.

        Args:
            k: numbers that are tuned.
            searching: the start of lr is not found yet.
        """
        if not self.active:
            return
        if self.timing:
            seconds = self.clock() - self.began - self.read
            (self.formed if formed else self.plain).append(seconds)
        self.read = 0.0
        done = len(self.formed) + len(self.plain) >= STEPS
        self.timing = t >= FIRST and k > 0 and not searching and not done
        self.began = self.clock() if self.timing else 0.0

    def result(self, k: int, processes: Processes) -> tuple[float, float] | None:
        """What a product of one of k numbers, and a validation loss with its gradient, cost, in plain steps; None: not known."""
        self.stop()
        if not (self.formed and self.plain):
            return None
        readout = Readout(processes)
        readout.ask("seconds", torch.tensor([median(x) for x in (self.formed, self.plain, self.readings)]))
        formed, without, reading = readout.fetch()["seconds"]
        plain = without / (1 + k * self.tangents)
        return max(formed - without, 0.0) / plain / max(k, 1), reading / plain

    def stop(self) -> None:
        self.active = self.timing = False

    def state_dict(self) -> dict[str, Any]:
        names = ("active", "timing", "formed", "plain", "readings")
        return {name: copy(getattr(self, name)) for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.active, self.timing = bool(state["active"]) and self.active, bool(state["timing"])
        self.formed, self.plain, self.readings = (list(state[name]) for name in ("formed", "plain", "readings"))
        self.began = self.clock() if self.timing else 0.0
