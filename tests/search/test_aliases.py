"""Which entries hypergradients move: by the run's own names, by aliases, and said where none fits."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from hypergrad.search import Float, NoTrialCompleted, Run, Trial, optimize

pytest.importorskip("optuna")
pytest.importorskip("sklearn")

quiet = partial(optimize, progress=False)
STRATEGIES = ("hypergradient", "hybrid", "hypergradient-online", "hybrid-online")
STEPS = 20


def decayed(p: dict[str, Any], trial: Trial) -> Run:
    """θ²/2 from θ = 2, pulled towards 1 by the validation loss: lr and weight decay have derivatives. Any names will do."""
    model = torch.nn.Linear(1, 1, bias=False).double()
    torch.nn.init.constant_(model.weight, 2.0)
    rate, decay = (next(p[name] for name in names if name in p) for names in (("lr", "rate"), ("weight_decay", "wd")))
    sgd = torch.optim.SGD(model.parameters(), lr=rate, weight_decay=decay)

    def loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        return (model.weight**2).sum() / 2  # type: ignore[operator]

    return Run(model, sgd, [None] * STEPS, loss, lambda: ((model.weight - 1) ** 2).sum())


LR, WD = Float(1e-3, 0.5, "log", start=0.01), Float(1e-4, 1.0, "log", start=0.01)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_alias_makes_an_entry_the_hyperparameter_that_it_is(strategy: str) -> None:
    """The same study as with the run's own names."""
    named = quiet(decayed, {"lr": LR, "weight_decay": WD}, strategy, 2)
    called = quiet(decayed, {"rate": LR, "wd": WD}, strategy, 2, aliases={"rate": "lr", "wd": "weight_decay"})
    assert [x.value for x in called.trials] == [x.value for x in named.trials]
    assert called.best_params == {"rate": named.best_params["lr"], "wd": named.best_params["weight_decay"]}
    assert set(called.best_trial.notes["learned"]) == {"rate", "wd"}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_entry_that_no_hypergradient_moves_is_said_before_anything_is_trained(strategy: str) -> None:
    trained: list[int] = []

    def watched(p: dict[str, Any], trial: Trial) -> Run:
        run = decayed(p, trial)

        def loss(model: torch.nn.Module, batch: Any, hypers: Any = None) -> torch.Tensor:
            if hypers is None or not any(x.requires_grad for x in hypers.values()):  # else it is asked what it reads
                trained.append(trial.number)
            return run.loss(model, batch)

        return run._replace(loss=loss)

    space = {"lr": LR, "wd": WD}
    with pytest.warns(UserWarning, match="no hypergradient moves 'wd': .* 'weight_decay'.* aliases=") as said:
        study = quiet(watched, space, strategy, 1)
    assert study.best_trial.notes["not differentiated"] == ["wd"] and set(study.best_trial.notes["learned"]) == {"lr"}
    assert len(said) == 1 and trained
    trained.clear()
    with pytest.raises(
        NoTrialCompleted, match="NotDifferentiated"
    ):  # tests make errors of warnings: the trial ends there
        quiet(watched, space, strategy, 1)
    assert not trained
    meant = {"lr": LR, "wd": Float(1e-4, 1.0, "log", differentiable=False)}
    assert "not differentiated" not in quiet(watched, meant, strategy, 1).best_trial.notes


def test_strategies_without_hypergradients_take_aliases_and_need_none() -> None:
    space = {"lr": LR, "wd": WD}
    with_aliases = quiet(decayed, space, "random", 3, aliases={"wd": "weight_decay"})
    assert [x.params for x in with_aliases.trials] == [x.params for x in quiet(decayed, space, "random", 3).trials]


WORKERS = """
from hypergrad.search import optimize
from tests.search.test_aliases import LR, WD, decayed

if __name__ == "__main__":
    optimize(decayed, {"lr": LR, "wd": WD}, "hypergradient", 2, n_jobs=2, progress=False)
"""


@pytest.mark.slow
def test_workers_in_processes_say_it_too(tmp_path: Any) -> None:
    (tmp_path / "script.py").write_text(WORKERS)
    root = Path(__file__).parents[2]
    environ = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py"], capture_output=True, text=True, check=True, cwd=root, env=environ
    )
    assert "no hypergradient moves 'wd'" in done.stderr


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "an entry that is not there": ({"weight": "weight_decay"}, ValueError, "no entry 'weight'; it has lr, wd"),
    "two of one hyperparameter": ({"wd": "lr"}, ValueError, "more than one entry .* 'lr'"),
    "no dict": (["wd"], TypeError, "a dict of entry"),  # type: ignore[dict-item]
    "no name": ({"wd": 3}, TypeError, "a dict of entry"),
    "what the run has not": ({"wd": "decay"}, TypeError, "'wd' cannot be 'decay'.*'weight_decay'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_aliases(name: str) -> None:
    aliases, error, match = BAD[name]
    with pytest.raises(error, match=match):
        quiet(decayed, {"lr": LR, "wd": WD}, "hypergradient", 1, aliases=aliases)
