"""Every warning of the library points at the user's own line."""

from __future__ import annotations

import ast
import linecache
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hypergrad
from hypergrad.core.user_warnings import warn_user

MARK = "# here"  # ends the line that a warning is to point at


def line(x: float = 1.0) -> tuple[nn.Module, Any, Callable[[], Tensor]]:
    """A model, its optimizer, and a loss that x multiplies."""
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-3)
    return model, sgd, lambda: x * model(torch.ones(4, 2)).square().mean()


def start_from_zero() -> None:
    model, _, loss = line()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    hypergrad.Tuner(model, sgd, loss)  # here


def bad_batch() -> None:
    model, sgd, loss = line()
    tuner = hypergrad.Tuner(model, sgd, loss)
    tuner.backward(math.nan * loss())
    sgd.step()  # here


def closure() -> None:
    model, sgd, loss = line()
    tuner = hypergrad.Tuner(model, sgd, loss)

    def evaluate() -> Tensor:
        value = math.nan * loss()
        tuner.backward(value)
        return value

    sgd.step(evaluate)  # here


def scaler() -> None:
    model, sgd, loss = line()
    grad_scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    tuner = hypergrad.Tuner(model, sgd, loss, total_steps=1, scaler=grad_scaler)
    for _ in range(2):
        sgd.zero_grad()
        tuner.backward(grad_scaler.scale(loss()))
        grad_scaler.step(sgd)  # here
        grad_scaler.update()


def whole_step() -> None:
    model, sgd, loss = line()
    tuner = hypergrad.Tuner(model, sgd, loss, loss=lambda model, batch: loss(), mode="unrolled", total_steps=1, every=1)
    for _ in range(2):
        tuner.step(None)  # here


class Counting(nn.Module):
    """Keeps a mean of what it sees."""

    mean: Tensor

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.mean = 0.9 * self.mean + 0.1 * x
        return (self.weight * (x - self.mean)).sum()


def buffers() -> tuple[Any, ...]:
    model = Counting()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = lambda model, x: model(x).square()  # noqa: E731
    x = torch.ones(2, dtype=torch.float64)
    return model, sgd, loss, [x, 2 * x], lambda: model(x).square()


def hypergradient(mode: str) -> None:
    hypergrad.hypergradient(*buffers(), wrt="lr", mode=mode)  # here


def check() -> None:
    hypergrad.check(*buffers(), wrt="lr")  # here


def tune_run() -> None:
    def build(seed: int) -> hypergrad.Run:
        model, sgd, loss = line()
        group = sgd.param_groups[0]
        val_loss = lambda: loss() * (math.nan if group["lr"] >= 1 else 1.0)  # noqa: E731
        return hypergrad.Run(model, sgd, [None] * 4, lambda model, batch: loss(), val_loss)

    hypergrad.tune_run(build, {"lr": 5.0}, outer_steps=2, horizons=(1.0,), progress=False)  # here


def search_cv() -> None:
    sklearn = pytest.importorskip("sklearn.linear_model")
    from hypergrad.search import Float
    from hypergrad.search.sklearn import HypergradSearchCV

    draws = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 3, generator=draws).numpy(), torch.randn(40, generator=draws).numpy()
    HypergradSearchCV(sklearn.Lasso(), {"alpha": Float(1e4, 1e6, "log")}, cv=2).fit(x, y)  # here


def interrupted() -> None:
    pytest.importorskip("optuna")
    from hypergrad import search

    trials = iter(range(3))

    def objective(trial: Any) -> float:
        if next(trials) == 1:
            raise KeyboardInterrupt
        return trial["x"]

    search.optimize(objective, {"x": search.Float(0.0, 1.0)}, "random", 3, progress=False)  # here


WARNS: dict[str, tuple[Callable[[], None], str]] = {
    "Tuner": (start_from_zero, "weight_decay is 0"),
    "step": (bad_batch, "not finite"),
    "step with a closure": (closure, "not finite"),
    "step by a GradScaler": (scaler, "total_steps=1"),
    "tuner.step": (whole_step, "total_steps=1"),
    "hypergradient, forward": (lambda: hypergradient("forward"), "buffers mean"),
    "hypergradient, unrolled": (lambda: hypergradient("unrolled"), "buffers mean"),
    "check": (check, "buffers mean"),
    "tune_run": (tune_run, "not finite"),
    "HypergradSearchCV": (search_cv, "does not change with alpha"),
    "optimize": (interrupted, "interrupted"),
}


@pytest.mark.parametrize("name", WARNS)
def test_warning_points_at_the_users_line(name: str) -> None:
    act, words = WARNS[name]
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        act()
    mine = [each for each in heard if words in str(each.message)]
    assert mine, [str(each.message) for each in heard]
    for each in mine:
        assert each.filename == __file__
        assert linecache.getline(__file__, each.lineno).rstrip().endswith(MARK)


@pytest.mark.parametrize("package", ["lightning.pytorch.loops", "transformers.trainer", "skorch.net", "ray"])
def test_frames_of_packages_whose_loop_calls_are_passed_over(package: str) -> None:
    exec("def inside():\n    warn('said')", ours := {"__name__": "hypergrad.x", "warn": warn_user})
    exec("def fit():\n    inside()", theirs := {"__name__": package, "inside": ours["inside"]})
    with pytest.warns(UserWarning, match="said") as heard:
        theirs["fit"]()  # here
    assert heard[0].filename == __file__
    assert linecache.getline(__file__, heard[0].lineno).rstrip().endswith(MARK)


def test_the_same_names_outside_of_them_are_the_users() -> None:
    exec("def inside():\n    warn('said')", ours := {"__name__": "hypergrad.x", "warn": warn_user})
    exec(
        compile("def mine():\n    inside()", "mine.py", "exec"),
        theirs := {"__name__": "hypergrads.train", "inside": ours["inside"]},
    )
    with pytest.warns(UserWarning, match="said") as heard:
        theirs["mine"]()
    assert (heard[0].filename, heard[0].lineno) == ("mine.py", 2)


def test_nothing_in_the_library_warns_in_another_way() -> None:
    root = Path(hypergrad.__file__).parent
    calls = [
        f"{file.relative_to(root)}:{node.lineno}"
        for file in root.rglob("*.py")
        if file.name != "user_warnings.py"
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("warnings.warn", "warnings.warn_explicit")
    ]
    assert not calls
