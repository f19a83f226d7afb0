"""Spaces of other libraries, read and written; one file a library, which is imported when one of its functions is called."""

from hypergrad.search.convert.hyperopt_spaces import from_hyperopt, to_hyperopt
from hypergrad.search.convert.optuna_spaces import from_optuna, to_optuna
from hypergrad.search.convert.ray_spaces import from_ray, to_ray
from hypergrad.search.convert.sklearn_spaces import from_sklearn, to_param_distributions, to_param_grid

__all__ = [
    "from_hyperopt",
    "from_optuna",
    "from_ray",
    "from_sklearn",
    "to_hyperopt",
    "to_optuna",
    "to_param_distributions",
    "to_param_grid",
    "to_ray",
]
