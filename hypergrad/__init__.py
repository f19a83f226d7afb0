"""Hyperparameters of a PyTorch training loop, tuned by gradient descent while the model trains."""

from hypergrad import shapes, solvers
from hypergrad.checks import Report, check
from hypergrad.exact import hypergradient
from hypergrad.hyperparameters import Hyperparameter
from hypergrad.modes import Result
from hypergrad.tuner import Tuner

__version__ = "0.1.0"
__all__ = ["Hyperparameter", "Report", "Result", "Tuner", "check", "hypergradient", "shapes", "solvers"]
