"""Every row of the layer table, by both modes; and docs/layers.md is as the table's last run has it."""

from __future__ import annotations

import math
import re

import pytest
import torch

import hypergrad
from experiments import results
from hypergrad import Result
from tests.layers import LAYERS, LayerCase, outcome_of
from tests.oracle import AGREE, hypergradient

pytestmark = pytest.mark.slow

MODES = ("unrolled", "forward")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LAYERS)
def test_layer(name: str, mode: str) -> None:
    row, got = LAYERS[name], outcome_of(name, mode)
    assert got.outcome == row.expected, got
    assert re.search(row.says, got.says), got.says
    if row.expected == "warned":  # it is off, and not by much
        assert got.error is not None
        assert AGREE < got.error < 0.1


@pytest.mark.parametrize("name", [name for name, row in LAYERS.items() if row.expected == "refused"])
@pytest.mark.filterwarnings("ignore")  # of torch, while building and compiling
@pytest.mark.parametrize("mode", MODES)
def test_a_refusal_leaves_the_weights_as_they_were(name: str, mode: str) -> None:
    setup = LayerCase(name).build()
    before = [p.detach().clone() for p in setup.model.parameters()]
    with pytest.raises(NotImplementedError):
        hypergrad.hypergradient(setup.model, setup.optimizer, setup.loss, setup.batches, setup.val_loss, mode=mode)
    assert all(torch.equal(a, b) for a, b in zip(before, setup.model.parameters(), strict=True))


@pytest.mark.parametrize("name", [name for name, row in LAYERS.items() if row.expected == "refused"])
@pytest.mark.filterwarnings("ignore")  # of torch, while building and compiling
def test_a_tuner_refuses_it_by_the_same_name(name: str) -> None:
    """It calls the validation loss before any training loss, and that may be what fails first."""
    row, setup = LAYERS[name], LayerCase(name).build()

    def begin() -> None:
        tuner = hypergrad.Tuner(setup.model, setup.optimizer, setup.val_loss)
        tuner.backward(setup.loss(setup.model, setup.batches[0]))

    with pytest.raises(NotImplementedError, match=row.says):
        begin()


@pytest.mark.parametrize("name", [name for name, row in LAYERS.items() if row.expected == "rounded"])
def test_in_low_precision_the_modes_agree(name: str) -> None:
    """There is no difference of a bfloat16 loop to hold it against: mode against mode, and (above) against float64."""
    forward, unrolled = (hypergradient(LayerCase(name, low=True), mode=mode) for mode in ("forward", "unrolled"))
    assert _apart(forward, unrolled) <= LAYERS[name].tolerance


def _apart(a: Result, b: Result) -> float:
    return max(float((x - b.gradients[n]).abs().max() / x.abs().max()) for n, x in a.gradients.items())


def test_the_last_run_has_every_row_as_it_is_expected() -> None:
    """docs/layers.md is made from it, and tests/experiments/test_results.py holds the two together."""
    result = results.load("layers.json")
    assert result is not None, "run: python scripts/layers.py"
    assert [(r["layer"], r["outcome"]) for r in result["rows"]] == [(n, row.expected) for n, row in LAYERS.items()], (
        "run: python scripts/layers.py"
    )
    for r in result["rows"]:
        assert re.search(LAYERS[r["layer"]].says, r["says"])
        assert all((r[mode] is None) == (r["outcome"] == "refused") for mode in MODES)
        assert r["outcome"] != "exact" or max(r[mode] for mode in MODES) <= AGREE
        assert all(math.isfinite(r[mode] or 0.0) for mode in MODES)
