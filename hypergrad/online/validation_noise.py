r"""Whether the validation batch is large enough to give a hypergradient a sign.

At the first DRAWS hyperparameter steps after the warm start the hypergradient is taken twice at the same weights, on two draws
of the validation loss: h = s + n and h' = s + n', with n, n' independent. Their correlation ρ = E[s²] / (E[s²] + E[n²]) says what
share of a hypergradient is signal. Hypergradients shrink by orders of magnitude in a run, so what is averaged has no scale:

    r = mean of 2 h h' / (h² + h'²)        for normal h, h'   E r = (1 − √(1 − ρ²)) / ρ,   so   ρ = 2 r / (1 + r²)

Where even r + its standard error stands for a ρ below ENOUGH, most of a hypergradient is noise: tuning is a random walk. A batch
k times as large divides E[n²] by k: ρ(k) = ρ / (ρ + (1 − ρ)/k), which is ENOUGH at k = (1 − ρ)/ρ · ENOUGH/(1 − ENOUGH). As ρ is
known from above, this k is a lower bound. A loss that gives the same twice, a whole validation set, is left alone from then on.
(The angle of a pair of correlated normal variables; ρ is the intraclass correlation.)

Evidence: experiments/results/online_tuning_log.md, session 7.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

DRAWS = 16  # hyperparameter steps at which two draws are compared
ENOUGH = 0.5  # of ρ
LARGEST = 20  # the largest k that is named: a larger one cannot be told from it

Pair = tuple[Sequence[float], Sequence[float]]


class ValidationNoise:
    """Compares pairs of hypergradients.

    Example:
        >>> noise = ValidationNoise()
        >>> signs = [1, 1, -1, -1] * 4
        >>> for h, other in zip(signs, signs[1:] + signs[:1]):  # half of the pairs agree: r = 0, its standard error is 0.257
        ...     noise.note([h], [0.9 * other])
        >>> noise.wanted, noise.size_factor()  # ρ is 2·0.257/(1 + 0.257²) = 0.48 at most: the batch should be 1.08 times as large
        (False, 2)
    """

    def __init__(self):
        self.products: list[float] = []  # of every pair: 2 h h' / (h² + h'²)
        self.wanted = True  # another pair

    def note(self, one: Sequence[float], other: Sequence[float]) -> None:
        """The hypergradients of all numbers that are tuned, on two draws of the validation loss."""
        squares = [a * a + b * b for a, b in zip(one, other, strict=True)]
        found = [2 * a * b / s for a, b, s in zip(one, other, squares, strict=True) if 0 < s < math.inf]
        if found:
            self.products.append(fmean(found))
        same = list(one) == list(other) and bool(found)
        self.wanted = not same and len(self.products) < DRAWS

    def size_factor(self) -> int | None:
        """How many times as large the validation batch ought to be at least; None: large enough, or not known (yet)."""
        if len(self.products) < DRAWS:
            return None
        most = fmean(self.products) + stdev(self.products) / math.sqrt(DRAWS)
        rho = 2 * most / (1 + most * most)
        if rho >= ENOUGH:
            return None
        factor = (1 - rho) / rho * ENOUGH / (1 - ENOUGH) if rho > 0 else math.inf
        return math.ceil(min(factor, LARGEST))

    def state_dict(self) -> dict[str, Any]:
        return {"products": list(self.products), "wanted": self.wanted}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.products, self.wanted = list(state["products"]), bool(state["wanted"])
