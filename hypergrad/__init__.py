"""Hyperparameters of a PyTorch training loop, tuned by gradient descent while the model trains."""

from hypergrad import search, shapes, solvers
from hypergrad.checks import Report, check
from hypergrad.exact import hypergradient
from hypergrad.hyperparameters import Hyperparameter
from hypergrad.modes import Result
from hypergrad.population import Population
from hypergrad.run_evaluations import Run
from hypergrad.tuner import Tuner
from hypergrad.whole_run import RunResult, tune_run

__version__ = "0.1.0"
__all__ = [
    "Hyperparameter",
    "Population",
    "Report",
    "Result",
    "Run",
    "RunResult",
    "Tuner",
    "check",
    "hypergradient",
    "search",
    "shapes",
    "solvers",
    "tune_run",
]
