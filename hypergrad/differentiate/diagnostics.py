"""What a mode did, counted, and what of it a user should know."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hypergrad.core.user_warnings import warn_user
from hypergrad.differentiate.series import Series

CHAOS = 1e3  # growth of the norm beyond which a hypergradient is of little use
SMOOTHER = (
    "What smooths it: a smaller lr, gradient clipping, a larger eps in Adam's root, larger batches, smooth activations, average "
    "in place of max pooling, or a shorter trajectory."
)


class Diagnostics:
    """Counts what a mode did, for `Result.stats`."""

    def __init__(self, device: torch.device):
        self.device, self.start = device, time.perf_counter()
        self.gradients = self.products = 0
        self.norms = Series()  # of the tangent or adjoint, step after step; they stay on the device to the end
        self.ill_conditioned: Tensor | None = None  # [n_groups] bool, the same
        self.differentiated = True  # gradients were computed
        self.moved: list[str] | None = None  # buffers that training changes, where the mode found out
        self.warnings: list[str] = []
        self.extra: dict[str, Any] = {"warnings": self.warnings}  # further entries of `Result.stats`
        self.base = self._peak()

    def _peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def warn(self, sentence: str) -> None:
        """Add a sentence to `Result.stats["warnings"]`."""
        self.warnings.append(sentence)

    def norm(self, x: Tensor, known: Tensor | None = None) -> None:
        """Record the norm of the tangent or adjoint after one more step. `known`: it, where it was computed already."""
        self.norms.append(torch.linalg.vector_norm(x).detach() if known is None else known.detach())

    def not_replayed(self, t: int) -> None:
        """Record that replaying did not give the same weights before step t, bit for bit."""
        first = self.extra["replayed_exactly"]
        self.extra["replayed_exactly"] = False
        if first and (self.device.type == "cpu" or torch.are_deterministic_algorithms_enabled()):
            self.warn(
                f"the steps before step {t} were not the same, bit for bit, when they were replayed, though losses agree to "
                "0.1 %: something in the training loss is not deterministic. mode='forward' replays nothing."
            )

    def _check_chaos(self, norms: Sequence[float], usual: float) -> None:
        """Warn where the tangent or adjoint grew too far to be of use. `usual`: the growth that K steps alone explain."""
        found = [x for x in norms if math.isfinite(x) and x > 0]
        growth = max(found) / found[0] / usual if found else 0.0
        overflowed = not all(map(math.isfinite, norms))
        if growth > CHAOS or overflowed:
            how = "overflowed" if overflowed else f"grew by a factor {growth:.1e}"
            self.warn(
                f"training is chaotic here: its derivative {how} in {len(norms)} steps. The hypergradient is that of a "
                f"function which looks like noise at any step of useful size. {SMOOTHER}"
            )

    def observe_conditioning(self, flags: Tensor | None) -> None:
        """Record one step's flags of `Trajectory.ill_conditioned_decay`: coupled decay at 0, gradients exactly 0."""
        if flags is not None:
            self.ill_conditioned = flags if self.ill_conditioned is None else self.ill_conditioned | flags

    def _warn_of_ill_conditioning(self) -> None:
        flags = [] if self.ill_conditioned is None else self.ill_conditioned.tolist()
        groups = [i for i, flag in enumerate(flags) if flag]
        if groups:
            self.extra["ill_conditioned"] = ["weight_decay"]
            self.warn(
                f"the derivative in weight_decay is ill-conditioned in param groups {groups}: with coupled decay at 0 and "
                "gradients that are exactly 0 it is about lr * p / eps. Use a weight decay above 0, a larger eps, or AdamW."
            )
            warn_user(self.warnings[-1])

    def stats(self, steps: int, usual: float = 1.0) -> dict[str, Any]:
        norms = self.norms.tolist()
        found = [x for x in norms if math.isfinite(x) and x > 0]
        self._warn_of_ill_conditioning()
        self._check_chaos(norms, usual)
        growth = math.log(found[-1] / found[0]) / (len(found) - 1) if len(found) > 1 else math.nan
        return {
            "steps": steps,
            "seconds": time.perf_counter() - self.start,
            "peak_bytes": self._peak() - self.base,
            "gradient_evaluations": self.gradients,
            "hessian_products": self.products,
            "growth_rate": growth,
            "nonfinite_share": sum(not math.isfinite(x) for x in norms) / max(1, len(norms)),
        } | self.extra
