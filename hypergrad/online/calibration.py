"""Measures, once in a run, what tuning costs: seconds of a product, of a validation loss and of tangents, in plain steps.

In twelve steps, once lr's start is found, products are formed in every third one (why an odd number says plan.py). The other
eight are plain steps but for what is done around the optimizer's step, mainly to the tangents: that is timed by itself. Whole
steps are timed, with all that the user's loop does in them; medians leave out what a loop does now and then, such as an
evaluation. What looking at the clock takes is subtracted. No clock is read after that.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

import torch

from hypergrad.core.processes import Processes
from hypergrad.core.readout import Readout
from hypergrad.online.plan import ALWAYS

FIRST = 10  # the earliest step of which one is timed
STEPS = 12
BETWEEN = 3  # products in one step of so many
SHORT = 2e-3  # seconds: in plain steps below that Python's own time rules


class Measured(NamedTuple):
    """In plain steps: a product of one number; a validation loss with its gradient; what one number's tangents add to a step.

    seconds: of a plain step. Below SHORT tangents are the given ones, not measured, and so a part of what is taken for plain.
    """

    product: float
    validation: float
    tangents: float
    seconds: float


class Calibration:
    """Times steps and validation losses.

    Args:
        device: of the weights; it is waited for in the steps that are timed.
        active: False where no plan is wanted, and once it is made.
        given: there is a plan: the same steps are taken as where it was made, but no clock is read.
        tangents: what those of one number add to a step without a product, in plain steps, where these are short.
    """

    def __init__(self, device: torch.device, active: bool, given: bool = False, tangents: float = 0.15):
        self.device, self.active, self.given, self.tangents = device, active, given, tangents
        self.timing = False  # the present step is timed
        self.looks, self.look = 0, 0.0  # at the clock so far, and the seconds that each takes
        self.began = self.read = 0.0  # when the present step began, and the seconds of a validation loss in it
        self.own, self.entered = 0.0, 0.0  # seconds around the optimizer's step in it, and when the present ones began
        self.formed: list[float] = []  # seconds of steps with products
        self.plain: list[float] = []  # of those without
        self.around: list[float] = []  # seconds around the optimizer's steps in those without
        self.readings: list[float] = []

    def clock(self) -> float:
        """Seconds: of the processor where it computes, as other programs do not slow those; else of the clock on the wall."""
        if self.given:
            return 0.0
        if self.device.type == "cpu":
            return time.process_time()
        torch.get_device_module(self.device).synchronize()
        return time.perf_counter()

    def now(self) -> float:
        """The same without the seconds that looking at the clock has taken so far."""
        self.looks += 1
        return self.clock() - self.looks * self.look

    @contextmanager
    def time_reading(self) -> Iterator[None]:
        """What runs inside is a validation loss with its gradient."""
        if not self.active:
            yield
            return
        start = self.now()
        yield
        self.read = self.now() - start
        self.readings.append(self.read)

    @contextmanager
    def time_own(self) -> Iterator[None]:
        """What runs inside is the tuner's, before or after an optimizer's step."""
        if not self.timing:
            yield
            return
        self.entered = self.now()
        yield
        if self.timing:
            self.own += self.now() - self.entered

    @property
    def complete(self) -> bool:
        return bool(len(self.formed) + len(self.plain) >= STEPS and self.readings)

    def step_done(self, t: int, k: int, formed: bool, searching: bool) -> None:
        """t steps are done, the last with products or without; called inside `time_own`.

        Args:
            k: numbers that are tuned.
            searching: the start of lr is not found yet.
        """
        if not self.active:
            return
        if self.timing:
            now = self.now()
            (self.formed if formed else self.plain).append(now - self.began - self.read)
            if not formed:
                self.around.append(self.own + now - self.entered - self.read)
        self.read = self.own = 0.0
        done = len(self.formed) + len(self.plain) >= STEPS
        first, self.timing = not self.timing, t >= FIRST and k > 0 and not searching and not done
        if self.timing:
            if first:
                self._time_looks()
            self.began = self.entered = self.now()

    def _time_looks(self) -> None:
        looks = [self.clock() for _ in range(6)]
        self.look, self.looks = min(b - a for a, b in pairwise(looks)), 0

    def result(self, k: int, processes: Processes) -> Measured | None:
        """What was measured with k numbers tuned; None: nothing was."""
        self.stop()
        if not (self.formed and self.plain):
            return None
        readout = Readout(processes)
        medians = [median(x) for x in (self.formed, self.plain, self.readings, self.around)]
        readout.ask("seconds", torch.tensor(medians, dtype=torch.float64))
        formed, without, reading, around = readout.fetch()["seconds"]
        plain = seconds = without - around
        if seconds < SHORT:
            plain, tangents = without / (1 + k * self.tangents), self.tangents
        else:
            tangents = max(around / plain - ALWAYS, 0.0) / max(k, 1)
        return Measured(max(formed - without, 0.0) / plain / max(k, 1), reading / plain, tangents, seconds)

    def stop(self) -> None:
        self.active = self.timing = False

    def state_dict(self) -> dict[str, Any]:
        names = ("active", "timing", "formed", "plain", "around", "readings")
        return {name: copy(getattr(self, name)) for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.active, self.timing = bool(state["active"]) and self.active, bool(state["timing"])
        names = ("formed", "plain", "around", "readings")
        self.formed, self.plain, self.around, self.readings = (list(state[name]) for name in names)
        self.read = self.own = 0.0
        self.began = self.entered = self.now() if self.timing else 0.0
