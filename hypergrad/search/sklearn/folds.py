"""The candidates of one search: hyperparameters fitted on every fold, their held-out losses and slopes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.model_selection._validation import _fit_and_score
from sklearn.utils import _safe_indexing
from sklearn.utils.parallel import Parallel, delayed
from sklearn.utils.validation import _check_method_params

from hypergrad.search.entries import Float
from hypergrad.search.sklearn.gradient_descent import Point
from hypergrad.search.sklearn.minimum import HeldOut
from hypergrad.search.sklearn.models import hypergradient, weight_of_last_step


@dataclass
class Candidate:
    """One point u of the unit cube, its values, what scikit-learn gave for each fold and, once differentiated, its slopes."""

    u: Point
    params: dict[str, float]
    scores: list[dict[str, Any]]  # one a fold: fit_time, score_time, test_scores, train_scores
    losses: NDArray[np.float64]  # [folds]
    fitted: list[Any] | None  # one estimator a fold, until it is differentiated or the scan is over
    slopes: dict[str, float] | None = None  # of the mean loss in each value
    gap: float = 0.0
    seconds: float = float("nan")  # of the differentiation

    @property
    def loss(self) -> float:
        return float(self.losses.mean())


@dataclass(frozen=True)
class Samples:
    """X and y, how they are split, and what goes with them, as scikit-learn's searches route it.

    Args:
        splits: (rows of the training part, held-out rows) of each fold.
        fit: arguments of the estimator's `fit`, such as sample_weight; those of one value a sample are split with it.
        score: arguments of the scorer. Where sample_weight is among them, the held-out loss is weighted too.
    """

    X: Any
    y: Any
    splits: list[tuple[Any, Any]]
    fit: Mapping[str, Any] = field(default_factory=dict)
    score: Mapping[str, Any] = field(default_factory=dict)

    def parts(self, estimator: Any) -> list[dict[str, Any]]:
        """Arguments of `hypergradient`, one dict a fold."""
        found = []
        for train, test in self.splits:
            x, x_val = (_safe_indexing(self.X, rows) for rows in (train, test))
            y, y_val = (_safe_indexing(self.y, rows) for rows in (train, test))
            weight = weight_of_last_step(estimator, _check_method_params(self.X, self.fit, train))
            weight_val = _check_method_params(self.X, self.score, test).get("sample_weight")
            found.append(
                {
                    "X": x,
                    "y": y,
                    "X_val": x_val,
                    "y_val": y_val,
                    "sample_weight": weight,
                    "sample_weight_val": weight_val,
                }
            )
        return found


class Folds:
    """Candidates of one search. Each is fitted and scored on the same folds, as scikit-learn's searches do it.

    Args:
        loss: name of the held-out loss.
        parallel: runs the fits.
        options: of scikit-learn's fits: scorer, return_train_score, verbose.
    """

    def __init__(
        self,
        estimator: Any,
        entries: dict[str, Float],
        loss: str,
        samples: Samples,
        parallel: Parallel,
        **options: Any,
    ):
        self.estimator, self.entries, self.loss, self.samples = estimator, entries, loss, samples
        self.parallel, self.options = parallel, options
        self.parts = samples.parts(estimator)
        self.candidates: list[Candidate] = []

    def fit(self, *points: Point) -> list[Candidate]:
        """Fit the values at each point on every fold, and score them."""
        all_params = [{n: e.from_unit(float(x)) for (n, e), x in zip(self.entries.items(), u)} for u in points]
        folds, split = len(self.samples.splits), self.samples.splits
        out: Any = self.parallel(
            delayed(_fit_and_score)(
                clone(self.estimator),
                self.samples.X,
                self.samples.y,
                train=split[fold][0],
                test=split[fold][1],
                parameters=params,
                fit_params=self.samples.fit,
                score_params=self.samples.score,
                split_progress=(fold, folds),
                candidate_progress=(len(self.candidates) + i, len(self.candidates) + len(points)),
                return_times=True,
                return_estimator=True,
                error_score="raise",
                **self.options,
            )
            for (i, params), fold in product(enumerate(all_params), range(folds))
        )
        if isinstance(out[0]["test_scores"], Mapping):
            raise ValueError(
                "scoring must give one number, which is reported beside the loss; it gave a dict of several."
            )
        new = []
        for i, (u, params) in enumerate(zip(points, all_params)):
            scores = out[i * folds : (i + 1) * folds]
            fitted = [each.pop("estimator") for each in scores]
            losses = np.array([held.value for held in self._held_out(fitted, ())])
            new.append(Candidate(np.array(u), params, scores, losses, fitted))
        self.candidates += new
        return new

    def value_and_gradient(self, u: Point) -> tuple[float, Point]:
        """The mean loss over the folds and its slope in u; what is fitted already is not fitted again.

        The value is that of the exact minima, to first order: solvers stop after a whole number of steps, and a line search along
        what they leave over would end at its jumps.
        """
        seen = (each for each in self.candidates if each.fitted is not None and np.array_equal(each.u, u))
        candidate = next(seen, None) or self.fit(u)[0]
        before = time.perf_counter()
        held = self._held_out(candidate.fitted, list(self.entries))
        candidate.slopes = {name: float(np.mean([h.gradients[name] for h in held])) for name in self.entries}
        candidate.gap = float(np.mean([h.gap for h in held]))
        candidate.seconds, candidate.fitted = time.perf_counter() - before, None
        slopes = [candidate.slopes[name] * e.slope(candidate.params[name]) for name, e in self.entries.items()]
        return candidate.loss - candidate.gap, np.array(slopes)

    def _held_out(self, fitted: Any, wrt: Sequence[str]) -> list[HeldOut]:
        return [hypergradient(each, **part, wrt=wrt, loss=self.loss) for each, part in zip(fitted, self.parts)]

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

    def scores(self) -> list[dict[str, Any]]:
        """One dict a candidate and fold, which scikit-learn's searches tabulate."""
        return [each for candidate in self.candidates for each in candidate.scores]
