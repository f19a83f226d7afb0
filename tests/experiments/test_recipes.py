"""The scripts of docs/integrations.md run, and find an lr a hundred times and more above the one that they are given."""

from __future__ import annotations

import importlib

import pytest

from tests.integrations.runs import quiet

RECIPES = {
    "lightning": (8, 1e-4),
    "accelerate": (16, 1e-4),
    "skorch": (8, 1e-4),
    "transformers": (6, 1e-6),
}  # epochs, lr


@pytest.mark.parametrize("name", [*list(RECIPES)[:3], pytest.param("transformers", marks=pytest.mark.slow)])
def test_recipe(name: str) -> None:
    pytest.importorskip(name)
    epochs, start = RECIPES[name]
    with quiet():
        found = importlib.import_module(f"experiments.recipes.{name}_digits").main(epochs)
    assert found["lr"] > 100 * start and found["test accuracy"] > 0.85
