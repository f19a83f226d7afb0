"""scikit-learn: `HypergradSearchCV` over its estimators, and what it is made of. Importing this needs scikit-learn."""

from hypergrad.search.sklearn.minimum import HeldOut
from hypergrad.search.sklearn.mlp import MLPClassifier, MLPRegressor
from hypergrad.search.sklearn.models import MODELS, hypergradient
from hypergrad.search.sklearn.search_cv import HypergradSearchCV

__all__ = ["MODELS", "HeldOut", "HypergradSearchCV", "MLPClassifier", "MLPRegressor", "hypergradient"]
