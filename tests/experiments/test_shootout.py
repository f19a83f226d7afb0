import inspect
import json
import math

import numpy as np
import pytest
import torch

from experiments import figures, pools, results, rivals, searches, shootout
from experiments.arguments import parse
from experiments.workloads import RUNGS, WORKLOADS

POOL = {"l_star": 1.0, "l0": 3.0}
OF_PACKAGES = [name for name, method in rivals.METHODS.items() if method.package]


def quick(module, out, *words: str):
    return module.main(parse(module.Args, ["--quick", "--out", str(out), *words]))


def trial(loss: float | None, **more):
    return dict.fromkeys(RUNGS, loss) | {"test": loss} | more


def test_searches_end_with_what_their_stages_choose():
    rng = np.random.default_rng(0)
    trials = [trial(float(i)) for i in range(1, 65)] + [trial(None)] * 64
    for name, search in searches.SEARCHES.items():
        ended = searches.resample(search, trials, 50, rng)
        assert ended.shape == (50,), name
        if search.trials == 64:
            assert np.nanmax(ended) <= 20, name
    all_of_them = searches.best_of(len(trials))
    assert (searches.resample(all_of_them, trials, 5, rng) == 1).all()
    assert np.isnan(searches.resample(searches.best_of(2), [trial(None)] * 2, 3, rng)).all()
    # the trial that is best at the end looks bad at the first rung
    late = [trial(1.0, val_16th=9.0), *(trial(2.0) for _ in range(15))]
    assert (searches.resample(searches.first_rung(16, 4), late, 5, rng) == 2).all()
    assert (searches.resample(searches.best_of(16), late, 5, rng) == 1).all()


def test_a_search_costs_what_its_stages_train():
    assert searches.best_of(16).cost == 16
    assert searches.halving(16, 2).cost == pytest.approx(1 + 0.5 * 4)
    assert searches.halving(64, 4).stages == (("val_16th", 64), ("val_4th", 16), ("val", 4))
    assert searches.halving(64, 4).cost == pytest.approx(4 + 3 + 3)
    assert searches.first_rung(16, 1).cost == pytest.approx(1 + 15 / 16)


def test_the_defaults_are_those_of_torch():
    for name, (lr, weight_decay) in rivals.DEFAULTS.items():
        parameters = inspect.signature(getattr(torch.optim, name)).parameters
        assert (parameters["lr"].default, parameters["weight_decay"].default) == (lr, weight_decay)


def test_lost_runs_count_as_the_loss_before_training():
    regrets, lost = shootout.counted(np.array([1.5, math.nan, 1e30, math.inf]), POOL)
    assert regrets.tolist() == [1.5, 3.0, 3.0, 3.0]
    assert lost.tolist() == [False, True, True, True]


def test_a_summary_is_over_workloads():
    rows = [
        shootout.of_workload("dog", workload, np.array(test), POOL, 1.0)
        for workload, test in (("diabetes", [1.0, 1.0]), ("cloning", [4.0, 2.0]))
    ]
    end = shootout.summary(rows)
    assert end["regret"] == pytest.approx(math.sqrt(2.5)) and end["worst"] == 2.5 and end["worst_run"] == 3
    assert (end["worst_workload"], end["lost"], end["regret_four"]) == ("cloning", 0.25, None)
    assert math.sqrt(2) < end["low"] < end["high"] < math.sqrt(3)


def test_hypergradient_descent_grows_lr_by_the_product_of_gradients():
    w = torch.nn.Parameter(torch.tensor([2.0, 1.0]))
    optimizer = rivals.HypergradientDescent(torch.optim.SGD([w], lr=0.1), beta=0.01)
    gradients = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0])
    for g in gradients:
        w.grad = g.clone()
        optimizer.step()
    assert optimizer.lr == pytest.approx(0.1 + 0.01 * (gradients[0] @ gradients[1]).item(), rel=1e-5)
    assert w.tolist() == pytest.approx([2 - 0.1 - 3 * optimizer.lr, 1 - 0.2 + optimizer.lr], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("workload", ["diabetes", "gru_mnist1d", "cnn_fashion"])
@pytest.mark.parametrize("name", [*OF_PACKAGES, "hd", "clarke"])
def test_every_rival_moves_every_parameter(name, workload, request):
    if rivals.installed(rivals.METHODS[name].package) is None:
        pytest.skip("not installed")
    try:
        task = WORKLOADS[workload].build(0, steps=24)
    except (FileNotFoundError, SystemExit, ImportError) as missing:
        pytest.skip(str(missing))
    before = {key: p.detach().clone() for key, p in task.model.named_parameters()}
    row = rivals.METHODS[name].train(task)
    assert set(row) >= {*RUNGS, "test", "seconds"}
    if name != "schedule_free" or workload != "diabetes":  # SGD with its default lr of 1 diverges there
        assert math.isfinite(row["test"])
        assert all((p != before[key]).any() for key, p in task.model.named_parameters())


def test_dog_and_schedule_free_are_evaluated_at_their_averages():
    task = WORKLOADS["mlp_digits"].build(0, steps=20)
    for name in ("dog", "schedule_free"):
        if rivals.installed(rivals.METHODS[name].package) is None:
            pytest.skip("not installed")
        task = WORKLOADS["mlp_digits"].build(0, steps=20)
        row = rivals.METHODS[name].train(task)
        assert row["test"] != task.evaluate("test")  # of the weights being trained


def test_a_shootout_goes_on_where_it_was_and_adds_methods(tmp_path, monkeypatch, capsys):
    quick(pools, tmp_path / "pools", "--trials", "4")
    words = ("--pools", str(tmp_path / "pools"), "--methods")
    first = quick(shootout, tmp_path, *words, "default")
    both = quick(shootout, tmp_path, *words, "hd")
    monkeypatch.setattr(shootout, "run", lambda item: pytest.fail("a finished run was run again"))
    again = quick(shootout, tmp_path, *words, "none")
    assert again == both == json.loads((tmp_path / "shootout.json").read_text())["rows"]
    assert [row for row in first if row["kind"] == "run"] == [row for row in both if row.get("method") == "default"][
        -4:
    ]
    ends = {row["method"]: row for row in both if row["kind"] == "summary"}
    assert set(ends) == {"default", "hd", "grid", "random_1", "random_4"}
    assert 0 < ends["grid"]["regret"] <= 1.001 and ends["grid"]["cost"] == 4
    assert all(row["workloads"] == 2 for row in ends.values())
    monkeypatch.setattr(shootout, "installed", lambda package: None if package else "")
    quick(shootout, tmp_path, *words, "dog")
    assert "dog is left out: dog-optimizer is not installed" in capsys.readouterr().out
    figures.shootout(both).savefig(tmp_path / "figure.png")


def test_the_small_family_stands_beside_its_own_grid(tmp_path):
    quick(pools, tmp_path, "--family", "small", "--trials", "0")
    rows = quick(shootout, tmp_path, "--family", "small", "--pools", str(tmp_path), "--methods", "default")
    ends = {row["method"]: row for row in rows if row["kind"] == "summary"}
    assert ends["grid"]["title"] == "grid of 4, its winner" and set(ends) == {"grid", "default"}
    assert {row["workload"] for row in rows if row["kind"] == "run"} == {"breast_cancer_60", "diabetes_100"}
    assert (tmp_path / "shootout_small.json").is_file()
    with pytest.raises(SystemExit, match="muon_mnist1d"):
        quick(shootout, tmp_path, "--workloads", "muon_mnist1d")


def test_the_committed_result_has_every_method_whose_runs_are_kept():
    """A call with some of the methods takes the others' rows from `shootout.jsonl`: without that file they would be gone."""
    rows = results.load("shootout.json")["rows"]
    kept = (results.FOLDER / "shootout.jsonl").read_text(encoding="utf-8").splitlines()
    methods = {json.loads(line)["method"] for line in kept}
    assert methods == {*rivals.METHODS, shootout.TPE} - {"clarke"}
    assert methods <= {row["method"] for row in rows if row["kind"] == "summary"}
    assert len(kept) == sum(row["kind"] == "run" for row in rows)


def test_optuna_reports_its_best_trial_by_validation():
    pytest.importorskip("optuna")
    row = rivals.tpe(lambda seed: WORKLOADS["diabetes"].build(seed, steps=20), seed=3, trials=3)
    assert row["gradient_evaluations"] == 60
    assert 1e-6 <= row["lr"] <= 10 and 1e-7 <= row["weight_decay"] <= 0.1
