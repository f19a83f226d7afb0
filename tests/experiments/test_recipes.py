"""The scripts of docs/recipes.md and docs/integrations.md run, and what they show is so."""

from __future__ import annotations

import ast
import importlib
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.integrations.runs import quiet
from tests.tiers import slow_but

ROOT = Path(__file__).parents[2]
FRAMEWORKS = {
    "lightning": (8, 1e-4),
    "accelerate": (16, 1e-4),
    "skorch": (8, 1e-4),
    "transformers": (6, 1e-6),
}  # epochs, lr


class Recipe(NamedTuple):
    """Arguments of `main`, and what holds of the numbers that it returns, in their order."""

    arguments: dict[str, Any]
    holds: Callable[..., bool]
    slow: bool = True


RECIPES = {
    "image_training": Recipe(
        {}, lambda accuracy, lr, weights: accuracy > 0.95 and lr > 1e-3 and math.isfinite(weights)
    ),
    "fine_tuning": Recipe(
        {}, lambda tuned, plain, lower, upper, head: tuned < plain / 2 and min(lower, upper, head) > 1e-4
    ),
    "example_weights": Recipe(
        {},
        lambda equal, learned, right_alone, right, wrong: equal + 0.05 < learned < right_alone and wrong < right / 2,
    ),
    "per_layer_l2": Recipe({"outer_steps": 5}, lambda before, after, accuracy, *l2: after < before and accuracy > 0.9),
    "maml": Recipe({"outer_steps": 60, "tasks": 4}, lambda random, learned, lr: learned < 0.8 * random and lr > 0.01),
    "meta_weight_net": Recipe({}, lambda accuracy, right, wrong: accuracy > 0.85 and wrong < right / 2),
    "darts_mixing": Recipe({}, lambda loss, linear, tanh, sine: loss < 0.2 and sine > 0.5),
    "lr_schedule": Recipe({}, lambda flat, learned, *lr: learned < flat / 4 and max(lr) > 2 * min(lr)),
    "augmentation": Recipe(
        {"outer_steps": 6}, lambda strength, learned, start: strength > 0.4 and learned < start, slow=False
    ),
    "several_losses": Recipe(
        {}, lambda equal, tuned, *shares: tuned > equal + 0.03 and shares == tuple(sorted(shares)[::-1])
    ),
    "gan_ring": Recipe({}, lambda plain, tuned, *lr: tuned < plain / 2 and min(lr) > 2e-4),
    "optuna_polish": Recipe(
        {"trials": 5}, lambda best, median, width, lr, decay: best < 0.2 and lr > 1e-3 and decay > 0
    ),
}


@pytest.mark.parametrize("name", slow_but(FRAMEWORKS, "skorch"))
def test_of_another_package(name: str) -> None:
    """It finds an lr a hundred times and more above the one that it is given."""
    pytest.importorskip(name)
    epochs, start = FRAMEWORKS[name]
    with quiet():
        found = importlib.import_module(f"experiments.recipes.{name}_digits").main(epochs)
    assert found["lr"] > 100 * start and found["test accuracy"] > 0.85


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * recipe.slow) for name, recipe in RECIPES.items()]
)
def test_recipe(name: str) -> None:
    with quiet():
        found = importlib.import_module(f"experiments.recipes.{name}").main(**RECIPES[name].arguments)
    assert RECIPES[name].holds(*found.values()), found


@pytest.mark.slow
def test_image_training_goes_on_where_it_stopped(tmp_path: Path) -> None:
    main = importlib.import_module("experiments.recipes.image_training").main
    with quiet():
        main(tmp_path / "run.pt", last_epoch=1)
        assert main(tmp_path / "run.pt", last_epoch=2) == main(last_epoch=2)


@pytest.mark.slow
def test_ddp_training_ends_alike_on_both_ranks(tmp_path: Path) -> None:
    """By torchrun, one file of output a rank."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--redirects", "1", "--log-dir", str(tmp_path), "-m", "experiments.recipes.ddp_training"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    one, other = (ast.literal_eval(next(tmp_path.glob(f"*/*/{i}/stdout.log")).read_text()) for i in range(2))
    assert one | {"rank": 1} == other
    assert one["test accuracy"] > 0.85 and one["lr"] > 1e-4


def test_every_recipe_is_tested_and_shown() -> None:
    """Each on its page, which the site shows it on: below a link that stands alone on its line."""
    files = {path.stem for path in (ROOT / "experiments/recipes").glob("*.py")} - {"__init__"}
    assert files == {*RECIPES, "ddp_training", *(f"{name}_digits" for name in FRAMEWORKS)}
    page = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\[(\w+)\.py\]\(\.\./experiments/recipes/\1\.py\)$", page, re.MULTILINE)
    assert sorted(shown) == sorted([*RECIPES, "ddp_training"])
