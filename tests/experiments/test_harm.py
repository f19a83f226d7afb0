import json
import math
from contextlib import contextmanager

import pytest

import hypergrad
from experiments import harm, pools
from experiments.arguments import parse
from experiments.workloads import WORKLOADS, train_tuned


def quick(module, out, *words: str):
    return module.main(parse(module.Args, ["--quick", "--out", str(out), *words]))


def tuned(lr: float, seed: int, val: float | None, **more):
    return {"kind": "tuned", "start_lr": lr, "seed": seed, "val": val, "best_val": None, "rollbacks": 1} | more


UNTUNED = [{"kind": "untuned", "start_lr": 1e-3, "seed": seed, "val": val} for seed, val in ((0, 1.0), (1, 3.0))]
RUNS = [tuned(0.1, 0, 2.0), tuned(0.1, 1, 4.0), tuned(0.01, 0, 1.0), tuned(0.01, 1, 3.0)]
POOL = {"val_l_star": 2.0, "l_star": 1.0}


def test_rows_are_kept_and_test_losses_are_read_on_unseen_seeds_only(tmp_path, monkeypatch, capsys):
    quick(pools, tmp_path / "pools", "--family", "small", "--trials", "0")
    words = ("--pools", str(tmp_path / "pools"))
    seen, unseen = (quick(harm, tmp_path / seed, *words, "--seed", seed) for seed in ("0", "1000"))
    for rows, tests in ((seen, False), (unseen, True)):
        kinds = [row["kind"] for row in rows]
        assert {kind: kinds.count(kind) for kind in kinds} == {"summary": 2, "overall": 1, "untuned": 2, "tuned": 4}
        assert all(("test" in row) == tests for row in rows if row["kind"] in ("tuned", "untuned"))
        whole = next(row for row in rows if row["kind"] == "overall")
        assert 0 < whole["over_untuned"] <= whole["largest_over_untuned"] and whole["over_grid"] > 0
        assert (whole["test_over_winner"] is not None) == tests
    starts = {row["start_lr"] for row in seen if row["kind"] == "tuned"}
    assert starts == {1e-6, 0.1}
    assert {row["start_weight_decay"] for row in seen if row["kind"] == "tuned"} == {0.01, 1e-4}
    assert json.loads((tmp_path / "0" / "harm.json").read_text())["rows"] == seen

    monkeypatch.setattr(harm, "train_tuned", lambda *_, **__: pytest.fail("a finished run was run again"))
    assert quick(harm, tmp_path / "0", *words) == seen
    assert "worst workload" in capsys.readouterr().out


def test_an_untuned_run_has_the_initialisation_and_batches_of_the_tuned_one(monkeypatch):
    item = next(x for x in harm.items(parse(harm.Args, ["--quick"]), ("breast_cancer_60",)) if x["kind"] == "untuned")

    def noted(task, lr, weight_decay, **options):
        assert (lr, weight_decay) == (item["start_lr"], item["start_weight_decay"])
        return {"val": task.evaluate("val"), "batches": [y.tolist() for _, y in task.batches()]}

    monkeypatch.setattr(harm, "train", noted)
    monkeypatch.setattr(harm, "train_tuned", noted)
    untuned, same, other = (
        harm.run(item | {"kind": kind, "seed": s}) for kind, s in (("untuned", 0), ("tuned", 0), ("tuned", 1))
    )
    assert (untuned["val"], untuned["batches"]) == (same["val"], same["batches"])
    assert other["val"] != same["val"] and other["batches"] != same["batches"]


def test_ratios_of_made_up_rows():
    row = harm.summary("w", [*UNTUNED, *RUNS], POOL)
    assert (row["val"], row["untuned_val"], row["start_lr"], row["runs"], row["rollbacks"]) == (2.5, 2.0, 0.1, 4, 4)
    names = ("over_grid", "over_untuned", "worst_start", "worst_run")
    assert [row[name] for name in names] == [1.25, 1.25, 1.5, 2.0]
    assert row["best_over_grid"] is None and row["test_over_winner"] is None


def test_what_best_and_the_test_set_give():
    runs = [run | {"best_val": 1.0, "test": 2.0, "best_test": 0.5} for run in RUNS]
    row = harm.summary("w", [*UNTUNED, *runs], POOL)
    names = ("best_over_grid", "best_over_untuned", "test_over_winner", "best_test_over_winner")
    assert [row[name] for name in names] == [0.5, 0.5, 2.0, 0.5]


def test_all_workloads_have_a_geometric_mean_and_a_worst():
    good, bad = (
        harm.summary("v", [*UNTUNED, *RUNS], POOL),
        harm.summary("w", [*UNTUNED, *RUNS], {**POOL, "val_l_star": 1.0}),
    )
    whole = harm.overall([good, bad])
    assert whole["over_grid"] == pytest.approx(math.sqrt(1.25 * 2.5)) and whole["largest_over_grid"] == 2.5
    assert whole["largest_over_untuned"] == 1.25 and whole["best_over_grid"] is None


def test_a_run_without_a_number_is_not_left_out():
    row = harm.summary("w", [*UNTUNED, *RUNS, tuned(0.1, 0, None)], POOL)
    assert row["start_lr"] == 0.1 and row["worst_run"] is None
    assert math.isnan(row["over_grid"])
    assert harm.overall([row])["over_grid"] is None
    assert harm.summary("w", [*UNTUNED, *RUNS], None)["over_grid"] is None


def test_best_is_read_where_a_tuner_has_it(monkeypatch):
    def row():
        return train_tuned(WORKLOADS["breast_cancer_60"].build(0, steps=8), 1e-3, 0.01, at_best=True)

    @contextmanager
    def zeros(self):
        before = [p.detach().clone() for p in self.model.parameters()]
        for p in self.model.parameters():
            p.data.zero_()
        yield self.model
        for p, old in zip(self.model.parameters(), before):
            p.data.copy_(old)

    monkeypatch.setattr(hypergrad.Tuner, "best", zeros, raising=False)
    assert row()["best_val"] == pytest.approx(math.log(2), rel=1e-6)
    assert row()["best_test"] == pytest.approx(math.log(2), rel=1e-6)
    monkeypatch.setattr(hypergrad.Tuner, "best", None)
    assert row()["best_val"] is None


@pytest.mark.parametrize(
    "words", [("--family", "large"), ("--starts", "0"), ("--seeds", "0"), ("--seed", "999", "--seeds", "2")]
)
def test_bad_arguments_end_before_any_work(tmp_path, monkeypatch, words):
    monkeypatch.setattr(harm, "sweep", lambda *_: pytest.fail("work began"))
    with pytest.raises(SystemExit, match=words[0]):
        quick(harm, tmp_path / "out", *words)
