"""How far φ moves from one whole run to the next: SGD, Adam or sign steps, with a size that halves and grows.

A value that is not worse than the best so far is the new best, and the step from it is longer by GROW. After a worse one the
step is taken again from the best point, half as long. The step, with g the hypergradient in φ:

    sgd     η σ g
    adam    η σ m̂/√s                  `online/policies/adam_on_phi.py`; after a worse value m is the best point's g again
    sign    η σ_j sign g_j           Rprop, Riedmiller & Braun 1993: σ_j halves where g_j changed its sign, and grows else
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from hypergrad.online.policies.adam_on_phi import ADAM

RULES = ("adam", "sign", "sgd")
GROW, HALF = 1.2, 0.5
SMALLEST = 2.0**-12  # the descent ends once steps are this much shorter than the first
WINDOW, PROGRESS = 2, 0.02  # stalled: the last 2 evaluations lowered the value by less than 2 % of the whole decrease


@dataclass(frozen=True)
class Point:
    """The objective and hypergradient [k] at one φ, and the number of the outer step."""

    value: float
    phi: Tensor
    gradient: Tensor
    step: int

    def is_finite(self) -> bool:
        return math.isfinite(self.value) and bool(torch.isfinite(self.gradient).all())


class OuterSteps:
    """Steps of φ [k], float64, at one horizon.

    Args:
        rule: one of RULES.
        lr: η, the length of the first step.
        k: how many numbers there are.
        size: σ of the first step.
    """

    def __init__(self, rule: str, lr: float, k: int, size: float = 1.0):
        self.rule, self.lr = rule, lr
        zero = torch.zeros(k, dtype=torch.float64)
        self.size, self.m, self.s = torch.full_like(zero, size), zero, zero.clone()
        self.m_steps = self.s_steps = 0
        self.best: Point | None = None
        self.bests: list[float] = []  # the best value after each evaluation

    def take(self, point: Point) -> bool:
        """Update the state by an evaluation. Returns whether it is the best so far; one that is not finite never is."""
        better = point.is_finite() and (self.best is None or point.value <= self.best.value)
        if better:
            self._accept(point)
        else:
            self.size = self.size * HALF
            if self.best is not None:
                self.m, self.m_steps = (1 - ADAM.beta1) * self.best.gradient, 1
        if self.best is not None:
            self.bests.append(self.best.value)
        return better

    def _accept(self, point: Point) -> None:
        g, old = point.gradient, self.best
        if old is not None:
            agree = torch.ones_like(g) if self.rule != "sign" else (g * old.gradient).sign()
            factor = torch.ones_like(g)
            factor[agree > 0], factor[agree < 0] = GROW, HALF
            self.size = self.size * factor
        self.m_steps, self.s_steps = self.m_steps + 1, self.s_steps + 1
        self.m, self.s = ADAM.averages(g, self.m, self.s, torch.tensor(self.s_steps, dtype=torch.float64))
        self.best = point

    def next(self) -> Tensor:
        """The φ of the next evaluation: a step from the best point."""
        assert self.best is not None
        return self.best.phi - self.lr * self.size * self._direction(self.best.gradient)

    def _direction(self, g: Tensor) -> Tensor:
        if self.rule == "sgd":
            return g
        if self.rule == "sign":
            return g.sign()
        return ADAM.direction(self.m, self.s, torch.tensor(self.m_steps, dtype=torch.float64))

    def stalled(self) -> bool:
        """Whether the last evaluations lowered the value hardly at all."""
        if len(self.bests) <= WINDOW:
            return False
        return self.bests[-1 - WINDOW] - self.bests[-1] <= PROGRESS * (self.bests[0] - self.bests[-1])

    def exhausted(self) -> bool:
        """Whether steps have become too short to matter."""
        return float(self.size.max()) < SMALLEST

    def state_dict(self) -> dict[str, Any]:
        """Numbers and lists, for JSON."""
        best = None if self.best is None else {n: listed(x) for n, x in asdict(self.best).items()}
        state = {name: listed(getattr(self, name)) for name in ("size", "m", "s", "m_steps", "s_steps", "bests")}
        return state | {"best": best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in ("size", "m", "s"):
            setattr(self, name, vector(state[name]))
        self.m_steps, self.s_steps, self.bests = state["m_steps"], state["s_steps"], list(state["bests"])
        best = state["best"]
        self.best = best and Point(best["value"], vector(best["phi"]), vector(best["gradient"]), best["step"])


def listed(x: Any) -> Any:
    return x.tolist() if isinstance(x, Tensor) else x


def vector(x: list[float]) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)
