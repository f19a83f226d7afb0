"""What is kept of a trial that failed: the user's own message and line first."""

from __future__ import annotations

import inspect
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import hypergrad
from hypergrad.search import Float, NoTrialCompleted, Run, Trial, hyperopt_objective, optimize
from hypergrad.search.failures import explained
from tests.search.problems import quadratic

pytest.importorskip("optuna")
pytest.importorskip("sklearn")

LIBRARY = str(Path(hypergrad.__file__).parent)
SPACE = {"lr": Float(0.01, 0.1, "log")}


def raises(p: dict[str, Any]) -> float:
    raise RuntimeError("b is not there")


def wrong_shapes(p: dict[str, Any]) -> float:
    return float(torch.nn.functional.linear(torch.ones(2), torch.ones(3, 3)).sum())


def wrong_loss(p: dict[str, Any], trial: Trial) -> Run:
    def loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        return model.weights  # type: ignore[return-value]

    return quadratic(p, trial)._replace(loss=loss)


def reports_backwards(p: dict[str, Any], trial: Trial) -> float:
    trial.report(1.0, 2)
    trial.report(1.0, 1)
    return 1.0


# objective -> the beginning of its error, the line of this file that it names
FAILING: dict[str, tuple[Any, str, str]] = {
    "raised by the objective": (raises, "RuntimeError: b is not there", 'raise RuntimeError("b is not there")'),
    "raised inside torch": (wrong_shapes, "RuntimeError: ", "return float(torch.nn.functional.linear("),
    "raised by a loss that the library calls": (
        wrong_loss,
        "(ValueError: .* failed on a batch .*)?AttributeError: ",
        "return model.weights",
    ),
    "raised by the library, called by the objective": (
        reports_backwards,
        "ValueError: trial.report",
        "trial.report(1.0, 1)",
    ),
}


@pytest.mark.parametrize("strategy", ["random", "hypergradient", "hybrid-online"])
@pytest.mark.parametrize("name", FAILING)
def test_the_users_message_and_line_come_first(name: str, strategy: str) -> None:
    objective, message, line = FAILING[name]
    with pytest.raises(NoTrialCompleted) as raised:
        optimize(objective, SPACE, strategy, 1, progress=False)
    (trial,) = raised.value.study.trials
    first, _, below = (trial.error or "").partition("\n\n")
    lines = first.splitlines()
    sources, start = inspect.getsourcelines(objective)
    at = start + next(i for i, each in enumerate(sources) if line in each)
    assert re.match(message, lines[0])
    assert lines[-3 if "^" in lines[-1] else -2].startswith(f'  File "{__file__}", line {at}, in ')
    assert LIBRARY not in first and LIBRARY in below and below.startswith("Traceback (most recent call last):")
    assert re.search(f"failed with:\n{message}", str(raised.value))


def test_fmin_says_it_so_too() -> None:
    pytest.importorskip("hyperopt")
    error = hyperopt_objective(raises, SPACE)({"lr": 0.05})["error"]
    assert error.splitlines()[0] == "RuntimeError: b is not there" and __file__ in error.splitlines()[1]


def test_an_error_without_a_line_of_the_users_begins_with_its_message() -> None:
    fixed = partial(quadratic_with_another_group, 0.05)
    space = {"lr": Float(0.01, 1.0, start=0.1)}
    with pytest.raises(NoTrialCompleted, match="in proportion") as raised:
        optimize(fixed, space, "hypergradient", 1, progress=False)
    assert (raised.value.study.trials[0].error or "").startswith("ValueError: 'lr' does not move in proportion")


def quadratic_with_another_group(fixed: float, p: dict[str, Any], trial: Trial) -> Run:
    run = quadratic(p, trial)
    return run._replace(optimizer=torch.optim.SGD([{"params": run.model.parameters(), "lr": fixed}], lr=p["lr"]))


def test_causes_are_kept_below() -> None:
    try:
        try:
            raise KeyError("inner")
        except KeyError as error:
            raise ValueError("outer") from error
    except ValueError as error:
        text = explained(error)
    assert text.startswith("ValueError: outer\n") and "KeyError: 'inner'" in text.partition("\n\n")[2]
