"""Tuner(on_log=…): what is in metrics.jsonl, handed to a function; the loggers that the page of recipes names take it."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hypergrad
from tests.online.live_loops import data, float64, mse, sgd, two_layers, validation  # noqa: F401

Row = tuple[dict[str, float], int]


def trained(bad_step: int = -1, **options: Any) -> hypergrad.Tuner:
    model = two_layers()
    opt = sgd(momentum=0.9)(model)
    tuner = hypergrad.Tuner(model, opt, validation(model), every=3, **options)
    for t, batch in enumerate(data()[0]):
        opt.zero_grad()
        tuner.backward(mse(model, batch) * (math.nan if t == bad_step else 1))
        opt.step()
    tuner.close()
    return tuner


def test_it_gets_what_metrics_jsonl_gets(tmp_path: Path) -> None:
    """But for the notes, which are sentences, and start/…, the level lines of TensorBoard's charts."""
    found: list[Row] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the bad batch
        trained(bad_step=4, log_dir=tmp_path, on_log=lambda metrics, step: found.append((metrics, step)))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    kept = [
        {k: x for k, x in row.items() if not k.startswith("start/")}
        for row in rows
        if not row.keys() & {"note", "recipe"}
    ]
    assert len(kept) < len(rows) and [step for _, step in found] == [0, 3, 6, 9, 12]
    assert [{"step": step, **metrics} for metrics, step in found] == kept
    assert all(type(x) is float for metrics, _ in found for x in metrics.values())


def test_it_gets_the_same_without_a_log_dir(tmp_path: Path) -> None:
    with_folder, alone = list[Row](), list[Row]()
    trained(log_dir=tmp_path, on_log=lambda metrics, step: with_folder.append((metrics, step)))
    trained(on_log=lambda metrics, step: alone.append((metrics, step)))
    for metrics, _ in with_folder + alone:
        metrics.pop("run/ms_per_step", None)  # a time
    assert alone == with_folder and len(alone) == 5


def test_training_is_the_same_with_it() -> None:
    one, other = trained(), trained(on_log=lambda metrics, step: None)
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))
    assert one.stats == other.stats


def test_what_it_raises_reaches_the_user() -> None:
    def failing(metrics: dict[str, float], step: int) -> None:
        raise ConnectionError("no server")

    with pytest.raises(ConnectionError, match="no server"):
        trained(on_log=failing)


def test_it_has_to_be_a_function() -> None:
    model = two_layers()
    with pytest.raises(TypeError, match="on_log must be a function"):
        hypergrad.Tuner(model, sgd()(model), validation(model), on_log="wandb")  # type: ignore[arg-type]


class Recording:
    """Stands in for a logger that is not installed: notes what its methods were called with."""

    def __init__(self, *methods: str):
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        for name in methods:
            setattr(self, name, self._method(name))

    def _method(self, name: str) -> Callable[..., None]:
        return lambda *args, **kw: self.calls.append((name, args, kw))


# The recipes of docs/integrations.md: what is given as on_log for each logger.
RECIPES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "Weights & Biases": ("log", lambda run: lambda metrics, step: run.log(metrics | {"tuner/step": step})),
    "MLflow": ("log_metrics", lambda mlflow: mlflow.log_metrics),
    "Lightning": ("log_metrics", lambda logger: logger.log_metrics),
    "accelerate": ("log", lambda accelerator: lambda metrics, step: accelerator.log(metrics, step=step)),
    "print": (
        "print",
        lambda to: lambda metrics, step: to.print(metrics, metrics.get("loss/val"), metrics.get("lr/applied"), step),
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name: str) -> None:
    method, recipe = RECIPES[name]
    logger = Recording(method)
    trained(on_log=recipe(logger))
    assert [called for called, _, _ in logger.calls] == [method] * 5
    steps = [kw.get("step", args[0].get("tuner/step", args[-1])) for _, args, kw in logger.calls]
    assert steps == [0, 3, 6, 9, 12] and all("hyper/lr_scale/0" in args[0] for _, args, _ in logger.calls)
