"""What a mode did, counted, and what of it a user should know."""

from __future__ import annotations

import math
import resource
import sys
import time
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hypergrad.updates.binding import State

if TYPE_CHECKING:
    from hypergrad.modes.stretch import Stretch

CHAOS = 1e3  # growth of the norm beyond which a hypergradient is of little use
SMOOTHER = (
    "What smooths it: a smaller lr, gradient clipping, a larger eps in Adam's root, larger batches, smooth activations, average "
    "in place of max pooling, or a shorter stretch."
)


class Meter:
    """Counts what a mode did, for `Result.stats`."""

    def __init__(self, device: torch.device):
        self.device, self.start = device, time.perf_counter()
        self.gradients = self.products = 0
        self.first_norm = self.last_norm = float("nan")
        self.norm_steps = self.norms_seen = self.nonfinite = 0
        self.largest_norm = 0.0
        self.moved: list[str] | None = None  # buffers that training changes, where a mode has looked at its end
        self.extra: dict[str, Any] = {"warnings": []}
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.base = self._peak()

    def _peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def norm(self, x: Tensor, known: Tensor | None = None) -> None:
        """Note the norm of the tangent or adjoint after one more step. `known`: it, where it was computed already."""
        norm = float(torch.linalg.vector_norm(x) if known is None else known)
        self.norms_seen += 1
        if not math.isfinite(norm):
            self.nonfinite += 1
        elif norm > 0:
            if self.norm_steps == 0:
                self.first_norm = norm
            self.last_norm, self.norm_steps = norm, self.norm_steps + 1
            self.largest_norm = max(self.largest_norm, norm)

    def not_replayed(self, t: int) -> None:
        """Note that weights were not the same, bit for bit, when step t came to be played again."""
        first = self.extra["replayed_exactly"]
        self.extra["replayed_exactly"] = False
        if first and (self.device.type == "cpu" or torch.are_deterministic_algorithms_enabled()):
            self.extra["warnings"].append(
                f"the steps before step {t} were not the same, bit for bit, when they were played again, though losses agree to "
                "0.1 %: something in the training loss is not deterministic. mode='forward' plays nothing again."
            )

    def look_for_chaos(self, usual: float) -> None:
        """Say where tangent or adjoint grew beyond use. `usual`: the growth that goes with the number of steps alone."""
        growth = self.largest_norm / self.first_norm / usual if self.norm_steps else 0.0
        if growth > CHAOS or self.nonfinite:
            how = f"grew by a factor {growth:.1e}" if not self.nonfinite else "overflowed"
            self.extra["warnings"].append(
                f"training is chaotic here: its derivative {how} in {self.norms_seen} steps. The hypergradient is that of a "
                f"function which looks like noise at any step of useful size. {SMOOTHER}"
            )

    def look_for_ill_conditioning(self, stretch: Stretch, state: State, g: Tensor, t: int) -> None:
        """Note where the derivative in weight_decay is about lr·θ/eps: coupled decay at 0, gradients exactly 0."""
        if not stretch.directions.differentiates("weight_decay") or "ill_conditioned" in self.extra:
            return
        groups = stretch.transition.ill_conditioned_decay(state, g, stretch.values[t])
        if groups:
            self.extra["ill_conditioned"] = ["weight_decay"]
            self.extra["warnings"].append(
                f"the derivative in weight_decay is ill-conditioned in param groups {groups}: with coupled decay at 0 and "
                "gradients that are exactly 0 it is about lr * p / eps. Use a weight decay above 0, a larger eps, or AdamW."
            )
            warnings.warn(self.extra["warnings"][-1], stacklevel=2)

    def stats(self, steps: int, usual: float = 1.0) -> dict[str, Any]:
        self.look_for_chaos(usual)
        growth = float("nan")
        if self.norm_steps > 1:
            growth = float(torch.tensor(self.last_norm / self.first_norm).log() / (self.norm_steps - 1))
        return {
            "steps": steps,
            "seconds": time.perf_counter() - self.start,
            "peak_bytes": self._peak() - self.base,
            "gradient_evaluations": self.gradients,
            "hessian_products": self.products,
            "growth_rate": growth,
            "nonfinite_share": self.nonfinite / max(1, self.norms_seen),
        } | self.extra
