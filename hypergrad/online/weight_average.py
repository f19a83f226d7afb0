"""The running average of the weights and its tangent: θ̄ ← θ̄ + a (θ − θ̄), dθ̄/dφ likewise, a = 1/(share of the steps so far)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from hypergrad.optimizers.transition import Tangent, Transition

SHARE = 0.1  # it looks back over so much of the run so far


class WeightAverage:
    """θ̄.

    Attributes:
        theta: θ̄ [n]; None before the first step.
        tangent: dθ̄/dφ [k, n]; None: zero.
    """

    def __init__(self, transition: Transition):
        self.transition = transition
        self.theta: Tensor | None = None
        self.tangent: Tensor | None = None

    def follow(self, theta: Tensor, tangent: Tangent | None, t: int, steps: int = 1) -> None:
        """Move towards the weights and tangents after t steps, in place; steps: so many at once."""
        a = min(1.0, steps / (SHARE * (t + 1)))
        self.theta = theta.clone() if self.theta is None else self.theta.lerp_(theta, a)
        if tangent is not None:
            self.tangent = tangent.theta * a if self.tangent is None else self.tangent.lerp_(tangent.theta, a)

    def state_dict(self) -> dict[str, Tensor | None]:
        copies = [None if x is None else x.clone() for x in (self.theta, self.tangent)]
        return dict(zip(("average", "average_tangent"), copies, strict=True))

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """θ̄ in the model, and the weights themselves back on the way out."""
        theta = self.transition.flatten(self.transition.params)
        if self.theta is not None:
            self.transition.load(self.theta)
        try:
            yield
        finally:
            self.transition.load(theta)
