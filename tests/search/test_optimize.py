"""`optimize`: every strategy finds the bottom, studies resume, and what goes wrong is kept or said."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hypergrad
from hypergrad.search import Budget, Categorical, Float, Int, NoTrialCompleted, Pruned, Run, Study, Trial, optimize
from hypergrad.search.objective import evaluate, seed_of
from tests.search import problems
from tests.search.problems import (
    BEST,
    SMALL,
    SPACE,
    bowl,
    fails_on_b,
    interrupted_bowl,
    never,
    noisy_bowl,
    quadratic,
    reporting_bowl,
)
from tests.tiers import slow_but

pytest.importorskip("optuna")
pytest.importorskip("sklearn")

quiet = partial(optimize, progress=False)
CLOSE = 0.3  # of the bowl: the right kind, k within one of the best, lr within a factor of three of it


# strategy -> objective, budget in trials (None: its own end), largest value that counts as found
FOUND: dict[str, tuple[Any, int | None, float]] = {
    "grid": (bowl, None, 0.0),
    "random": (bowl, 60, CLOSE),
    "tpe": (bowl, 40, CLOSE),
    "gp": (bowl, 25, CLOSE),
    "cma": (bowl, 60, CLOSE),
    "hyperopt": (bowl, 60, CLOSE),
    "hyperband": (reporting_bowl, 60, CLOSE),
    "asha": (reporting_bowl, 60, CLOSE),
}


def needs(strategy: str) -> None:
    package = {"cma": "cmaes", "hyperopt": "hyperopt"}.get(strategy)
    if package:
        pytest.importorskip(package)


@pytest.mark.parametrize("strategy", slow_but(FOUND, *(name for name in FOUND if name != "gp")))
def test_a_strategy_finds_the_bottom(strategy: str) -> None:
    needs(strategy)
    objective, trials, bound = FOUND[strategy]
    study = quiet(objective, SPACE, strategy, trials)
    assert study.best_value <= bound
    assert study.best_params["kind"] == BEST["kind"]
    assert len(study.trials) == (trials or 5 * 7 * 2)
    assert study.best_value == bowl(study.best_params)


@pytest.mark.parametrize("strategy", ["hyperband", "asha"])
def test_halving_gives_trials_up(strategy: str) -> None:
    study = quiet(reporting_bowl, SPACE, strategy, 30)
    states = [each.state for each in study.trials]
    assert states.count("pruned") > 10 and states.count("complete") >= 1
    assert study.spent.epochs < 9 * 30 / 2
    epochs = [each.cost.epochs for each in study.trials if each.state == "pruned"]
    assert min(epochs) < 4 and max(epochs) <= 9


@pytest.mark.parametrize(("strategy", "trials", "bound"), [("hypergradient", 1, 0.05), ("hybrid", 6, 0.05)])
def test_hypergradients_descend(strategy: str, trials: int, bound: float) -> None:
    study = quiet(quadratic, SMALL, strategy, trials)
    path = study.best_trial.notes["path"]
    assert study.best_value == min(point["value"] for point in path) <= bound
    assert set(study.best_trial.notes["learned"]) == {"lr", "momentum"}  # found by themselves, and `steps` left alone
    again = Trial(0, study.best_params, 0)
    run = quadratic(study.best_params, again)
    assert hypergrad.search.training.train(run, again) == pytest.approx(study.best_value, rel=1e-9)
    assert path[0]["value"] > study.best_value


def test_the_first_descent_goes_down_the_true_gradient() -> None:
    """One step of θ²/2 from θ = 2 at lr η: L = 2 (1 − η)², so dL/du = −4 (1 − η) η log(high/low)."""
    from hypergrad.search.space import Space
    from hypergrad.search.strategies.gradient import Hypergradient, tuned_entries

    space = Space({"lr": Float(1e-3, 1.0, "log", start=0.1), "steps": [1]})
    trial = Trial(0, space.first(), 0)
    run, strategy = quadratic(trial.params, trial), Hypergradient(space, 0, {})
    value, (slope,) = strategy._slope(run, trial, trial.params, tuned_entries(run, space, trial.params))
    assert value == pytest.approx(2 * 0.9**2)
    assert slope == pytest.approx(-4 * 0.9 * 0.1 * math.log(1e3))
    assert trial.cost.gradient_evaluations > 0


def test_what_the_loss_reads_is_differentiated_and_what_it_does_not_is_left() -> None:
    def ridge(p: dict[str, Any], trial: Trial) -> Run:
        torch.manual_seed(0)
        x, xv = torch.randn(12, 8), torch.randn(200, 8)
        y, yv = x[:, :1] + torch.randn(12, 1), xv[:, :1]
        model = torch.nn.Linear(8, 1, bias=False)

        def loss(model: torch.nn.Module, batch: Any, hypers: dict[str, torch.Tensor]) -> torch.Tensor:
            return ((model(x) - y) ** 2).mean() + hypers["penalty"] * (model.weight**2).sum()  # type: ignore[operator]

        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        return Run(model, sgd, [None] * 60, loss, lambda: ((model(xv) - yv) ** 2).mean())

    space = {"penalty": Float(1e-4, 10.0, "log", start=1e-3), "dropout": Float(0.0, 0.5)}
    with pytest.warns(UserWarning, match="no hypergradient moves 'dropout'"):
        study = quiet(ridge, space, "hypergradient", 1)
    path = study.best_trial.notes["path"]
    assert set(study.best_trial.notes["learned"]) == {"penalty"}
    assert study.best_trial.notes["not differentiated"] == ["dropout"]
    assert study.best_value < 0.9 * path[0]["value"]
    with pytest.raises(NoTrialCompleted, match="differentiable=True"):
        quiet(ridge, space | {"dropout": Float(0.0, 0.5, differentiable=True)}, "hypergradient", 1)


def test_what_a_schedule_reads_is_differentiated_and_trained_with() -> None:
    def decaying(p: dict[str, Any], trial: Trial) -> Run:
        return quadratic({"lr": 0.1}, trial)._replace(schedules={"lr": lambda t, h: h["peak"] * (1 - t / 5)})

    space = {"peak": Float(1e-2, 2.0, "log", start=0.1)}
    study = quiet(decaying, space, "hypergradient", 1)
    assert set(study.best_trial.notes["learned"]) == {"peak"} and study.best_value < 0.01
    trained = quiet(decaying, {"peak": Categorical([0.5, 0.25])}, "grid")
    factors = [math.prod(1 - peak * (1 - t / 5) for t in range(5)) for peak in (0.5, 0.25)]
    assert [each.value for each in trained.trials] == pytest.approx([2 * factor**2 for factor in factors])


def test_param_groups_that_hold_a_multiple_are_followed_and_others_are_refused() -> None:
    def layers(p: dict[str, Any], trial: Trial, fixed: bool = False) -> Run:
        run = quadratic(p, trial)
        group = torch.optim.SGD([{"params": run.model.parameters(), "lr": 0.05 if fixed else p["lr"] / 2}], lr=p["lr"])
        return run._replace(optimizer=group)

    whole = quiet(quadratic, {"lr": Float(1e-3, 0.5, "log", start=0.05)}, "hypergradient", 1)
    half = quiet(layers, {"lr": Float(2e-3, 1.0, "log", start=0.1)}, "hypergradient", 1)
    assert half.best_value == pytest.approx(whole.best_value, rel=1e-9)
    with pytest.raises(NoTrialCompleted, match="in proportion"):
        quiet(partial(layers, fixed=True), {"lr": Float(2e-3, 1.0, "log", start=0.1)}, "hypergradient", 1)


def test_a_descent_that_begins_in_chaos_comes_back() -> None:
    study = quiet(quadratic, {"lr": Float(1e-3, 1e200, "log", start=1e150)}, "hypergradient", 1, options={"steps": 12})
    path = study.best_trial.notes["path"]
    assert path[0]["value"] is None and math.isfinite(study.best_value)


# ---- studies that are kept


STORED = ["grid", "random", "tpe", "gp", "cma", "hyperband", "hyperopt"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STORED)
def test_a_resumed_study_is_the_uninterrupted_one(strategy: str, tmp_path: Path) -> None:
    needs(strategy)
    objective = reporting_bowl if strategy == "hyperband" else noisy_bowl
    whole = quiet(objective, SPACE, strategy, 18, seed=3)
    for trials in (5, 11, 18):
        study = quiet(objective, SPACE, strategy, trials, seed=3, storage=tmp_path / "study.journal")
        assert len(study.trials) == trials
    assert [(x.params, x.value, x.state) for x in study.trials] == [(x.params, x.value, x.state) for x in whole.trials]


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Python's own handler, which a shell takes away from what runs in the background."""
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, old)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_keeps_what_is_done_and_the_trial_is_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flag = tmp_path / "flag"
    monkeypatch.setenv("INTERRUPT", str(flag))
    whole = quiet(interrupted_bowl, SPACE, "tpe", 14)
    flag.touch()
    storage = tmp_path / "study.journal"
    with pytest.warns(UserWarning, match="interrupted"):
        study = quiet(interrupted_bowl, SPACE, "tpe", 14, storage=storage)
    assert study.interrupted and len(study.trials) == 6
    assert [each.state for each in study.trials] == ["complete"] * 5 + ["interrupted"]
    assert study.best_value == min(each.value for each in whole.trials[:5])  # type: ignore[type-var]
    flag.unlink()
    study = quiet(interrupted_bowl, SPACE, "tpe", 14, storage=storage)
    assert [(x.params, x.value) for x in study.trials] == [(x.params, x.value) for x in whole.trials]


def test_a_study_that_is_done_runs_nothing_more(tmp_path: Path) -> None:
    first = quiet(bowl, SPACE, "random", 4, storage=tmp_path / "s.journal")
    again = quiet(bowl, SPACE, "random", 4, storage=tmp_path / "s.journal")
    assert [x.params for x in again.trials] == [x.params for x in first.trials]
    assert again.best_value == first.best_value


def test_a_storage_is_held_by_one_call_at_a_time(tmp_path: Path) -> None:
    storage = tmp_path / "s.journal"

    def nested(p: dict[str, Any]) -> float:
        with pytest.raises(ValueError, match="in use"):
            quiet(bowl, SPACE, "random", 1, storage=storage)
        return 0.0

    assert quiet(nested, SPACE, "random", 2, storage=storage).best_value == 0.0


@pytest.mark.slow
def test_processes_and_threads_do_all_trials_once(tmp_path: Path) -> None:
    alone = quiet(bowl, SPACE, "random", 12)
    for workers, storage in (("processes", tmp_path / "s.journal"), ("threads", None), ("processes", None)):
        study = quiet(bowl, SPACE, "random", 12, n_jobs=2, workers=workers, storage=storage)
        assert [(x.number, x.params, x.value) for x in study.trials] == [
            (x.number, x.params, x.value) for x in alone.trials
        ]
    halving = quiet(reporting_bowl, SPACE, "asha", 12, n_jobs=2)  # processes report and are pruned through the storage
    assert {each.state for each in halving.trials} == {"complete", "pruned"}


# ---- trials that fail


def test_failed_trials_are_recorded_and_the_study_goes_on() -> None:
    study = quiet(fails_on_b, SPACE, "random", 20)
    for each in study.trials:
        failed = each.params["kind"] == "b"
        assert (each.state == "failed") == failed == (each.value is None)
        assert ("RuntimeError: b is not there" in (each.error or "")) == failed
    assert {each.state for each in study.trials} == {"failed", "complete"}
    assert study.best_params["kind"] == "a"


def test_nan_is_a_failure_and_infinity_the_worst_value() -> None:
    values = [math.nan, math.inf, 1.0, -math.inf]
    study = quiet(lambda p: values[p["i"]], {"i": [0, 1, 2, 3]}, "grid")
    assert [each.state for each in study.trials] == ["failed", "complete", "complete", "failed"]
    assert "nan" in (study.trials[0].error or "")
    assert study.best_params == {"i": 2}


@pytest.mark.parametrize("strategy", ["tpe", "gp", "cma", "hyperopt"])
def test_samplers_bear_infinity(strategy: str) -> None:
    needs(strategy)
    study = quiet(
        lambda p: math.inf if p["x"] > 0.5 else p["x"] + p["y"], {"x": Float(0, 1), "y": Float(0, 1)}, strategy, 25
    )
    assert study.best_value < 0.6


def test_a_study_where_nothing_worked_says_why_and_has_the_trials() -> None:
    with pytest.raises(NoTrialCompleted, match="b is not there") as raised:
        quiet(fails_on_b, {**SPACE, "kind": ["b"]}, "random", 3)
    assert [each.state for each in raised.value.study.trials] == ["failed"] * 3


def test_the_users_random_numbers_go_on_as_if_nothing_had_been_drawn() -> None:
    torch.manual_seed(1)
    want = torch.rand(3)
    torch.manual_seed(1)
    quiet(noisy_bowl, SPACE, "random", 3)
    assert torch.equal(torch.rand(3), want)
    assert seed_of(0, 1) != seed_of(0, 2) != seed_of(1, 1)


# ---- budgets


def counts(p: dict[str, Any], trial: Trial) -> float:
    for _ in range(4):
        trial.report(1.0)
        trial.count(10)
    return bowl(p)


@pytest.mark.parametrize(
    ("budget", "trials"),
    [
        (3, 3),
        ({"trials": 3}, 3),
        ({"epochs": 10}, 3),
        ({"gradient_evaluations": 81}, 3),
        (Budget(trials=9, epochs=8), 2),
    ],
)
def test_a_budget_ends_the_study(budget: Any, trials: int) -> None:
    study = quiet(counts, SPACE, "random", budget)
    assert len(study.trials) == trials
    assert study.spent.epochs == 4 * trials and study.spent.gradient_evaluations == 40 * trials


def test_a_budget_in_seconds_ends_the_study_and_counts_earlier_calls(tmp_path: Path) -> None:
    def slow(p: dict[str, Any], trial: Trial) -> float:
        while not trial.exhausted:
            pass
        return 0.0

    storage = tmp_path / "s.journal"
    assert len(quiet(slow, SPACE, "random", {"seconds": 0.2}, storage=storage).trials) == 1
    assert len(quiet(slow, SPACE, "random", {"seconds": 0.2}, storage=storage).trials) == 1
    assert len(quiet(slow, SPACE, "random", {"seconds": 0.5}, storage=storage).trials) == 2


def test_a_hypergradient_counts_its_gradients_and_products_and_stops_when_they_run_out() -> None:
    space = {"lr": Float(1e-3, 1.0, "log", start=0.05)}
    study = quiet(quadratic, space, "hypergradient", {"gradient_evaluations": 25}, options={"steps": 50})
    per_run = quiet(quadratic, space, "hypergradient", 1, options={"steps": 2}).spent.gradient_evaluations - 5
    assert 25 <= study.spent.gradient_evaluations <= 25 + per_run + 5
    assert quiet(quadratic, space, "random", 2).spent.gradient_evaluations == 10


# ---- the result


def test_the_table_has_a_row_a_trial_with_or_without_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    def noted(p: dict[str, Any], trial: Trial) -> float:
        trial.note("twice", 2 * p["k"])
        return fails_on_b(p)

    study = quiet(noted, SPACE, "random", 6)
    monkeypatch.setitem(sys.modules, "pandas", None)
    rows = study.table()
    assert [row["trial"] for row in rows] == list(range(6))
    assert all(row["note twice"] == 2 * row["k"] for row in rows)
    first, *others = str(rows).splitlines()
    assert first.split()[:6] == ["trial", "value", "lr", "k", "kind", "state"] and len(others) == 6
    assert str(rows) == rows.to_string() and "gradient_evaluations" not in first  # nothing was counted
    monkeypatch.undo()
    pandas = pytest.importorskip("pandas")
    table = study.table()
    assert isinstance(table, pandas.DataFrame) and list(table["trial"]) == list(range(6))
    assert list(table.columns[:6]) == ["trial", "value", "lr", "k", "kind", "state"]
    assert table["value"].min() == study.best_value
    assert all("\n" not in str(error) for error in table["error"])


def test_verify_trains_the_best_again_and_shows_validation_beside_test() -> None:
    study = quiet(noisy_bowl, SPACE, "random", 10)
    verified = study.verify(lambda p: bowl(p) + 5, seeds=3)
    assert verified.params == study.best_params and verified.selected == study.best_value
    assert len(set(verified.validation)) == 3  # seeds of their own
    assert all(0 <= v - bowl(study.best_params) <= 0.01 for v in verified.validation)
    assert verified.test == [bowl(study.best_params) + 5] * 3
    assert "validation, again" in str(verified) and "test" in str(verified)
    both = study.verify(lambda p: (0.25, 0.5))
    assert (both.validation, both.test) == ([0.25], [0.5])
    runs = quiet(quadratic, SMALL, "random", 3)
    assert runs.verify(quadratic).test == [runs.best_value]
    with pytest.raises(TypeError, match="test_objective returned None"):
        study.verify(lambda p: None)


def test_every_trial_is_a_run_in_tensorboard_with_its_hparams(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    study = quiet(reporting_bowl, SPACE, "asha", 6, log_dir=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"trial_{i:04d}" for i in range(6)]
    for each in study.trials:
        folder = tmp_path / f"trial_{each.number:04d}"
        assert all(path.name.startswith("events.out") for path in folder.iterdir())  # no second run below it
        events = EventAccumulator(str(folder)).Reload()
        content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
        hparams = HParamsPluginData.FromString(content).session_start_info.hparams
        assert {name: hparams[name].number_value for name in ("lr", "k")} == {n: each.params[n] for n in ("lr", "k")}
        assert hparams["kind"].string_value == each.params["kind"] and hparams["state"].string_value == each.state
        reported = events.Scalars("loss/reported")
        assert [point.step for point in reported] == list(range(1, int(each.cost.epochs) + 1))
        if each.state == "complete":
            assert events.Scalars("loss/val")[-1].value == pytest.approx(each.value)


def test_plots_are_pngs(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    made = quiet(bowl, SPACE, "random", 12).plot(tmp_path / "plots")
    assert set(made) == {"history", "cost", "importance"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made.values())


# budget, direction, objective -> the pictures that there are
PICTURES: dict[str, tuple[int, str, Any, set[str]]] = {
    "one trial": (1, "minimize", bowl, {"history", "cost"}),
    "equal values": (5, "minimize", lambda p: 1.0, {"history", "cost"}),
    "a score with failures and infinity": (
        20,
        "maximize",
        lambda p: {"b": -math.inf}.get(p["kind"]) or (-bowl(p) if p["k"] else math.nan),
        {"history", "cost", "importance"},
    ),
    "only infinity": (3, "minimize", lambda p: math.inf, set()),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_drawn_of_what_there_is_and_leave_matplotlib_as_it_was(name: str, tmp_path: Path) -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    trials, direction, objective, pictures = PICTURES[name]
    before = dict(plt.rcParams)
    made = quiet(objective, SPACE, "random", trials, direction=direction).plot(tmp_path)
    assert set(made) == pictures and all(path.stat().st_size > 0 for path in made.values())
    assert dict(plt.rcParams) == before and not plt.get_fignums()


def test_random_search_draws_what_scikit_learn_draws() -> None:
    selection = pytest.importorskip("sklearn.model_selection")
    study = quiet(bowl, SPACE, "random", 10, seed=7)
    drawn = selection.ParameterSampler(hypergrad.search.to_param_distributions(SPACE), 10, random_state=7)
    for each, want in zip(study.trials, drawn, strict=True):
        assert each.params["lr"] == pytest.approx(want["lr"]) and each.params["k"] == want["k"]


def test_choices_of_any_type_and_conditions_are_searched_and_kept(tmp_path: Path) -> None:
    space = {
        "layer": [torch.nn.ReLU, torch.nn.Tanh],
        "sizes": [(8,), (8, 8)],
        "flag": [True, 1],
        "slope": Float(0.1, 0.9, "logit", when={"layer": torch.nn.Tanh}),
    }

    def objective(p: dict[str, Any]) -> float:
        assert ("slope" in p) == (p["layer"] is torch.nn.Tanh)
        return len(p["sizes"]) + p.get("slope", 1.0) + isinstance(p["flag"], bool)

    for trials in (8, 16):
        study = quiet(objective, space, "tpe", trials, storage=tmp_path / "s.journal")
    assert study.best_params["sizes"] == (8,) and {type(x.params["flag"]) for x in study.trials} == {bool, int}
    assert all(each.state == "complete" for each in study.trials)


LISTS = {
    "sizes": [[64, 64], [32], (32,)],
    "net": [{"value": 3}, {"widths": [8, 8]}],
    "x": Float(0.0, 1.0, points=3, differentiable=False),
}


def of_lists(p: dict[str, Any]) -> float:
    """Least, 1, for [32], a list, the dict with widths, and x = 0."""
    return len(p["sizes"]) + 2 * isinstance(p["sizes"], tuple) + (p["net"] == {"value": 3}) + p["x"]


@pytest.mark.parametrize("strategy", slow_but([*FOUND, "hybrid", "hybrid-online"], "grid", "tpe", "hybrid-online"))
def test_lists_and_dicts_are_choices(strategy: str, tmp_path: Path) -> None:
    """The objective gets each as it was written, and so does who reads the study."""
    needs(strategy)
    trains = strategy.startswith("hybrid")

    def run(p: dict[str, Any], trial: Trial) -> Any:
        assert all(p[name] in LISTS[name] for name in ("sizes", "net"))  # type: ignore[operator]
        if trains:
            return quadratic({"lr": 0.3 + 0.1 * len(p["sizes"])}, trial)
        trial.report(of_lists(p), 1)
        return of_lists(p)

    for trials in (3, 6) if trains else (12, 24):  # the second half after the first is read from its journal
        budget = None if strategy == "grid" else trials
        study = quiet(run, LISTS, strategy, budget, storage=tmp_path / "s.journal")
    complete = [each for each in study.trials if each.state == "complete"]
    assert not any(each.error for each in study.trials) and len({str(each.params) for each in complete}) > 2
    if not trains:
        assert all(each.value == of_lists(each.params) for each in complete)
        assert study.best_value == min(of_lists(each.params) for each in complete)
    if strategy == "grid":
        assert (study.best_value, study.best_params) == (1.0, {"sizes": [32], "net": {"widths": [8, 8]}, "x": 0.0})


# ---- bad input: before the first trial


def _with(**arguments: Any) -> Any:
    given: dict[str, Any] = {"objective": never, "space": SPACE, "strategy": "random", "budget": 3} | arguments
    return lambda: quiet(**given)


def _of_another_study(tmp_path: Path, **changes: Any) -> Any:
    quiet(bowl, SPACE, "random", 2, storage=tmp_path / "s.journal")
    return _with(**{"objective": bowl, "storage": tmp_path / "s.journal"} | changes)


def _no_journal(tmp_path: Path) -> Any:
    (tmp_path / "notes.txt").write_text("a shopping list\nmilk\n")
    return _with(storage=tmp_path / "notes.txt")


def _of_optuna(tmp_path: Path) -> Any:
    import optuna

    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "o.journal"))
    optuna.create_study(study_name="mine", storage=optuna.storages.JournalStorage(backend))
    return _with(storage=tmp_path / "o.journal")


def _grad(p: dict[str, Any]) -> Any:
    return torch.ones((), requires_grad=True)


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "empty space": (_with(space={}), ValueError, "empty"),
    "numbers in a tuple": (_with(space={"x": (0, 1)}), ValueError, "write Float"),
    "infinite grid": (_with(space={"x": Float(0, 1)}, strategy="grid"), ValueError, "infinite"),
    "unknown strategy": (_with(strategy="magic"), ValueError, "grid, random, tpe"),
    "no budget": (_with(budget=None), ValueError, "pass a budget"),
    "a budget of 0": (_with(budget=0), ValueError, "above 0"),
    "a budget of 0 seconds": (_with(budget={"seconds": 0}), ValueError, "above 0"),
    "a negative budget": (_with(budget={"epochs": -1}), ValueError, "above 0"),
    "an empty budget": (_with(budget={}), ValueError, "needs a limit"),
    "a budget in money": (_with(budget={"euros": 3}), ValueError, "not in 'euros'"),
    "a budget that is none": (_with(budget="3"), TypeError, "Budget"),
    "epochs that nobody reports": (_with(budget={"epochs": 3}), ValueError, "trial.report"),
    "no function": (_with(objective=3), TypeError, "function"),
    "a function of nothing": (_with(objective=lambda: 0.0), TypeError, "f\\(params\\)"),
    "a function of three": (_with(objective=lambda a, b, c: 0.0), TypeError, "takes 3"),
    "seed": (_with(seed=-1), ValueError, "seed"),
    "n_jobs": (_with(n_jobs=0), ValueError, "n_jobs"),
    "backend": (_with(backend="cloud"), ValueError, "backend"),
    "workers": (_with(workers="elves"), ValueError, "workers"),
    "a lambda for processes": (_with(objective=lambda p: 0.0, n_jobs=2), ValueError, "top of a module"),
    "hypergradients in threads": (
        _with(space=SMALL, strategy="hypergradient", n_jobs=2, workers="threads"),
        ValueError,
        "processes",
    ),
    "nothing to differentiate": (_with(space={"k": [1, 2]}, strategy="hypergradient"), ValueError, "without a step"),
    "an option of random": (_with(options={"x": 1}), ValueError, "no options"),
    "an option that Optuna has not": (_with(strategy="tpe", options={"x": 1}), ValueError, "TPESampler"),
    "an option that a pruner has not": (_with(strategy="asha", options={"x": 1}), ValueError, "SuccessiveHalving"),
    "an option of hypergradient": (_with(strategy="hypergradient", options={"lr": 1}), ValueError, "step_size"),
    "steps": (_with(strategy="hypergradient", options={"steps": 1}), ValueError, "from 2"),
    "step_size": (_with(strategy="hybrid", options={"step_size": 2}), ValueError, "share"),
    "mode": (_with(strategy="hybrid", options={"mode": "implicit"}), ValueError, "forward"),
    "hybrid's sampler": (_with(strategy="hybrid", options={"sampler": "x"}), ValueError, "tpe, gp, cma"),
    "storage": (_with(storage=3), TypeError, "path"),
    # at the first trial, which is not counted
    "returns None": (_with(objective=lambda p: None), TypeError, "returned None"),
    "returns a tensor that needs grad": (_with(objective=_grad), TypeError, "no_grad"),
    "returns two numbers": (_with(objective=lambda p: torch.ones(2)), TypeError, "one number"),
    "returns a string": (_with(objective=lambda p: "0.1"), TypeError, "a float"),
    "returns NaN": (_with(objective=lambda p: math.nan), ValueError, "returned nan"),
    "no run": (_with(objective=bowl, strategy="hypergradient"), TypeError, "hypergrad.Run"),
    "a run that has no such numbers": (
        _with(objective=quadratic, space={"rate": Float(0.1, 1), "lr": 0.1}, strategy="hypergradient"),
        TypeError,
        "'lr'",
    ),
    "reports nothing to halve by": (_with(objective=bowl, strategy="asha"), ValueError, "reports nothing"),
    "counts nothing": (_with(objective=lambda p, trial: 0.0, budget={"epochs": 3}), ValueError, "counts none"),
}
BAD_STORAGE: dict[str, tuple[Any, str]] = {
    "another space": (partial(_of_another_study, space={"lr": SPACE["lr"]}), "its space"),
    "another objective": (partial(_of_another_study, objective=noisy_bowl), "its objective"),
    "another strategy": (partial(_of_another_study, strategy="tpe"), "its strategy"),
    "another seed": (partial(_of_another_study, seed=1), "its seed"),
    "no journal": (_no_journal, "no journal"),
    "a folder": (lambda tmp_path: _with(storage=tmp_path), "folder"),
    "a study of Optuna's own": (_of_optuna, "another study, 'mine'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    call, kind, match = BAD[name]
    with pytest.raises(kind, match=match):
        call()


@pytest.mark.parametrize("name", BAD_STORAGE)
def test_the_storage_of_another_study(name: str, tmp_path: Path) -> None:
    make, match = BAD_STORAGE[name]
    with pytest.raises(ValueError, match=match):
        make(tmp_path)()


IN_A_FRESH_PROCESS = """
import sys, importlib
import hypergrad.search as s
extras = ("optuna", "sklearn", "scipy", "pandas", "matplotlib", "hyperopt", "ray", "cmaes", "tensorboard")
print("brought:", *[m for m in extras if m in sys.modules])
real, gone = importlib.import_module, None

def fake(name, *more):
    if name.split(".")[0] == gone:
        raise ModuleNotFoundError(name=gone)
    return real(name, *more)

importlib.import_module = fake
for gone, strategy in (("optuna", "tpe"), ("cmaes", "cma"), ("sklearn", "random")):
    try:
        s.optimize(lambda p: 0.0, {"x": s.Float(0, 1), "y": s.Float(0, 1)}, strategy, 1)
    except ImportError as error:
        print(error)
"""


@pytest.mark.slow
def test_the_search_imports_no_extra_and_names_a_missing_one_with_its_pip_line() -> None:
    done = subprocess.run([sys.executable, "-c", IN_A_FRESH_PROCESS], check=True, capture_output=True, text=True)
    brought, optuna, cmaes, sklearn = done.stdout.splitlines()
    assert brought.strip() == "brought:"
    assert optuna.endswith("pip install optuna")
    assert cmaes.endswith("pip install cmaes")
    assert sklearn.endswith("pip install scikit-learn")


def test_a_trial_refuses_what_it_cannot_keep() -> None:
    trial = Trial(0, {}, 0)
    trial.report(1.0)
    with pytest.raises(ValueError, match="count up"):
        trial.report(1.0, 1)
    with pytest.raises(TypeError, match="numbers, strings"):
        trial.note("model", object())
    outcome = evaluate(lambda trial: (_ for _ in ()).throw(Pruned()), trial)
    assert outcome.state == "pruned" and outcome.error is None


def test_public_names_are_there_and_documented() -> None:
    assert dir(hypergrad.search) == sorted([*hypergrad.search.__all__, "HypergradSearchCV"])
    for name in hypergrad.search.__all__:
        assert (getattr(hypergrad.search, name).__doc__ or "").strip(), name
    assert isinstance(quiet(bowl, SPACE, "random", 1), Study)
    assert np.isfinite(problems.bowl(BEST)) and Int(1, 2).grid() == [1, 2]
