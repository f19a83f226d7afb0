"""One hyperparameter: its range, and the coordinate in which it is moved.

positive        φ = log x              lr, weight_decay, eps, lr_decay, momentum_decay, clipping thresholds
unit            φ = log(x/(1 − x))     momentum, dampening
unit_high       φ = −log(1 − x)        betas, alpha, rho: values close to 1 whose distance from 1 matters
free            φ = x                  anything else
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hypergrad.core.float64 import on_host

KINDS = ("positive", "unit", "unit_high", "free")
_OPEN = {"positive": (0.0, math.inf), "unit": (0.0, 1.0), "unit_high": (0.0, 1.0), "free": (-math.inf, math.inf)}

# names in param_groups -> their kind, and where a value of 0 in every group starts when it is tuned
KIND_OF = {
    "lr": "positive",
    "weight_decay": "positive",
    "eps": "positive",
    "momentum": "unit",
    "dampening": "unit",
    "betas": "unit_high",
    "alpha": "unit_high",
    "rho": "unit_high",
    "lr_decay": "positive",
    "momentum_decay": "positive",
    "d": "positive",
    "initial_accumulator_value": "positive",
    "clip_norm": "positive",
    "clip_value": "positive",
}
START_FROM_ZERO = {"lr": 1e-5, "weight_decay": 1e-5, "momentum": 0.1, "dampening": 0.01, "eps": 1e-8}


@dataclass(frozen=True)
class Hyperparameter:
    """A hyperparameter to be tuned.

    Args:
        start: first value; a number, or a tensor for a hyperparameter in the loss: that very tensor is then tuned, in place.
            None: the value in the param groups.
        bounds: (low, high) that the value is kept within. None: the whole range of its kind.
        kind: "positive" (moved as log x), "unit" (as logit x), "unit_high" (as −log(1 − x), for values close to 1) or "free".
            None: by name for names of param groups; "free" for tensors in the loss.

    Raises:
        ValueError: a NaN start, one outside its kind's range or outside the bounds, or bounds reversed.

    Example:
        >>> h = Hyperparameter(0.1, bounds=(1e-5, 1.0), kind="positive")
        >>> float(h.to_free(torch.tensor(1.0))), float(h.from_free(torch.tensor(0.0)))
        (0.0, 1.0)
        >>> float(h.slope(torch.tensor(0.5)))  # dx/dφ = x in log x
        0.5
    """

    start: float | Tensor | None = None
    bounds: tuple[float, float] | None = None
    kind: str | None = None

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}.")
        if self.bounds is not None:
            low, high = self.bounds
            if not low < high:
                raise ValueError(f"bounds must be (low, high) with low < high, got {self.bounds}.")
        if self.start is not None:
            self._check_start(on_host(self.start).detach())

    def _check_start(self, start: Tensor) -> None:
        if not bool(torch.isfinite(start).all()):
            raise ValueError(f"start must be finite, got {self.start}.")
        low, high = _OPEN[self.kind or "free"]
        if not bool(((start > low) & (start < high)).all()):
            raise ValueError(f"start {self.start} is outside ({low}, {high}), the open range of kind {self.kind!r}.")
        if self.bounds is not None and not bool(((start >= self.bounds[0]) & (start <= self.bounds[1])).all()):
            raise ValueError(f"start {self.start} is outside its bounds {self.bounds}.")

    def named(self, name: str) -> Hyperparameter:
        """The same with the kind of a name, validated again."""
        return Hyperparameter(self.start, self.bounds, self.kind or KIND_OF.get(name, "free"))

    @property
    def limits(self) -> tuple[float, float]:
        """Bounds of φ; a tiny margin keeps an open range's ends out."""
        low, high = _OPEN[self.kind or "free"]
        tiny = 1e-12
        low, high = (low + tiny if math.isfinite(low) else low), (high - tiny if math.isfinite(high) else high)
        if self.bounds is not None:
            low, high = max(low, self.bounds[0]), min(high, self.bounds[1])
        ends = torch.tensor([low, high], dtype=torch.float64)
        a, b = (ends if self.kind in (None, "free") else self.to_free(ends)).tolist()
        return a, b

    def to_free(self, x: Tensor) -> Tensor:
        """φ(x), in float64."""
        x = x.to(torch.float64)
        match self.kind:
            case "positive":
                return x.log()
            case "unit":
                return torch.logit(x)
            case "unit_high":
                return -torch.log1p(-x)
        return x

    def from_free(self, phi: Tensor) -> Tensor:
        """x(φ)."""
        match self.kind:
            case "positive":
                return phi.exp()
            case "unit":
                return phi.sigmoid()
            case "unit_high":
                return -torch.expm1(-phi)
        return phi

    def slope(self, x: Tensor) -> Tensor:
        """dx/dφ at the value x."""
        match self.kind:
            case "positive":
                return x
            case "unit":
                return x * (1 - x)
            case "unit_high":
                return 1 - x
        return torch.ones_like(x)


def as_hyperparameter(name: str, value: Any, in_loss: bool = False) -> Hyperparameter:
    """What a user wrote for a hyperparameter: a Hyperparameter, a number, a tensor, or None for the present value.

    in_loss: of a tensor in the loss, whose name says nothing of its kind.
    """
    name_of_kind = "" if in_loss else name
    if isinstance(value, Hyperparameter):
        return value.named(name_of_kind)
    if value is None or isinstance(value, (int, float, Tensor)):
        return Hyperparameter(value).named(name_of_kind)
    raise TypeError(f"{name}: expected a hypergrad.Hyperparameter, a number or a tensor, got {type(value).__name__}.")
