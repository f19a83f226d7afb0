"""Hyperparameters of a PyTorch training loop, tuned by gradient descent while the model trains."""

from hypergrad import policies, schedules, search, solvers
from hypergrad.checks.check import Report, check
from hypergrad.core.hyperparameters import Hyperparameter
from hypergrad.differentiate.hypergradient import hypergradient
from hypergrad.differentiate.trajectory import Result
from hypergrad.online.plan import Plan
from hypergrad.online.population import Population
from hypergrad.online.recipe import OptimizerRecipe, Recipe
from hypergrad.online.tuner import Tuner
from hypergrad.online.validation_loss import validation
from hypergrad.whole_run.outer_loop import RunResult
from hypergrad.whole_run.run import Run
from hypergrad.whole_run.tune_run import tune_run

__version__ = "0.1.0"
__all__ = [
    "Hyperparameter",
    "OptimizerRecipe",
    "Plan",
    "Population",
    "Recipe",
    "Report",
    "Result",
    "Run",
    "RunResult",
    "Tuner",
    "check",
    "hypergradient",
    "policies",
    "schedules",
    "search",
    "solvers",
    "tune_run",
    "validation",
]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
