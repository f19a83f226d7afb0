import inspect
import json
import math

import pytest
import torch

from experiments import invariance, pools
from experiments.arguments import parse


def quick(module, out, *words: str):
    return module.main(parse(module.Args, ["--quick", "--out", str(out), *words]))


def test_a_pool_has_grid_fresh_seeds_and_trials_and_is_not_run_twice(tmp_path, monkeypatch, capsys):
    rows = quick(pools, tmp_path)
    kinds = [row["kind"] for row in rows if row["workload"] == "diabetes"]
    assert {kind: kinds.count(kind) for kind in kinds} == {"summary": 1, "grid": 4, "fresh": 2, "random": 2}
    result = json.loads((tmp_path / "pools.json").read_text())
    assert result["rows"] == rows
    assert str(tmp_path) not in result["command"]
    assert set(pools.summaries(tmp_path)) == {"mlp_digits", "diabetes"}

    monkeypatch.setattr(pools, "train", lambda *_, **__: pytest.fail("a finished run was run again"))
    assert quick(pools, tmp_path) == rows
    assert "diabetes" in capsys.readouterr().out


def row(kind: str, val: float | None, test: float, **more):
    same = {"workload": "w", "lr": 0.1, "weight_decay": 0.0, "steps": 1}
    return same | {"kind": kind, "val": val, "test": test} | more


def test_the_floor_is_that_of_the_winner_on_fresh_seeds():
    grid = [row("grid", None, 0.0), row("grid", 2.0, 0.1), row("grid", 1.0, 9.0, lr=0.3)]
    fresh = [row("fresh", 1.0, test, initial_val=5.0, initial_test=4.0) for test in (1.0, 2.0, 3.0)]
    ended = pools.summary(grid + fresh)
    assert ended is not None
    assert (ended["lr"], ended["l_star"], ended["sigma"], ended["l0"], ended["val_l0"]) == (0.3, 2.0, 1.0, 4.0, 5.0)
    assert pools.summary(grid) is None


def test_grid_and_trials_are_the_stated_ones():
    points = pools.grid(20, 10)
    assert len(points) == 200
    assert (points[0]["lr"], points[-1]["lr"]) == (1e-5, 10)
    assert (points[0]["weight_decay"], points[-1]["weight_decay"]) == (1e-7, 0.1)
    trials = [pools.trial(i) for i in range(200)]
    assert trials[7] == pools.trial(7) and trials[7]["seed"] == 1007
    assert all(1e-6 <= t["lr"] <= 10 and 1e-7 <= t["weight_decay"] <= 0.1 for t in trials)
    assert min(t["lr"] for t in trials) < 1e-5 and max(t["lr"] for t in trials) > 1


def test_the_small_family_has_a_file_and_a_grid_of_its_own_and_untuned_runs(tmp_path, capsys):
    rows = quick(pools, tmp_path, "--family", "small", "--trials", "0")
    kinds = [row["kind"] for row in rows if row["workload"] == "diabetes_100"]
    assert {kind: kinds.count(kind) for kind in kinds} == {"summary": 1, "grid": 4, "fresh": 2, "untuned": 2}
    assert json.loads((tmp_path / "pools_small.json").read_text())["rows"] == rows
    assert set(pools.summaries(tmp_path, family="small")) == {"breast_cancer_60", "diabetes_100"}
    assert pools.summaries(tmp_path) == {}
    points = {(row["lr"], row["weight_decay"]) for row in rows if row["kind"] == "grid"}
    of_adamw = {(lr, wd) for lr in (1e-4, 0.316228) for wd in (1e-4, 10.0)}
    assert points == of_adamw | {(lr, wd) for lr in (3.16228e-4, 1.0) for wd in (1e-6, 0.1)}
    untuned = {(row["workload"], row["lr"], row["weight_decay"]) for row in rows if row["kind"] == "untuned"}
    assert untuned == {("breast_cancer_60", 1e-3, 0.01), ("diabetes_100", 0.1, 0.0)}
    assert "diabetes_100" in capsys.readouterr().out


def test_a_reference_s_weight_decay_is_that_of_torch():
    for name, (_, weight_decay) in pools.REFERENCE.items():
        assert inspect.signature(getattr(torch.optim, name)).parameters["weight_decay"].default == weight_decay


def test_the_untuned_loss_is_a_mean_over_fresh_seeds():
    grid, fresh = row("grid", 1.0, 1.0), row("fresh", 1.0, 2.0, initial_val=5.0, initial_test=4.0)
    ended = pools.summary([grid, fresh, row("untuned", 1.0, 2.0), row("untuned", 2.0, 5.0)])
    assert ended is not None and (ended["val_untuned"], ended["untuned"]) == (1.5, 3.5)
    assert "untuned" not in (pools.summary([grid, fresh]) or {})


@pytest.mark.slow
def test_invariance_reads_test_losses_on_unseen_seeds_only(tmp_path, capsys):
    quick(pools, tmp_path / "pools")
    words = ("--pools", str(tmp_path / "pools"))
    seen = quick(invariance, tmp_path / "seen", *words)
    unseen = quick(invariance, tmp_path / "unseen", *words, "--seed", "1000")
    assert all("test" not in row for row in seen)
    for rows, split in ((seen, "val"), (unseen, "test")):
        ends = [row for row in rows if row["kind"] == "summary"]
        assert [row["split"] for row in ends] == [split, split]
        assert all(row["regret"] > 0 and row["floor"] >= row["aim"] > 0 for row in ends)
        assert len([row for row in rows if row["kind"] == "run"]) == 8
    with pytest.raises(SystemExit):
        quick(invariance, tmp_path, "--seed", "999", "--seeds", "2")
    assert "regret" in capsys.readouterr().out


def test_invariance_of_the_small_family_reads_its_pools(tmp_path):
    quick(pools, tmp_path, "--family", "small", "--trials", "0")
    rows = quick(invariance, tmp_path, "--family", "small", "--pools", str(tmp_path), "--starts", "1")
    ends = [row for row in rows if row["kind"] == "summary"]
    assert [row["workload"] for row in ends] == ["breast_cancer_60", "diabetes_100"]
    assert all(row["regret"] > 0 for row in ends)
    assert (tmp_path / "invariance_small.json").is_file() and not (tmp_path / "invariance.json").exists()


def test_invariance_judges_the_worst_start_by_its_mean():
    def run(lr: float, seed: int, test: float | None):
        return {"start_lr": lr, "start_weight_decay": 0.1, "seed": seed, "test": test, "rollbacks": 1}

    rows = [run(1.0, 1000, 1.0), run(1.0, 1001, 1.4), run(2.0, 1000, 1.6), run(2.0, 1001, 1.0)]
    ended = invariance.summary("w", rows, {"l_star": 1.0, "sigma": 0.01, "l0": 3.0})
    assert (ended["start_lr"], ended["rollbacks"]) == (2.0, 4)
    assert [ended[name] for name in ("excess", "floor", "aim", "regret")] == pytest.approx([0.3, 0.12, 0.06, 1.25])
    lost = invariance.summary("w", [*rows, run(3.0, 1000, None)], {"l_star": 1.0, "sigma": 0.01, "l0": 3.0})
    assert lost["start_lr"] == 3.0 and math.isnan(lost["excess"])
    assert invariance.summary("w", rows, None)["regret"] is None
    assert invariance.overall([ended, ended])["regret"] == pytest.approx(1.25)
    assert invariance.overall([ended, lost])["regret"] is None
