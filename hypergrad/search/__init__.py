"""Search for hyperparameters: grid, random, Bayesian, Hyperband and hypergradient behind one call.

study = hypergrad.search.optimize(objective, space, strategy="tpe", budget={"trials": 64})
study.best_params, study.best_value
print(study.verify(test_objective))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hypergrad.search.budget import Budget, Cost
from hypergrad.search.convert import (
    from_hyperopt,
    from_optuna,
    from_ray,
    from_sklearn,
    to_hyperopt,
    to_optuna,
    to_param_distributions,
    to_param_grid,
    to_ray,
)
from hypergrad.search.convert.optuna_spaces import suggest
from hypergrad.search.entries import Categorical, Float, Int
from hypergrad.search.extras import need
from hypergrad.search.fmin import hyperopt_objective
from hypergrad.search.gradient_steps import enqueue_hypergradient_step, hypergradient_step, note_hypergradient
from hypergrad.search.objective import Pruned, Trial
from hypergrad.search.ranges import suggest_space
from hypergrad.search.ray_tune import ray_trainable
from hypergrad.search.records import Record
from hypergrad.search.run_study import optimize
from hypergrad.search.space import Space
from hypergrad.search.strategies import STRATEGIES
from hypergrad.search.study import NoTrialCompleted, Study, Verification
from hypergrad.whole_run.run import Run

if TYPE_CHECKING:
    from hypergrad.search.sklearn import HypergradSearchCV as HypergradSearchCV

__all__ = [
    "STRATEGIES",
    "Budget",
    "Categorical",
    "Cost",
    "Float",
    "Int",
    "NoTrialCompleted",
    "Pruned",
    "Record",
    "Run",
    "Space",
    "Study",
    "Trial",
    "Verification",
    "enqueue_hypergradient_step",
    "from_hyperopt",
    "from_optuna",
    "from_ray",
    "from_sklearn",
    "hypergradient_step",
    "hyperopt_objective",
    "note_hypergradient",
    "optimize",
    "ray_trainable",
    "suggest",
    "suggest_space",
    "to_hyperopt",
    "to_optuna",
    "to_param_distributions",
    "to_param_grid",
    "to_ray",
]


def __getattr__(name: str) -> Any:
    """HypergradSearchCV is a class of scikit-learn's kind: it is imported when it is asked for, and so left out of __all__."""
    if name != "HypergradSearchCV":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    need("sklearn", name)
    from hypergrad.search.sklearn import HypergradSearchCV

    return HypergradSearchCV


def __dir__() -> list[str]:
    return [*__all__, "HypergradSearchCV"]
