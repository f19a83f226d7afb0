"""The candidates of one search: hyperparameters fitted on every fold, their held-out losses and slopes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import cross_validate
from sklearn.utils import _safe_indexing

from hypergrad.search.entries import Float
from hypergrad.search.sklearn.gradient_descent import Point
from hypergrad.search.sklearn.minimum import HeldOut
from hypergrad.search.sklearn.models import hypergradient, with_params


@dataclass
class Candidate:
    """One point u of the unit cube, its values, what `cross_validate` gave and, once differentiated, its slopes."""

    u: Point
    params: dict[str, float]
    scores: dict[str, NDArray[np.float64]]  # fit_time, score_time, test_score, train_score, each [folds]
    losses: NDArray[np.float64]  # [folds]
    fitted: list[Any] | None  # one estimator a fold, until it is differentiated or the scan is over
    slopes: dict[str, float] | None = None  # of the mean loss in each value
    gap: float = 0.0
    seconds: float = float("nan")  # of the differentiation

    @property
    def loss(self) -> float:
        return float(self.losses.mean())


class Folds:
    """X and y, split once. Every candidate is fitted and scored on the same folds by scikit-learn's `cross_validate`."""

    def __init__(
        self,
        estimator: Any,
        entries: dict[str, Float],
        loss: str,
        data: tuple[Any, Any],
        splits: list[Any],
        **options: Any,
    ):
        self.estimator, self.entries, self.loss, self.data = estimator, entries, loss, data
        self.splits, self.options = splits, options
        self.parts = [[_safe_indexing(part, rows) for rows in (train, test) for part in data] for train, test in splits]
        self.candidates: list[Candidate] = []

    def fit(self, u: Point) -> Candidate:
        """Fit the values at u on every fold, and score them."""
        params = {name: entry.from_unit(float(x)) for (name, entry), x in zip(self.entries.items(), u, strict=True)}
        scores = cross_validate(
            with_params(self.estimator, params),
            *self.data,
            cv=self.splits,
            return_estimator=True,
            error_score="raise",  # type: ignore[arg-type]
            **self.options,
        )
        fitted = scores.pop("estimator")
        losses = np.array([held.value for held in self._held_out(fitted, ())])
        self.candidates.append(Candidate(np.array(u), params, scores, losses, fitted))
        return self.candidates[-1]

    def value_and_gradient(self, u: Point) -> tuple[float, Point]:
        """The mean loss over the folds and its slope in u; what is fitted already is not fitted again.

        The value is that of the exact minima, to first order: solvers stop after a whole number of steps, and a line search along
        what they leave over would end at its jumps.
        """
        seen = (each for each in self.candidates if each.fitted is not None and np.array_equal(each.u, u))
        candidate = next(seen, None) or self.fit(u)
        before = time.perf_counter()
        held = self._held_out(candidate.fitted, list(self.entries))
        candidate.slopes = {name: float(np.mean([h.gradients[name] for h in held])) for name in self.entries}
        candidate.gap = float(np.mean([h.gap for h in held]))
        candidate.seconds, candidate.fitted = time.perf_counter() - before, None
        slopes = [candidate.slopes[name] * e.slope(candidate.params[name]) for name, e in self.entries.items()]
        return candidate.loss - candidate.gap, np.array(slopes)

    def _held_out(self, fitted: Any, wrt: Sequence[str]) -> list[HeldOut]:
        return [
            hypergradient(each, *part, wrt=wrt, loss=self.loss) for each, part in zip(fitted, self.parts, strict=True)
        ]

    def results(self) -> dict[str, Any]:
        """One entry a candidate: the columns that GridSearchCV does not have."""
        losses = np.array([each.losses for each in self.candidates])
        mean = losses.mean(1)
        of_slopes = {
            f"slope_{name}": np.array([each.slopes[name] if each.slopes else np.nan for each in self.candidates])
            for name in self.entries
        }
        return {
            **{f"split{i}_test_loss": losses[:, i] for i in range(losses.shape[1])},
            "mean_test_loss": mean,
            "std_test_loss": losses.std(1),
            "rank_test_loss": np.array([int((mean < own).sum()) + 1 for own in mean], dtype=np.int32),
            **of_slopes,
            "gradient_time": np.array([each.seconds for each in self.candidates]),
        }

    def timed(self) -> list[dict[str, Any]]:
        """One dict a candidate and fold, in the form that scikit-learn's searches tabulate."""
        names = {"test_score": "test_scores", "train_score": "train_scores"}
        return [
            {names.get(key, key): column[i] for key, column in each.scores.items()}
            for each in self.candidates
            for i in range(len(self.splits))
        ]
