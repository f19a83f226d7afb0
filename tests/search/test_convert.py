"""Spaces of other libraries, there and back."""

from __future__ import annotations

import importlib.util
import random
from typing import Any

import numpy as np
import pytest

from hypergrad.search import (
    Categorical,
    Float,
    Int,
    Space,
    from_hyperopt,
    from_optuna,
    from_ray,
    from_sklearn,
    suggest,
    to_hyperopt,
    to_optuna,
    to_param_distributions,
    to_param_grid,
    to_ray,
)
from hypergrad.search.convert.hyperopt_spaces import flat
from hypergrad.search.convert.optuna_spaces import decode, encode
from tests.search.problems import CONDITIONAL, ENTRIES

DRAWS = 50


def has(module: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(module) is None
    return pytest.mark.skipif(missing, reason=f"{module} is not installed: its conversion is not tested here")


def same_set(a: Any, b: Any) -> bool:
    """A grid of steps may come back as the choices that it is."""
    return a == b or (isinstance(b, Categorical) and a.grid() == b.grid())


@pytest.mark.parametrize("name", ENTRIES)
def test_optuna_there_and_back(name: str) -> None:
    pytest.importorskip("optuna")
    space = Space({name: ENTRIES[name]})
    assert from_optuna(to_optuna(space))[name] == ENTRIES[name]
    values = {name: ENTRIES[name].first()}
    assert decode(space, encode(space, values)) == pytest.approx(values) if name == "logit" else values


def test_optuna_conditions_are_asked_inside_the_objective() -> None:
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    seen = []
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(lambda trial: seen.append(suggest(CONDITIONAL, trial)) or 0.0, n_trials=DRAWS)
    assert {frozenset(values) for values in seen} == {
        frozenset({"optimizer", "lr", "momentum"}),
        frozenset({"optimizer", "lr", "beta2"}),
    }
    assert all(CONDITIONAL.check(values) == values for values in seen)
    with pytest.raises(ValueError, match=r"call hypergrad.search.suggest\(space, trial\)"):
        to_optuna(CONDITIONAL)


@pytest.mark.parametrize("name", ENTRIES)
def test_sklearn_distributions_there_and_back(name: str) -> None:
    selection = pytest.importorskip("sklearn.model_selection")
    distributions = to_param_distributions({name: ENTRIES[name]})
    assert same_set(ENTRIES[name], from_sklearn(distributions)[name])  # type: ignore[arg-type]
    draws = selection.ParameterSampler(distributions, DRAWS if name not in ("step", "choices", "whole_step") else 3)
    assert all(each[name] in ENTRIES[name] for each in draws)


def test_sklearn_grid_there_and_back() -> None:
    grid = {"C": [0.1, 1.0], "kernel": ["rbf", "poly"]}
    assert to_param_grid(from_sklearn(grid)) == grid
    grids = [{"kernel": ["rbf"], "gamma": [0.1, 1.0], "C": [1, 10]}, {"kernel": ["linear"], "C": [1, 10]}]
    assert [dict(sorted(each.items())) for each in to_param_grid(from_sklearn(grids))] == [  # type: ignore[union-attr]
        dict(sorted(each.items())) for each in grids
    ]


def test_a_conditional_grid_has_every_point_once() -> None:
    selection = pytest.importorskip("sklearn.model_selection")
    space = Space(
        {"a": [1, 2, 3], "b": Categorical([5, 6], when={"a": (1, 3)}), "c": Categorical([7, 8], when={"b": 5})}
    )
    points = list(selection.ParameterGrid(to_param_grid(space)))
    assert len(points) == 7  # a = 2; a in {1, 3}: b = 5 with two c, b = 6
    assert all(space.check(point) for point in points)
    assert len({tuple(sorted(point.items())) for point in points}) == 7


def test_draws_are_even_in_the_scale() -> None:
    selection = pytest.importorskip("sklearn.model_selection")
    space = {name: ENTRIES[name] for name in ("linear", "log", "logit")}
    draws = list(selection.ParameterSampler(to_param_distributions(space), 2000, random_state=0))
    for name, entry in space.items():
        u = np.sort([entry.to_unit(each[name]) for each in draws])
        assert np.abs(u - np.linspace(0, 1, len(u))).max() < 0.04  # Kolmogorov–Smirnov at 2000 draws: 0.036 at 1 %


@has("hyperopt")
@pytest.mark.parametrize("name", ENTRIES)
def test_hyperopt_there_and_back(name: str) -> None:
    from hyperopt.pyll.stochastic import sample

    expressions = to_hyperopt({name: ENTRIES[name]})
    assert same_set(ENTRIES[name], from_hyperopt(expressions)[name])
    rng = np.random.default_rng(0)
    assert all(flat(sample(expressions, rng))[name] in ENTRIES[name] for _ in range(DRAWS))


@has("hyperopt")
def test_hyperopt_conditions_are_choices_between_dicts() -> None:
    from hyperopt.pyll.stochastic import sample

    expressions, rng = to_hyperopt(CONDITIONAL), np.random.default_rng(0)
    assert dict(from_hyperopt(expressions)) == dict(CONDITIONAL)
    points = [flat(sample(expressions, rng)) for _ in range(DRAWS)]
    assert {point["optimizer"] for point in points} == {"SGD", "Adam"}
    assert all(CONDITIONAL.check(point) for point in points)


@has("hyperopt")
def test_hyperopts_own_expressions_are_read() -> None:
    from hyperopt import hp

    space = from_hyperopt(
        {"x": hp.quniform("x", 2, 10, 2), "n": hp.uniformint("n", 1, 5), "k": hp.randint("k", 4), "c": 7}
    )
    assert dict(space) == {
        "x": Int(2, 10, step=2),
        "n": Int(1, 5),
        "k": Int(0, 3),
        "c": Categorical([7]),
    }
    with pytest.raises(ValueError, match="normal is not read"):
        from_hyperopt({"x": hp.normal("x", 0, 1)})


@has("ray")
@pytest.mark.parametrize("name", ENTRIES)
def test_ray_there_and_back(name: str) -> None:
    space = to_ray({name: ENTRIES[name]})
    assert same_set(ENTRIES[name], from_ray(space)[name])
    random.seed(0)
    assert all(space[name].sample() in ENTRIES[name] for _ in range(DRAWS))


NESTED = Space({"sizes": [[64, 64], [32], (32,)], "net": [{"value": 3}, {"widths": [8, 8]}], "k": Int(1, 3)})


@has("hyperopt")
def test_lists_and_dicts_are_choices_of_hyperopt() -> None:
    from hyperopt.pyll.stochastic import sample

    expressions, rng = to_hyperopt(NESTED), np.random.default_rng(0)
    assert from_hyperopt(expressions) == NESTED
    points = [flat(sample(expressions, rng), NESTED) for _ in range(DRAWS)]
    assert all(NESTED.check(point) == point for point in points)
    assert {type(point["sizes"]) for point in points} == {list, tuple}


@has("hyperopt")
def test_a_choice_between_dicts_is_read_as_a_space_with_conditions() -> None:
    """The objective gets the dicts that Hyperopt would have given it."""
    from hyperopt import hp
    from hyperopt.pyll.stochastic import sample

    models = hp.choice(
        "models",
        [
            {"model": "svm", "C": hp.uniform("C", 1, 2), "kernel": hp.choice("kernel", ["rbf", "linear"]), "tol": 1e-3},
            {"model": "tree", "depth": hp.randint("depth", 1, 9), "tol": 1e-3},
        ],
    )
    space = from_hyperopt(models)
    assert dict(space) == {
        "model": Categorical(["svm", "tree"]),
        "C": Float(1, 2, when={"model": "svm"}),
        "kernel": Categorical(["rbf", "linear"], when={"model": "svm"}),
        "tol": Categorical([1e-3], when={"model": ["svm", "tree"]}),
        "depth": Int(1, 8, when={"model": "tree"}),
    }
    rng = np.random.default_rng(0)
    assert all(space.check(point) == point for point in (sample(models, rng) for _ in range(DRAWS)))


@has("ray")
def test_lists_and_dicts_are_choices_and_constants_of_ray() -> None:
    from ray import tune

    assert from_ray(to_ray(NESTED)) == NESTED
    space = from_ray({"sizes": [64, 64], "net": {"widths": [8]}, "pair": (1, 2), "grid": tune.grid_search([[1], [2]])})
    assert [space[name].grid() for name in space] == [[[64, 64]], [{"widths": [8]}], [(1, 2)], [[1], [2]]]


def test_a_tuple_of_numbers_is_scikit_learns_choices() -> None:
    assert from_sklearn({"C": (0.1, 1.0)})["C"].grid() == [0.1, 1.0]


def _hp(write: Any) -> Any:
    return lambda: from_hyperopt(write(pytest.importorskip("hyperopt").hp))


def _tune(write: Any) -> Any:
    return lambda: from_ray(write(pytest.importorskip("ray.tune")))


def _scipy(name: str, *args: float) -> Any:
    return getattr(pytest.importorskip("scipy.stats"), name)(*args)


BAD = {
    "scipy without bounds": (lambda: from_sklearn({"x": _scipy("norm", 0, 1)}), "no bounds"),
    "scipy of another shape": (lambda: from_sklearn({"x": _scipy("beta", 2, 2)}), "not read"),
    "dicts that nothing tells apart": (lambda: from_sklearn([{"a": [1]}, {"a": [1], "b": [2]}]), "different values"),
    "no dicts": (lambda: from_sklearn([]), "empty"),
    "an infinite grid": (lambda: to_param_grid({"x": Float(0.0, 1.0)}), "infinite"),
    "no distribution of Optuna": (lambda: from_optuna({"x": 3}), "Optuna distribution"),
    "hp.uniform at the top": (_hp(lambda hp: hp.uniform("x", 0, 1)), "a dict of name → expression, or an hp.choice"),
    "hp.choice of values at the top": (_hp(lambda hp: hp.choice("x", [1, 2])), "between dicts"),
    "hp.choice at the top that nothing tells apart": (
        _hp(lambda hp: hp.choice("x", [{"a": 1, "b": hp.uniform("b", 0, 1)}, {"a": 1}])),
        "'a' is the same in several dicts",
    ),
    "hp.pchoice at the top": (_hp(lambda hp: hp.pchoice("x", [(0.1, {"a": 1}), (0.9, {"a": 2})])), "weights"),
    "a dict of expressions": (
        _hp(lambda hp: {"sgd": {"lr": hp.uniform("lr", 0, 1)}}),
        "sgd: .* at the top of the space",
    ),
    "a list of expressions": (_hp(lambda hp: {"sizes": [hp.randint("a", 9), 3]}), "sizes: .* list or dict"),
    "a choice between dicts without values": (
        _hp(lambda hp: {"o": hp.choice("o", [{"name": "SGD", "lr": hp.uniform("lr", 0, 1)}, {"name": "Adam"}])}),
        "o: .* beside that choice's own value under 'value'",
    ),
    "a dict of sample spaces": (_tune(lambda tune: {"sgd": {"lr": tune.uniform(0, 1)}}), "sgd: .* a name of its own"),
    "a grid search in a dict": (_tune(lambda tune: {"sgd": {"lr": tune.grid_search([0, 1])}}), "sgd: .* inside a dict"),
    "a choice between dicts of sample spaces": (
        _tune(lambda tune: {"o": tune.choice([{"name": "SGD", "lr": tune.uniform(0, 1)}, {"name": "Adam"}])}),
        "o: .* when={'optimizer': 'SGD'}",
    ),
    "a sample space for a param_space": (_tune(lambda tune: tune.uniform(0, 1)), "a dict of name → sample space"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    make, match = BAD[name]
    with pytest.raises((ValueError, TypeError), match=match):
        make()
