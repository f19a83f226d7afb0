"""HypergradSearchCV against GridSearchCV on a fine grid: the same estimators, folds and loss.

    python -m experiments.search_cv [--repeats 5] [--quick]

A quarter of each set is the test part. On the rest both searches minimise the mean held-out loss over five folds: the grid at 100
values of one hyperparameter, or 30 × 30 of two, even in the entry's scale; the gradient by at most 30 candidates. Both refit on
all folds and score on the test part. Every repeat runs both, one after the other, in turn the one or the other first; times are
this process's processor seconds, and ratios are medians over repeats.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris, load_wine, make_regression
from sklearn.linear_model import ElasticNet, Lasso, LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, KFold, StratifiedKFold, train_test_split
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from experiments import results
from experiments.arguments import arg, command, parse
from experiments.sweep import sweep
from hypergrad.search import Float, HypergradSearchCV
from hypergrad.search.sklearn import MLPClassifier

Row = dict[str, Any]
MSE, LOG_LOSS = "neg_mean_squared_error", "neg_log_loss"


@dataclass
class Args:
    """HypergradSearchCV against GridSearchCV on a fine grid."""

    repeats: int = arg(5, "runs of every pair, for the times", quick=1)
    line: int = arg(100, "grid points of one hyperparameter", quick=9)
    plane: int = arg(30, "grid points of each of two hyperparameters", quick=4)
    out: str = arg("runs/search_cv", "folder of the result", quick="runs/search_cv_quick")
    quick: bool = arg(False, "a coarse grid, one repeat: a test of the machinery")


def minus_squared_hinge(estimator: Any, x: np.ndarray, y: np.ndarray) -> float:
    """Of two classes, 0 and 1."""
    return -float(np.mean(np.maximum(0, 1 - (2 * y - 1) * estimator.decision_function(x)) ** 2))


class Problem(NamedTuple):
    title: str
    estimator: Any
    data: Callable[..., Any]
    space: dict[str, Float]
    scoring: Any
    classes: bool = True


_synthetic = partial(make_regression, 150, 300, n_informative=15, noise=100.0, random_state=0)
_exact = {"tol": 1e-7, "max_iter": 10_000}
PROBLEMS = {
    "ridge": Problem("ridge, diabetes", Ridge(), load_diabetes, {"alpha": Float(1e-3, 1e4, "log")}, MSE, False),
    "lasso": Problem("lasso, diabetes", Lasso(**_exact), load_diabetes, {"alpha": Float(1e-3, 1e2, "log")}, MSE, False),
    "lasso_wide": Problem(
        "lasso, synthetic, 300 columns", Lasso(**_exact), _synthetic, {"alpha": Float(0.5, 500.0, "log")}, MSE, False
    ),
    "elastic_net": Problem(
        "elastic net, diabetes",
        ElasticNet(**_exact),
        load_diabetes,
        {"alpha": Float(1e-3, 1e2, "log"), "l1_ratio": Float(0.05, 1.0)},
        MSE,
        False,
    ),
    "logistic": Problem(
        "logistic regression, breast cancer",
        LogisticRegression(**_exact),
        load_breast_cancer,
        {"C": Float(1e-4, 1e3, "log")},
        LOG_LOSS,
    ),
    "multinomial": Problem(
        "multinomial logistic regression, wine",
        LogisticRegression(**_exact),
        load_wine,
        {"C": Float(1e-4, 1e3, "log")},
        LOG_LOSS,
    ),
    "svm": Problem(
        "SVM, squared hinge, breast cancer",
        LinearSVC(dual=False, **_exact),  # type: ignore[arg-type]
        load_breast_cancer,
        {"C": Float(1e-5, 1e2, "log")},
        minus_squared_hinge,
    ),
    "mlp": Problem(
        "MLP at a minimum, iris",
        MLPClassifier((3,), activation="tanh", random_state=0),
        load_iris,
        {"alpha": Float(1e-3, 1.0, "log")},
        LOG_LOSS,
    ),
    "mlp_steps": Problem(
        "MLP after 30 steps, wine",
        MLPClassifier((4,), solver="sgd", max_iter=30, random_state=0),
        load_wine,
        {"learning_rate_init": Float(1e-3, 1.0, "log")},
        LOG_LOSS,
    ),
}
METHODS = ("gradient", "grid")


def search(name: str, method: str, points: int) -> Row:
    """One search of one problem, timed."""
    problem = PROBLEMS[name]
    x, y = problem.data() if problem.data is _synthetic else problem.data(return_X_y=True)
    x, x_test, y, y_test = train_test_split(x, y, random_state=0, stratify=y if problem.classes else None)
    estimator = Pipeline([("scale", StandardScaler()), ("model", problem.estimator)])
    space = {f"model__{key}": entry for key, entry in problem.space.items()}
    folds = (StratifiedKFold if problem.classes else KFold)(5, shuffle=True, random_state=0)
    if method == "gradient":
        made: Any = HypergradSearchCV(estimator, space, scoring=problem.scoring, cv=folds, random_state=0)
    else:
        grid = {key: [entry.from_unit(u) for u in np.linspace(0, 1, points)] for key, entry in space.items()}
        made = GridSearchCV(estimator, grid, scoring=problem.scoring, cv=folds)
    before = time.process_time()
    made.fit(x, y)
    seconds = time.process_time() - before
    candidates = len(made.cv_results_["params"])
    return {
        "seconds": seconds,
        "loss": made.best_loss_ if method == "gradient" else -float(made.best_score_),
        "candidates": candidates,
        "fold_fits": candidates * made.n_splits_,
        "test_score": float(made.best_estimator_.score(x_test, y_test)),
        **{key.replace("model__", "best_"): value for key, value in made.best_params_.items()},
    }


def both(item: Row) -> Row:
    """One repeat: both searches, in turn the one or the other first."""
    order = METHODS if item["repeat"] % 2 else METHODS[::-1]
    made = {method: search(item["model"], method, item["points"]) for method in order}
    return item | {f"{method}_{key}": value for method, row in made.items() for key, value in row.items()}


def summarised(rows: list[Row]) -> list[Row]:
    """A row a problem and method: what was found in the first repeat (all find the same), and median times."""
    out = []
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name]
        ratio = statistics.median(row["gradient_seconds"] / row["grid_seconds"] for row in own)
        loss_ratio = own[0]["gradient_loss"] / own[0]["grid_loss"]
        for method in METHODS:
            found = {k.removeprefix(f"{method}_"): v for k, v in own[0].items() if k.startswith(f"{method}_")}
            found["seconds"] = statistics.median(row[f"{method}_seconds"] for row in own)
            row = {"model": name, "title": PROBLEMS[name].title, "method": method, "repeats": len(own), **found}
            out.append(row | ({"loss_ratio": loss_ratio, "time_ratio": ratio} if method == "gradient" else {}))
    return out


def main(argv: list[str] | None = None) -> list[Row]:
    args = parse(Args, argv)
    points = {1: args.line, 2: args.plane}
    todo = [
        {"model": name, "repeat": repeat, "points": points[len(problem.space)]}
        for repeat in range(args.repeats)
        for name, problem in PROBLEMS.items()
    ]
    found = sweep(both, todo, Path(args.out) / "search_cv.jsonl")
    rows = summarised([row for row in found if any(item.items() <= row.items() for item in todo)])
    for row in rows:
        print(", ".join(f"{key} {value}" for key, value in row.items()))
    results.write(Path(args.out) / "search_cv.json", command(args), rows)
    return rows


if __name__ == "__main__":
    main()
