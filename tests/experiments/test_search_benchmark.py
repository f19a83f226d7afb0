"""The search benchmark: our MLP against scikit-learn's, searches of a made-up table, and all of it in its quick mode."""

import math

import numpy as np
import pytest
import torch
from sklearn.neural_network import MLPClassifier, MLPRegressor

from experiments import search_benchmark, search_diagnosis, search_table
from experiments.search_benchmark import hybrid, polished, regret
from experiments.search_live import TOGETHER, inner, learn, start
from experiments.search_problems import LOOKS, MLP, Rule, fit, folds
from experiments.table_searches import ONE_BUDGET, STRATEGIES, Table

VALUES = {
    "sgd": {"hidden": 50, "alpha": 0.1, "batch": 20, "lr": 0.01, "momentum": 0.7},
    "adam": {"hidden": 50, "alpha": 0.1, "batch": 20, "lr": 0.01, "beta1": 0.8, "beta2": 0.95, "eps": 1e-7},
}


def sklearn_arguments(values, solver):
    names = {"beta1": "beta_1", "beta2": "beta_2", "eps": "epsilon", "momentum": "momentum", "alpha": "alpha"}
    return {names[k]: v for k, v in values.items() if k in names} | {
        "hidden_layer_sizes": (values["hidden"],),
        "batch_size": values["batch"],
        "learning_rate_init": values["lr"],
        "solver": solver,
        "shuffle": False,
        "max_iter": 3,
        "random_state": 7,
        "n_iter_no_change": 100,
    }


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("solver", ["sgd", "adam"])
@pytest.mark.parametrize("name", ["iris", "diabetes"])
def test_same_weights_as_scikit_learn(name, solver):
    data, values = folds(name, torch.float64), VALUES[solver]
    x, y = data.x[:1], data.y[:1]
    theirs = (MLPRegressor if name == "diabetes" else MLPClassifier)(**sklearn_arguments(values, solver))
    theirs.fit(x[0].numpy(), y[0, :, 0].numpy() if name == "diabetes" else y[0].argmax(-1).numpy())
    net = MLP(1, x.shape[2], 50, y.shape[2], data.kind, 7, torch.float64)
    rule = Rule(net.flat, values)
    for _ in range(3):
        for first in range(0, x.shape[1], values["batch"]):
            part = slice(first, first + values["batch"])
            net.backward(x[:, part], y[:, part], values["alpha"])
            rule.step(net.grad)
    for ours, coefficients in zip(net.weights[::2], theirs.coefs_, strict=True):
        np.testing.assert_allclose(ours[0].numpy(), coefficients, rtol=1e-9, atol=1e-11)


@pytest.fixture
def table(request):
    unit = np.random.default_rng(0).random((getattr(request, "param", 64), 3))
    end = np.square(unit - 0.4).sum(1)
    return Table(unit, np.stack([end + 1 / look for look in LOOKS], 1) - 1 / LOOKS[-1])


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_search_stays_within_its_budget_and_finds_what_is_there(table, name):
    best = STRATEGIES[name](table, 3, 16)
    costs = [cost for cost, _ in best]
    assert costs == sorted(costs)
    assert 0 <= regret(best, table, 16) < 1
    assert regret(best, table, 16) <= regret(best, table, 4)
    assert STRATEGIES[name](table, 3, 16) == best
    if name in ONE_BUDGET:
        assert costs[-1] <= 16


@pytest.mark.parametrize("budget", [1, 2, 4, 16])
def test_one_epoch_then_the_best_spends_its_budget(table, budget):
    spent = STRATEGIES["one_epoch"](table, 3, budget)[-1][0]
    assert budget - 1 < spent <= budget + 1e-9


def test_regret_is_0_at_the_tables_best_and_1_at_its_median_and_before_anything_ends(table):
    low, middle = table.end.min(), np.median(table.end)
    assert regret([(1.0, low)], table, 1) == 0
    assert regret([(1.0, middle)], table, 1) == 1
    assert regret([(2.0, low)], table, 1) == 1


@pytest.mark.parametrize("table", [256], indirect=True)
def test_a_hybrid_is_asha_with_live_trials_from_its_best_in_between(table):
    chosen = polished(table, 3, 64)
    assert len({config for _, config in chosen}) == len(search_benchmark.POLISH)
    live = {config: (2.0, -1.0 - i) for i, (_, config) in enumerate(chosen)}
    path = hybrid(table, 3, 64, live)
    costs = [cost for cost, _ in path]
    assert costs == sorted(costs)
    ends = [cost for cost, score in path if score < -0.5]
    assert all(end <= budget for end, budget in zip(ends, (4, 16), strict=True))
    assert [score for _, score in path if score < -0.5] == [-1.0, -2.0]
    assert hybrid(table, 3, 1, live) == STRATEGIES["asha"](table, 3, 1)


def test_a_run_along_a_path_that_does_not_move_is_a_plain_run():
    values = VALUES["sgd"] | {"alpha": 0.0, "batch": 32}
    path = [{"lr": values["lr"], "alpha": 0.0}] * 7
    assert fit(folds("iris"), values, 1, 3, path) == fit(folds("iris"), values, 1, 3)


@pytest.mark.filterwarnings("ignore")
def test_a_live_run_learns_a_path_within_its_budget():
    data, values = folds("iris"), start("sgd", 3)
    path, cost = learn(data, values, 3)
    assert len(path) == 27 and 0 < cost <= 1, "the batch is larger than the set: a step an epoch"
    assert path[0]["lr"] > 100 * values["lr"], "a first run has found where it starts"
    train, val = inner(data, TOGETHER, 3)
    rows = torch.cat([train.x[0], val.x[0]])
    assert torch.equal(rows.sort(0).values, data.x[0].sort(0).values), "training rows only, each in one of both parts"


def test_the_diagnosis_trains_its_grid_as_the_runs_are_trained(tmp_path, monkeypatch):
    data, values = folds("iris"), VALUES["adam"] | {"alpha": 0.3}
    found = search_diagnosis.many(data, values, torch.tensor([0.02]), torch.tensor([0.0]), 5, 2)
    steps = 2 * math.ceil(data.x.shape[1] / 20)  # of batches of 20
    path = [{"lr": 0.02 * (1 - t / steps), "alpha": 0.0} for t in range(steps)]
    np.testing.assert_allclose(found[0].mean(0), fit(data, values, 5, 2, path)[-1], rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_quick_mode(tmp_path, monkeypatch):
    monkeypatch.setattr(search_benchmark, "RESAMPLES", 20)
    monkeypatch.setattr(search_benchmark, "LOOKS", (1, 2))
    monkeypatch.setattr(search_benchmark, "STRATEGIES", {"tpe": STRATEGIES["tpe"], "asha": STRATEGIES["random"]})
    monkeypatch.setattr(
        search_benchmark, "promotions", lambda table, seed, budget: iter([(1.0, 0, 0.5), (2.0, 1, 0.4)])
    )
    folder = str(tmp_path)
    search_table.main(["--quick", "--out", folder])
    rows = search_benchmark.main(
        ["--quick", "--strategies", "tpe", "asha", "--table", folder, "--out", folder, "--runs", folder]
    )
    assert np.float64(5e-324) * np.float64(1.0) > 0  # subnormal numbers are as they were
    assert {row["kind"] for row in rows} == {"summary", "problem", "difference", "live"}
    assert (tmp_path / "search_benchmark.json").is_file()
    assert all(row["cost"] > 0 for row in rows if row["kind"] == "live")
