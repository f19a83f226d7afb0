"""A random forest on iris, its grid searched by scikit-learn and by hypergrad.search: the same points, the same winner.

    python -m experiments.iris_forest [--quick]

Every one of 144 points is scored by 5-fold cross-validated accuracy on the training part, once inside `GridSearchCV` and once as
an objective of `hypergrad.search.optimize(strategy="grid")`; the forest's random state and the split are fixed. Of equal scores
the first in ParameterGrid's order wins, in both. The winner is then fitted on the whole training part
and scored on the test part.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_score, train_test_split

from experiments import results
from experiments.arguments import arg, command, parse
from hypergrad.search import Study, from_sklearn, optimize

GRID: dict[str, list[Any]] = {  # 4 · 4 · 3 · 3 = 144 points
    "n_estimators": [10, 50, 100, 200],
    "max_depth": [None, 10, 20, 30],
    "min_samples_split": [2, 5, 10],
    "min_samples_leaf": [1, 2, 4],
}
QUICK: dict[str, list[Any]] = {  # 12 points
    "n_estimators": [5, 10],
    "max_depth": [None, 2],
    "min_samples_split": [2, 5, 10],
}
Row = dict[str, Any]


@dataclass
class Args:
    """GridSearchCV of a random forest on iris, by scikit-learn and by hypergrad.search."""

    seed: int = arg(42, "random state of the split, the folds and the forest")
    folds: int = arg(5, "of the cross-validation", quick=3)
    out: str = arg("runs/iris_forest", "folder of the result", quick="runs/iris_forest_quick")
    quick: bool = arg(False, "12 points and 3 folds: a test of the machinery")


class Iris:
    """The data, split once, and what scores a dict of the forest's arguments."""

    def __init__(self, seed: int, folds: int):
        x, y = load_iris(return_X_y=True)
        self.x, self.x_test, self.y, self.y_test = train_test_split(x, y, test_size=0.2, random_state=seed, stratify=y)
        self.forest = RandomForestClassifier(random_state=seed)
        self.folds = StratifiedKFold(folds, shuffle=True, random_state=seed)

    def scikit_learn(self, grid: dict[str, list[Any]]) -> GridSearchCV:
        return GridSearchCV(self.forest, grid, cv=self.folds, scoring="accuracy").fit(self.x, self.y)

    def hypergrad(self, grid: dict[str, list[Any]]) -> Study:
        return optimize(self.error, from_sklearn(grid), strategy="grid")

    def forest_of(self, params: dict[str, Any]) -> Any:
        forest: Any = clone(self.forest)
        return forest.set_params(**params)

    def error(self, params: dict[str, Any]) -> float:
        """Minus the mean accuracy over the folds."""
        forest = self.forest_of(params)
        return -float(np.mean(cross_val_score(forest, self.x, self.y, cv=self.folds, scoring="accuracy")))

    def test_error(self, params: dict[str, Any]) -> float:
        """Minus the accuracy on the test part, fitted on the whole training part."""
        return -float(self.forest_of(params).fit(self.x, self.y).score(self.x_test, self.y_test))


def compare(iris: Iris, grid: dict[str, list[Any]]) -> list[Row]:
    """A row for each of the two searches."""
    theirs, ours = iris.scikit_learn(grid), iris.hypergrad(grid)
    verified = ours.verify(iris.test_error)
    winners = {"scikit-learn": theirs.best_params_, "hypergrad.search": ours.best_params}
    scores = {
        "scikit-learn": theirs.cv_results_["mean_test_score"],
        "hypergrad.search": [-each.value for each in ours.trials if each.value is not None],
    }
    tests = {
        "scikit-learn": float(theirs.best_estimator_.score(iris.x_test, iris.y_test)),
        "hypergrad.search": -verified.test[0],
    }
    return [
        {
            "search": name,
            "points": len(scores[name]),
            "best_score": float(np.max(scores[name])),
            "largest_difference_of_scores": float(np.abs(np.subtract(*scores.values())).max()),
            "test_accuracy": tests[name],
            "same_winner": int(winners["scikit-learn"] == winners["hypergrad.search"]),
            **{f"best_{key}": value for key, value in winners[name].items()},
        }
        for name in winners
    ]


def main(argv: list[str] | None = None) -> list[Row]:
    args = parse(Args, argv)
    rows = compare(Iris(args.seed, args.folds), QUICK if args.quick else GRID)
    for row in rows:
        print(", ".join(f"{key} {value}" for key, value in row.items()))
    results.write(Path(args.out) / "iris_forest.json", command(args), rows)
    return rows


if __name__ == "__main__":
    main()
