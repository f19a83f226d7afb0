"""A stored study goes on over a space that has become wider; its trials keep their numbers and values."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch

from hypergrad.search import Categorical, Float, Int, Trial, optimize
from hypergrad.search.storage import NAME, open_storage
from tests.search.problems import SPACE as BOWL
from tests.search.problems import quadratic, reporting_bowl
from tests.tiers import slow_but

pytest.importorskip("sklearn")

quiet = partial(optimize, progress=False)
SPACE: dict[str, Any] = {"x": Float(0.0, 1.0), "kind": ["a", "b"], "layer": [torch.nn.ReLU, torch.nn.Tanh]}
MORE: dict[str, Any] = {
    "layer": [torch.nn.GELU, torch.nn.Tanh, torch.nn.ReLU],
    "x": Float(-1.0, 3.0),
    "kind": Categorical(["c", "b", "a"]),
    "y": Float(0.1, 0.9, "logit", when={"kind": ["a", "c"]}),
}
TRIALS, ALL = 10, 30
WRITES = 5  # of an extension of two trials: the study, its trials, and two user attributes


def parts(p: dict[str, Any]) -> float:
    return (p["x"] - 2) ** 2 + {"a": 1.0, "b": 2.0, "c": 0.0}[p["kind"]] + (p["layer"] is torch.nn.ReLU) + p.get("y", 0)


def reporting(p: dict[str, Any], trial: Trial) -> float:
    for epoch in range(1, 5):
        trial.report(parts(p) + 1 / epoch, epoch)
        trial.should_prune()
    return parts(p)


@pytest.mark.parametrize(
    "strategy", slow_but(["random", "tpe", "gp", "cma", "hyperopt", "asha", "hyperband"], "tpe", "asha")
)
def test_a_study_goes_on_over_a_wider_space(strategy: str, tmp_path: Path) -> None:
    """Trials before keep number, values, loss and reports; those after use what is new, and are kept as any others are."""
    package = {"cma": "cmaes", "hyperopt": "hyperopt"}.get(strategy)
    if package:
        pytest.importorskip(package)
    call = partial(quiet, reporting, strategy=strategy, storage=tmp_path / "s.journal")
    before = call(SPACE, budget=TRIALS)
    with pytest.warns(UserWarning, match=f"extended: its {TRIALS} trials stay.* None of them has a value of y"):
        after = call(MORE, budget=ALL)
    seen = [(x.number, x.params, x.value, x.state, x.cost) for x in before.trials]
    assert [(x.number, x.params, x.value, x.state, x.cost) for x in after.trials[:TRIALS]] == seen
    reports = [x.intermediate_values for x in after.optuna.get_trials()]
    assert reports[:TRIALS] == [x.intermediate_values for x in before.optuna.get_trials()]
    new = after.trials[TRIALS:]
    assert [x.number for x in after.trials] == list(range(ALL))
    assert all(x.value == parts(x.params) for x in after.trials if x.state == "complete")
    assert any(x.params["kind"] == "c" for x in new) and any(x.params["layer"] is torch.nn.GELU for x in new)
    assert any(not 0 <= x.params["x"] <= 1 for x in new) and all(
        ("y" in x.params) == (x.params["kind"] != "b") for x in new
    )
    assert after.best_value < before.best_value
    again = call(MORE, budget=ALL)  # the wider study is the study: nothing is said, and nothing runs
    assert [(x.params, x.value) for x in again.trials] == [(x.params, x.value) for x in after.trials]
    assert [(x.number, x.params, x.value, x.state, x.cost) for x in before.trials] == seen  # and may still be read
    assert optuna.get_all_study_names(open_storage(tmp_path / "s.journal")) == [NAME, f"{NAME} 2"]


@pytest.mark.slow
def test_processes_report_to_the_wider_study(tmp_path: Path) -> None:
    call = partial(quiet, reporting_bowl, strategy="asha", storage=tmp_path / "s.journal", n_jobs=2)
    call(BOWL, budget=4)
    with pytest.warns(UserWarning, match="extended: its 4 trials stay"):
        study = call(BOWL | {"k": Int(0, 9)}, budget=12)
    reported = [set(x.intermediate_values) for x in study.optuna.get_trials(deepcopy=False)]
    assert [max(each) for each in reported] == [x.cost.epochs for x in study.trials] and len(reported) == 12


def test_a_scale_may_change_and_a_constant_may_become_a_range(tmp_path: Path) -> None:
    storage = tmp_path / "s.journal"
    first = quiet(lambda p: p["lr"], {"lr": Float(0.01, 1.0), "m": 0.5, "n": Int(1, 4)}, "tpe", 5, storage=storage)
    wider = {"lr": Float(1e-4, 1.0, "log"), "m": Float(0.1, 0.9, "logit"), "n": Int(1, 9, "log")}
    with pytest.warns(UserWarning, match="extended"):
        second = quiet(lambda p: p["lr"], wider, "tpe", 12, storage=storage)
    assert [x.params for x in second.trials[:5]] == [x.params for x in first.trials]
    assert second.best_value < 0.01 and len({x.params["m"] for x in second.trials}) > 3


def test_a_trial_that_was_cut_off_is_run_again_in_the_wider_space(tmp_path: Path) -> None:
    def interrupted(p: dict[str, Any], trial: Trial) -> float:
        if trial.number == 3 and fails:
            raise KeyboardInterrupt
        seen.append((trial.number, trial.seed))
        return p["x"]

    seen: list[tuple[int, int]] = []
    fails, storage = True, tmp_path / "s.journal"
    with pytest.warns(UserWarning, match="interrupted"):
        cut = quiet(interrupted, {"x": Float(0, 1)}, "tpe", 6, storage=storage)
    fails = False
    with pytest.warns(UserWarning, match="extended"):
        study = quiet(interrupted, {"x": Float(0, 2), "z": [1, 2]}, "tpe", 6, storage=storage)
    assert [number for number, _ in seen] == list(range(6)) and len(study.trials) == 6
    assert study.trials[3].params["x"] == cut.trials[3].params["x"] and study.trials[3].params["z"] in (1, 2)


def test_hypergradients_go_on_over_a_wider_range(tmp_path: Path) -> None:
    call = partial(quiet, quadratic, strategy="hypergradient", storage=tmp_path / "s.journal", options={"steps": 4})
    first = call({"lr": Float(1e-3, 0.1, "log", start=0.05)}, budget=1)
    with pytest.warns(UserWarning, match="extended"):
        second = call({"lr": Float(1e-3, 1.5, "log", start=0.05)}, budget=3)
    assert second.trials[0].value == first.best_value == pytest.approx(2 * 0.9**10)  # held at the bound, 0.1
    assert second.best_value < first.best_value


NARROWER: dict[str, tuple[Any, str]] = {
    "a range": (SPACE | {"x": Float(0.0, 1e-6)}, r"trial 0 has x=0\.\d+, outside the new Float"),
    "an entry that is gone": ({"x": SPACE["x"], "kind": ["a", "b"]}, "'layer', which the new space has not"),
    "choices": (SPACE | {"kind": ["c", "d"]}, "has kind='[ab]', outside the new Categorical"),
    "a step": (SPACE | {"x": Float(0.0, 1.0, step=0.5)}, "outside the new Float"),
    "a condition": (
        SPACE | {"c": [1, 2], "kind": Categorical(["a", "b"], when={"c": 2})},
        "'kind', which .* is not there",
    ),
}


@pytest.mark.parametrize("name", NARROWER)
def test_a_space_that_does_not_have_the_trials_is_refused_and_the_study_kept(name: str, tmp_path: Path) -> None:
    space, match = NARROWER[name]
    call = partial(quiet, parts, strategy="tpe", budget=3, storage=tmp_path / "s.journal")
    before = (call(SPACE).trials, (tmp_path / "s.journal").read_bytes())
    with pytest.raises(ValueError, match="A space can be extended, but trial 0 has"):
        call(space)
    with pytest.raises(ValueError, match=match):
        call(space)
    assert (call(SPACE).trials, (tmp_path / "s.journal").read_bytes()[: len(before[1])]) == before


@pytest.mark.parametrize("strategy", ["grid", "random"])
def test_points_that_are_listed_are_not_extended(strategy: str, tmp_path: Path) -> None:
    call = partial(quiet, lambda p: p["k"], strategy=strategy, budget=2, storage=tmp_path / "s.journal")
    call({"k": [1, 2]})
    with pytest.raises(ValueError, match="all of its points are listed"):
        call({"k": [1, 2, 3]})


class Killed(BaseException):
    pass


@pytest.mark.parametrize("calls", range(WRITES))
def test_an_extension_that_is_cut_off_anywhere_is_done_again(
    calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies in one of the writes to the storage; the next call finds all trials."""
    storage = optuna.storages.JournalStorage
    call = partial(quiet, parts, strategy="random", storage=tmp_path / "s.journal")
    before = call({"x": Float(0, 1), "kind": ["a", "b"], "layer": [torch.nn.Tanh]}, budget=2)
    left = [calls]

    def dying(write: Any) -> Any:
        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return write(self, *args, **kwargs)

        return run

    with monkeypatch.context() as patch:
        for name in ("create_new_study", "delete_study", "create_new_trial", "set_study_user_attr"):
            patch.setattr(storage, name, dying(getattr(storage, name)))
        with pytest.raises(Killed):
            call({"x": Float(0, 2), "kind": ["a", "b"], "layer": [torch.nn.Tanh]}, budget=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the extension, where it was not done yet
        after = call({"x": Float(0, 2), "kind": ["a", "b"], "layer": [torch.nn.Tanh]}, budget=2)
    assert [(x.params, x.value) for x in after.trials] == [(x.params, x.value) for x in before.trials]
    assert optuna.get_all_study_names(open_storage(tmp_path / "s.journal")) == [NAME, f"{NAME} 2"]
