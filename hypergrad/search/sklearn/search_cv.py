"""`HypergradSearchCV`: the protocol of GridSearchCV, and a descent along hypergradients in place of the grid."""

from __future__ import annotations

import time
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np
from sklearn.base import is_classifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import check_scoring
from sklearn.model_selection import check_cv
from sklearn.model_selection._search import BaseSearchCV
from sklearn.utils import check_random_state, indexable
from sklearn.utils.parallel import Parallel
from sklearn.utils.validation import _check_method_params

from hypergrad.core.user_warnings import warn_user
from hypergrad.search.convert.sklearn_spaces import from_sklearn
from hypergrad.search.entries import Float
from hypergrad.search.sklearn.folds import Folds, Samples
from hypergrad.search.sklearn.gradient_descent import descend, starts
from hypergrad.search.sklearn.models import check_names, find, loss_of, with_params

GAP = 0.01  # share of the loss that the solver's tolerance may be worth without a warning


class HypergradSearchCV(BaseSearchCV):
    r"""Search continuous hyperparameters of an estimator by the gradient of its cross-validated loss.

    Minimised is the mean over folds k of the loss on the held-out part V_k, at the minimum of the training objective on the rest:

        f(h) = 1/K Σ_k L(θ_k*(h); V_k),    θ_k*(h) = argmin_θ F(θ, h; rest)

    As θ_k* stays a minimum while h moves, ∂F/∂θ (θ_k*(h), h) = 0, and the implicit function theorem gives

        ∂f/∂h = −1/K Σ_k x_kᵀ ∂²F/∂θ∂h,    ∂²F/∂θ² x_k = ∂L/∂θ

    one linear solve a fold (`hypergrad.search.sklearn.hypergradient`). f and its gradient are given to L-BFGS-B, in each entry's
    own scale, from the best of a few spread points. Every fit is the estimator's own.

    Args:
        estimator: Ridge, Lasso, ElasticNet, LogisticRegression, LinearSVC(loss="squared_hinge"), or MLPClassifier and
            MLPRegressor of `hypergrad.search.sklearn`; or a Pipeline that ends in one of them.
        param_space: name → `hypergrad.search.Float`, or scipy.stats.loguniform or uniform; names as of `get_params`.
        loss: "squared_error", "log_loss" or "squared_hinge"; None: the usual one of the estimator. It must be differentiable.
        scoring: a scorer's name or callable that is reported beside the loss, in `best_score_` and `cv_results_`; None: the
            estimator's own `score`. It chooses nothing.
        n_iter: candidates at most, those of the scan among them.
        n_initial: points of the scan; the first of them is `start` of the entries, where they have one.
        tol: end where an iteration makes the loss less by no more than this share of it.
        cv, refit, return_train_score, verbose: as of GridSearchCV; refit is True or False. A fit that fails ends the search, as
            with error_score="raise" there.
        n_jobs: fits at a time, as of GridSearchCV: all points of the scan on all folds, and then the folds of one candidate.
        random_state: of the scan, in two dimensions or more.

    Attributes:
        cv_results_: the columns of GridSearchCV, one row a candidate; also `split0_test_loss`, …, `mean_test_loss`,
            `std_test_loss`, `rank_test_loss`, `slope_NAME` (the derivative of the mean loss in the value; NaN for candidates of
            the scan that were not differentiated) and `gradient_time`, seconds.
        best_index_, best_params_: of the least mean loss. rank_test_score is that of the scorer.
        best_loss_, best_score_: its mean loss and mean score.
        best_estimator_, refit_time_: fitted on all data, where refit.
        scorer_, n_splits_, classes_, n_features_in_, feature_names_in_: as of GridSearchCV.
        message_: why the descent ended.

    Raises:
        ValueError: in `fit`, before anything is fitted: an estimator, setting or hyperparameter without a derivative, a name that
            the estimator does not have, a discrete entry, an unknown loss or scorer; folds of which there are none. Where a fit
            or a scorer fails: its own error.

    Example:
        One feature, every fold the same row twice: f(α) = (y − w)², w = x²y/(x² + α/2) = 2/(2 + α), least at the least α.

        >>> from sklearn.linear_model import Ridge
        >>> from hypergrad.search import Float
        >>> search = HypergradSearchCV(Ridge(fit_intercept=False), {"alpha": Float(1e-2, 10, "log")}, cv=2)
        >>> search.fit([[1.0]] * 4, [1.0] * 4).best_params_
        {'alpha': 0.01}
        >>> round(search.best_loss_, 6), round((0.01 / 2.01) ** 2, 6)
        (2.5e-05, 2.5e-05)
    """

    def __init__(
        self,
        estimator: Any,
        param_space: Mapping[str, Any],
        *,
        loss: str | None = None,
        scoring: Any = None,
        n_iter: int = 30,
        n_initial: int = 5,
        tol: float = 1e-5,
        cv: Any = None,
        refit: bool = True,
        n_jobs: int | None = None,
        return_train_score: bool = False,
        random_state: Any = None,
        verbose: int = 0,
    ):
        super().__init__(
            estimator,
            scoring=scoring,
            n_jobs=n_jobs,
            refit=refit,
            cv=cv,
            verbose=verbose,
            return_train_score=return_train_score,
        )
        self.param_space, self.loss, self.random_state = param_space, loss, random_state
        self.n_iter, self.n_initial, self.tol = n_iter, n_initial, tol

    def fit(self, X: Any, y: Any = None, **params: Any) -> HypergradSearchCV:
        """Descend, and fit the estimator with the best hyperparameters on all data.

        Args:
            X, y: rows and targets, as the estimator takes them.
            params: as of GridSearchCV. groups goes to the splitter, the rest to the estimator's `fit`, where what has one value a
                sample is split with X and y, and sample_weight to the scorer as well, if that takes it. With scikit-learn's
                metadata routing switched on each goes where it is requested. Of sample_weight, what the estimator's last step
                gets weights the terms of F, and what the scorer gets those of L.
        """
        entries, loss = self._check()
        scorer = check_scoring(self.estimator, self.scoring)
        X, y = indexable(X, y)
        routed = self._get_routed_params_for_fit(_check_method_params(X, params))
        cv: Any = check_cv(self.cv, y, classifier=is_classifier(self.estimator))  # type: ignore[arg-type]
        splits = list(cv.split(X, y, **routed.splitter.split))
        if not splits:
            raise ValueError(
                "cv gives no folds: a generator that was used up gives none a second time; pass a list of them."
            )
        samples = Samples(X, y, splits, routed.estimator.fit, routed.scorer.score)
        options = {"scorer": scorer, "return_train_score": self.return_train_score, "verbose": self.verbose}
        with Parallel(n_jobs=self.n_jobs) as parallel:
            folds = Folds(self.estimator, entries, loss, samples, parallel, **options)
            self.message_ = self._descend(folds)
        self.scorer_, self.multimetric_, self.n_splits_ = scorer, False, len(splits)
        self._record(folds)
        if self.refit:
            before = time.perf_counter()
            self.best_estimator_ = with_params(self.estimator, self.best_params_).fit(X, y, **samples.fit)
            self.refit_time_ = time.perf_counter() - before
            if hasattr(self.best_estimator_, "feature_names_in_"):
                self.feature_names_in_ = self.best_estimator_.feature_names_in_
        return self

    def _check(self) -> tuple[dict[str, Float], str]:
        """Everything that can be wrong without the data."""
        for name, least in (("n_initial", 1), ("n_iter", 2)):
            given = getattr(self, name)
            if isinstance(given, bool) or not isinstance(given, Integral) or given < least:
                raise ValueError(f"{name} must be a whole number from {least}, got {given!r}.")
        if self.n_initial >= self.n_iter:
            raise ValueError(
                f"n_iter must be above n_initial, of which it is part, got n_iter={self.n_iter}, n_initial={self.n_initial}."
            )
        if not isinstance(self.tol, Real) or not self.tol >= 0:
            raise ValueError(f"tol must be a number from 0, got {self.tol!r}.")
        if not isinstance(self.refit, bool):
            raise ValueError(f"refit must be True or False (the best is that of the least loss), got {self.refit!r}.")
        if self.scoring is not None and not isinstance(self.scoring, str) and not callable(self.scoring):
            raise ValueError(
                "scoring must be the name of one scorer, a callable, or None: it is reported, not chosen by."
            )
        known, entries = self.estimator.get_params(), {}
        for name, entry in from_sklearn(self.param_space).items():
            if name not in known:
                raise ValueError(f"{type(self.estimator).__name__} has no parameter {name!r}: it has {sorted(known)}.")
            if not isinstance(entry, Float) or entry.step is not None:
                raise ValueError(
                    f"{name}: a gradient moves continuous entries, Float(low, high, scale) without a step, got {entry}. Search "
                    "discrete ones by GridSearchCV with this search as its estimator, or by hypergrad.search.optimize."
                )
            if entry.differentiable is False:
                raise ValueError(
                    f"{name}: differentiable=False, but only gradients move it here: leave it out of the space."
                )
            entries[name] = entry
        tuned = with_params(self.estimator, {name: entry.first() for name, entry in entries.items()})
        check_names(tuned, list(entries))
        return entries, loss_of(find(tuned), self.loss)

    def _descend(self, folds: Folds) -> str:
        seed = check_random_state(self.random_state).randint(2**31 - 1)
        entries = folds.entries.values()
        given = [[e.to_unit(e.first()) for e in entries]] if any(e.start is not None for e in entries) else []
        folds.fit(*map(np.array, given), *starts(len(folds.entries), self.n_initial - len(given), seed))
        best = min(folds.candidates, key=lambda each: each.loss)
        for each in folds.candidates:
            each.fitted = each.fitted if each is best else None
        return descend(folds.value_and_gradient, best.u, self.n_iter - self.n_initial, self.tol)

    def _record(self, folds: Folds) -> None:
        params = [each.params for each in folds.candidates]
        self.cv_results_ = self._format_results(params, len(folds.samples.splits), folds.scores(), folds.results())
        self.best_index_ = int(np.argmin(self.cv_results_["mean_test_loss"]))
        best = folds.candidates[self.best_index_]
        self.best_params_, self.best_loss_ = best.params, best.loss
        self.best_score_ = float(self.cv_results_["mean_test_score"][self.best_index_])
        if best.slopes is not None and not any(best.slopes.values()):
            warn_user(
                f"the loss does not change with {', '.join(best.params)} at {best.params}: every coefficient may be 0 there. "
                "Move the range, or raise n_initial.",
                ConvergenceWarning,
            )
        if abs(best.gap) > GAP * abs(best.loss):
            warn_user(
                f"the fits end short of their minimum, which is worth {best.gap:.2g} of a loss of {best.loss:.2g}: "
                "hypergradients are as far off. Lower the estimator's tol, or raise its max_iter.",
                ConvergenceWarning,
            )
