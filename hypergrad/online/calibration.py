"""Measures, once in a run, what tuning costs: seconds of a product and of a validation loss, in plain steps.

A step takes the user's own part (batch, forward pass, optimizer) and ours (backward pass with graph and products, tangents).
The plain step is the former with a plain backward pass, which is timed beside ours in these few steps and not used otherwise.
Medians over steps leave out what a loop does now and then, such as an evaluation. No clock is read after that.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median

import torch
from torch import Tensor

from hypergrad.core.graph import grad_or_none, without_hooks
from hypergrad.core.processes import Processes
from hypergrad.core.readout import Readout

FIRST, LAST = 10, 20  # steps that are timed; the plan is made at the first reading of the validation loss from LAST on
PLAIN = 5  # of them with a plain backward pass


class Calibration:
    """A stopwatch.

    Args:
        device: of the weights; it is waited for in the steps that are timed.
        active: False where no plan is wanted, and once it is made.
    """

    def __init__(self, device: torch.device, active: bool):
        self.device, self.active = device, active
        self.timing = False
        self.began = 0.0  # the present step
        self.mark: float | None = None  # when the present piece of our part began; None: the user's part is under way
        self.ours = self.plain = self.read = 0.0  # seconds of the present step
        self.steps: list[tuple[float, float]] = []  # a plain step, and what ours took more
        self.readings: list[float] = []

    def clock(self) -> float:
        """Seconds: of the processor where it computes, as other programs do not slow those; else of the clock on the wall."""
        if self.device.type == "cpu":
            return time.process_time()
        torch.get_device_module(self.device).synchronize()
        return time.perf_counter()

    @contextmanager
    def time(self) -> Iterator[None]:
        """What runs inside is ours, not the user's."""
        if not self.timing:
            yield
            return
        self.mark = self.clock()
        try:
            yield
        finally:
            if self.mark is not None and self.timing:
                self.ours += self.clock() - self.mark
            self.mark = None

    def time_plain(self, loss: Tensor, inputs: Sequence[Tensor]) -> None:
        """Time the backward pass that a plain loop would make; its gradients are thrown away."""
        if not self.timing or len(self.steps) >= PLAIN:
            return
        start = self.clock()
        with without_hooks(inputs):
            grad_or_none([loss], inputs, retain_graph=True)
        self.plain += self.clock() - start

    @contextmanager
    def time_reading(self) -> Iterator[None]:
        """What runs inside is a validation loss with its gradient."""
        if not self.active:
            yield
            return
        start = self.clock()
        yield
        seconds = self.clock() - start
        self.read += seconds
        self.readings.append(seconds)

    def step_done(self, t: int) -> None:
        """t steps are done."""
        if not self.active:
            return
        now = self.clock() if FIRST <= t <= LAST else 0.0
        if self.timing and self.plain:
            ours = self.ours + (0.0 if self.mark is None else now - self.mark) - self.read
            whole = now - self.began - self.read - self.plain
            self.steps.append((whole - ours + self.plain, ours - self.plain))
        self.timing, self.began = FIRST <= t < LAST, now
        self.mark = None if self.mark is None else now
        self.ours = self.plain = self.read = 0.0

    def result(self, k: int, processes: Processes) -> tuple[float, float] | None:
        """What a product of one of k numbers, and a validation loss with its gradient, cost, in plain steps; None: not known."""
        self.active = self.timing = False
        if not (self.steps and self.readings):
            return None
        readout = Readout(processes)
        readout.ask("seconds", torch.tensor([*map(median, zip(*self.steps, strict=True)), median(self.readings)]))
        plain, more, reading = readout.fetch()["seconds"]
        return max(more, 0.0) / plain / max(k, 1), reading / plain
