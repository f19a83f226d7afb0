"""Ray Tune in both directions: our objective in its tuner, its population-based training among our strategies."""

from __future__ import annotations

import copy
import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hypergrad.search import Categorical, Float, Int, Trial, optimize, ray_trainable
from hypergrad.search.extras import need
from hypergrad.search.objective import Reports
from hypergrad.search.ray_population import Member
from hypergrad.search.ray_tune import number_of
from hypergrad.search.space import Space
from hypergrad.search.strategies.population_based import PBT
from tests.search.problems import bowl, keeps_nothing, never, tuned_online, valley
from tests.search.ray_warnings import QUIET

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'ray[tune]'")
pytest.importorskip("optuna")
pytestmark = QUIET
SPACE = {"lr": Float(1e-3, 1.0, "log")}

pbt = partial(optimize, strategy="pbt", backend="ray", n_jobs=2, progress=False)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_population_trains_and_its_worst_take_over_from_its_best(tmp_path: Path) -> None:
    storage = tmp_path / "s.journal"
    call = partial(pbt, partial(valley, 6, tmp_path), SPACE, budget=4, storage=storage, seed=1, options={"synch": True})
    study = call()  # synch: who has come how far when the worst take over does not hang on the clock
    assert [x.state for x in study.trials] == ["complete"] * 4
    assert (tmp_path / "killed").exists() and [x.retries for x in study.trials] == [1, 0, 0, 0]
    for each in study.trials:
        path = each.notes["path"]
        assert path[-1]["epoch"] == 6 and path[-1]["value"] == each.value
        assert each.params == each.notes["learned"] and all(1e-3 <= point["lr"] <= 1.0 for point in path)
        epochs = {point["epoch"]: point["value"] for point in path}
        reported = study.optuna.get_trials(deepcopy=False)[each.number].intermediate_values
        assert set(reported) == set(epochs)
    moved = [each for each in study.trials if len({point["lr"] for point in each.notes["path"]}) > 1]
    assert moved  # some took over another's values, perturbed
    first = [each.notes["path"][0]["lr"] for each in study.trials]
    assert len(set(first)) == 4 and study.best_value < min(16 / 2 * (1 - lr) ** 12 for lr in sorted(first)[:3])
    steps = [line.split()[1] for line in (tmp_path / "steps").read_text().splitlines()]
    assert steps.count("1") == 4  # members that paused, were killed or took over went on from a checkpoint
    more = call()  # done: nothing is trained again
    assert [x.value for x in more.trials] == [x.value for x in study.trials]


NETS = [{"value": 3}, {"widths": [8, 8]}]


def hill(epochs: int, p: dict[str, Any], trial: Trial) -> float:
    """Minus the valley: a score. What is chosen arrives as it was written; trial 1 fails."""
    assert p["net"] in NETS and p["sizes"] == [64, 64]
    if trial.number == 1:
        raise RuntimeError("no score")
    state = trial.restore() or {"theta": 4.0, "epoch": 0}
    theta = state["theta"]
    for epoch in range(state["epoch"] + 1, epochs + 1):
        theta -= p["lr"] * theta
        trial.checkpoint({"theta": theta, "epoch": epoch})
        trial.report(-(theta**2) / 2, epoch)
    return -(theta**2) / 2


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_population_maximises_and_its_choices_may_be_lists_and_dicts(tmp_path: Path) -> None:
    space = SPACE | {"net": NETS, "sizes": [[64, 64]]}
    study = pbt(
        partial(hill, 6), space, budget=5, storage=tmp_path / "s.journal", options={"synch": True}, direction="maximize"
    )
    alive = sorted(x.params["lr"] for x in study.optuna.get_trials(deepcopy=False) if x.number != 1)
    complete = [each for each in study.trials if each.state == "complete"]
    assert [each.number for each in complete] == [0, 2, 3, 4]
    assert (study.trials[1].error or "").startswith("RuntimeError: no score") and study.best_value == max(
        each.value for each in complete
    )  # type: ignore[type-var]
    assert study.best_value > max(-16 / 2 * (1 - lr) ** 12 for lr in alive[:-1])
    assert all(each.params["net"] in NETS and each.params["sizes"] == [64, 64] for each in study.trials)


def test_values_that_were_taken_over_at_the_last_report_are_no_result() -> None:
    """Tune may hand a member another's weights and perturbed values when it has nothing left to train."""
    import optuna

    study = optuna.create_study()
    member = Member(Kept(), Reports(study.ask()))
    told = {"epochs_more": 1.0, "gradients_more": 1.0, "notes": {}, "time_total_s": 1.0}
    member.receive(told | {"loss": 7.0, "epoch": 1, "config": {"lr": 0.1}}, 0)
    member.receive(told | {"loss": 1.0, "epoch": 1, "config": {"lr": 0.2}, "done": True, "epochs_more": 0.0}, 0)
    outcome = member.future.result(timeout=0)
    assert (outcome.state, outcome.value, outcome.notes["learned"]) == ("complete", 7.0, {"lr": 0.1})
    member.receive(told | {"loss": 0.0, "epoch": 2, "config": {"lr": 0.3}}, 0)  # after the end nothing counts
    assert member.future.result() is outcome and len(member.path) == 1 and outcome.cost.epochs == 1.0


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_an_objective_that_keeps_nothing_is_told_what_to_call(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"trial\.checkpoint\(state\)"):
        pbt(keeps_nothing, SPACE, budget=2, storage=tmp_path / "s.journal")


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_ray_tune_stops_and_goes_on_with_our_objective_and_its_tuner(tmp_path: Path) -> None:
    """ASHA over a trainable whose checkpoints hold a `hypergrad.Tuner`."""
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    asha = ASHAScheduler(time_attr="epoch", max_t=4, grace_period=1, reduction_factor=2)
    found = tune.Tuner(
        ray_trainable(tuned_online),
        param_space={
            "lr": tune.grid_search([3e-2, 1e-4, 1e-5])
        },  # the best first, one at a time: ASHA stops the others
        tune_config=tune.TuneConfig(
            metric="loss", mode="min", scheduler=asha, max_concurrent_trials=1, reuse_actors=True
        ),
        run_config=tune.RunConfig(storage_path=str(tmp_path), verbose=0),
    ).fit()
    epochs = {each.config["lr"]: each.metrics["epoch"] for each in found}
    assert not found.errors and epochs == {3e-2: 4, 1e-4: 1, 1e-5: 1}
    best = found.get_best_result()
    assert best.checkpoint is not None and best.metrics["notes"]["lr"] != best.config["lr"]  # type: ignore[index]

    import torch

    with best.checkpoint.as_directory() as folder:
        state = torch.load(Path(folder) / "trial.pt", weights_only=True)["state"]
    assert state["epoch"] == 4 and state["tuner"]["stats"]["steps"] == 40


def climb(p: dict[str, Any], trial: Trial) -> float:
    """A score."""
    for epoch in (1, 2):
        trial.report(p["lr"] * epoch, epoch)
    return 3 * p["lr"]


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_ray_tune_maximises_a_score(tmp_path: Path) -> None:
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    asha = ASHAScheduler(time_attr="epoch", max_t=3, grace_period=1, reduction_factor=2)
    found = tune.Tuner(
        ray_trainable(climb, direction="maximize"),
        param_space={"lr": tune.grid_search([4.0, 1.0])},
        tune_config=tune.TuneConfig(metric="loss", mode="min", scheduler=asha, max_concurrent_trials=1),
        run_config=tune.RunConfig(storage_path=str(tmp_path), verbose=0),
    ).fit()
    assert {each.config["lr"]: each.metrics["score"] for each in found} == {4.0: 12.0, 1.0: 1.0}  # 1.0: stopped
    assert found.get_best_result().metrics["loss"] == -12.0  # type: ignore[index]


class Inside:
    """What a trainable calls of `ray.tune`, without a cluster: results are kept."""

    Checkpoint = None

    def __init__(self) -> None:
        self.results: list[dict[str, Any]] = []

    def get_context(self) -> Any:
        return type("Context", (), {"get_trial_id": lambda _: "a_00000"})()

    def get_checkpoint(self) -> None:
        return None

    def report(self, result: dict[str, Any]) -> None:
        self.results.append(result)


# direction -> (loss, score) of every result of `climb` at lr = 0.5
DIRECTIONS = {
    "minimize": [(0.5, None), (1.0, None), (1.5, None)],
    "maximize": [(-0.5, 0.5), (-1.0, 1.0), (-1.5, 1.5)],
}


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_trainable_reports_a_loss_in_either_direction(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from hypergrad.search import ray_tune

    inside, found = Inside(), need
    monkeypatch.setattr(ray_tune, "need", lambda name, what: inside if name == "ray.tune" else found(name, what))
    ray_trainable(climb, direction=direction)({"lr": 0.5})
    assert [(x["loss"], x.get("score")) for x in inside.results] == DIRECTIONS[direction]


@pytest.mark.parametrize(("direction", "worst"), [("minimize", math.inf), ("maximize", -math.inf)])
def test_the_worst_value_is_a_result_and_the_other_infinity_an_error(
    direction: str, worst: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hypergrad.search import ray_tune

    inside, found = Inside(), need
    monkeypatch.setattr(ray_tune, "need", lambda name, what: inside if name == "ray.tune" else found(name, what))
    ray_trainable(lambda p: worst, direction=direction)({"lr": 0.5})
    assert inside.results[-1]["loss"] == math.inf
    with pytest.raises(ValueError, match="the objective returned"):
        ray_trainable(lambda p: -worst, direction=direction)({"lr": 0.5})


class Kept(Trial):
    """A trial that goes on from a state, and keeps those it is given."""

    def __init__(self, state: Any = None):
        super().__init__(0, {"lr": 1e-3}, 0)
        self.state, self.states = state, []

    def restore(self) -> Any:
        return self.state

    def checkpoint(self, state: Any) -> None:
        self.states.append(copy.deepcopy(state))


def test_a_trial_that_goes_on_from_its_tuner_s_checkpoint_is_the_one_that_did_not_stop() -> None:
    whole = Kept()
    value = tuned_online(whole.params, whole)
    first = Kept(whole.states[1])
    assert tuned_online(first.params, first) == value
    assert len(whole.states) == 4 and len(first.states) == 2 and first.notes == whole.notes


def test_perturbed_values_stay_between_their_bounds_and_choices_step_along_their_list() -> None:
    space = Space({"lr": Float(1e-3, 1.0, "log"), "k": Int(1, 9), "m": Float(0.1, 0.9, "logit"), "a": [1, 2], "c": [5]})
    strategy = PBT(space, 0, {})
    assert set(strategy.mutations) == {"lr", "k", "m", "a"} and strategy.mutations["a"] == [1, 2]
    assert strategy.inside({"lr": 1.2, "k": 0, "m": 0.99, "a": 2}) == {"lr": 1.0, "k": 1, "m": 0.9, "a": 2}
    assert all(strategy.mutations["k"]() in space["k"] and strategy.mutations["m"]() in space["m"] for _ in range(20))


def test_trials_are_known_by_tune_s_numbers() -> None:
    assert number_of("9a3f1_00007") == 7
    assert number_of("12345678") == number_of("12345678") != number_of("abcdef12")


def _with(**arguments: Any) -> Any:
    given: dict[str, Any] = {"objective": speaking, "space": SPACE, "budget": 3, "storage": "s"}
    return lambda: pbt(**given | arguments)


def speaking(p: dict[str, Any], trial: Any) -> float:
    raise AssertionError("a trial was run")


BAD: dict[str, tuple[Any, str]] = {
    "not on Ray": (_with(backend="local"), "backend='ray'"),
    "an objective that cannot speak": (_with(objective=never), "trial.checkpoint"),
    "a budget in epochs": (_with(budget={"epochs": 3}), "in trials, the population"),
    "a population of one": (_with(budget=1), "2 or more"),
    "no storage": (_with(storage=None), "storage='study.journal'"),
    "conditions": (_with(space={"a": [1, 2], "b": Float(0, 1, when={"a": 1})}), "use another strategy"),
    "nothing to perturb": (_with(space={"a": Categorical([1])}), "nothing to perturb"),
    "an option that Ray has not": (_with(options={"x": 1}), "PopulationBasedTraining"),
    "a quantile of 0.9": (_with(options={"quantile_fraction": 0.9}), "quantile_fraction"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call, match = BAD[name]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=match):
        call()
    assert os.listdir(tmp_path) == []
    with pytest.raises(ValueError, match="'minimize' or 'maximize', got 'max'"):
        ray_trainable(bowl, direction="max")
    with pytest.raises(TypeError, match="function"):
        ray_trainable(bowl({"lr": 1e-2, "k": 3, "kind": "a"}))  # type: ignore[arg-type]
