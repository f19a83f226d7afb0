import json
import math

import pytest
import torch

from experiments import recipe
from experiments.arguments import parse
from experiments.workloads import WORKLOADS, train
from tests.tiers import slow_but


def quick(out, *words):
    return recipe.main(parse(recipe.Args, ["--quick", "--out", str(out), *words]))


def test_rows_are_kept_and_summarised(tmp_path):
    rows = quick(tmp_path)
    assert [row["kind"] for row in rows] == ["overall", "summary", "summary"] + 4 * ["run"]
    runs = rows[3:]
    assert all(row["over_tuned"] == row["plain_val"] / row["val"] and "test" not in row for row in runs)
    whole = math.exp(sum(math.log(row["over_tuned"]) for row in runs) / 4)
    assert rows[0]["over_tuned"] == pytest.approx(whole)
    assert rows[0]["worst"] == pytest.approx(
        max(math.sqrt(runs[i]["over_tuned"] * runs[i + 1]["over_tuned"]) for i in (0, 2))
    )
    lines = (tmp_path / "recipe.jsonl").read_text()
    assert quick(tmp_path) == rows and (tmp_path / "recipe.jsonl").read_text() == lines
    assert json.loads((tmp_path / "recipe.json").read_text())["rows"] == rows


@pytest.mark.parametrize(
    "name",
    slow_but(["mlp_digits", "matrix_factorisation", "muon_mnist1d"], "mlp_digits", "matrix_factorisation"),
)
def test_a_plain_run_by_a_recipe_is_the_workloads_own_with_its_numbers(name):
    """Where the recipe says lr 1e-3 and weight decay 1e-4: the plain run whose lr is set by hand in every step."""
    steps, seed = 30, 3
    one, other = (WORKLOADS[name].build(seed, False, steps) for _ in range(2))
    optimizers = one.make_optimizers(1e-3, 1e-4)
    tuner = recipe.hypergrad.Tuner(
        one.model, optimizers, one.val_loss, total_steps=steps, mode="forward", keep_best=False
    )
    found = recipe.by_recipe(other, str(tuner.recipe()))
    tuner.close()
    t = 0

    def set_lr() -> None:
        nonlocal t
        t += 1
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = 1e-3 * max(steps - t, 1) / steps

    plain = recipe.fit(one, optimizers, torch.Tensor.backward, set_lr)
    assert found["val"] == pytest.approx(plain["val"], rel=1e-6)
    assert plain["val"] != train(WORKLOADS[name].build(seed, False, steps), 2e-3, 1e-4)["val"]


def test_test_losses_are_read_on_unseen_seeds(tmp_path):
    rows = quick(tmp_path, "--seed", "1000", "--workloads", "diabetes")
    assert all(row["test_over_tuned"] == row["plain_test"] / row["test"] for row in rows if row["kind"] == "run")
    assert "test_over_tuned" in rows[0]


def test_a_run_without_a_number_is_lost():
    rows = [
        {"workload": "a", "over_tuned": None, "doubts": 1},
        {"workload": "a", "over_tuned": 1.21, "doubts": 0},
        {"workload": "b", "over_tuned": 1.0, "doubts": 1},
    ]
    whole = recipe.summarised(rows, ("a", "b"))[0]
    assert (whole["over_tuned"], whole["worst"], whole["lost"]) == (pytest.approx(1.21**0.5), pytest.approx(1.21), 1)
    assert whole["median"] == pytest.approx(1.105)
    assert (whole["undoubted"], whole["undoubted_runs"]) == (pytest.approx(1.21), 1)


@pytest.mark.parametrize("words", [("--workloads", "no"), ("--seed", "999", "--seeds", "2")])
def test_bad_arguments(words, tmp_path):
    with pytest.raises(SystemExit):
        quick(tmp_path, *words)
