import json
import math

import pytest
import torch

from experiments import pools, robustness
from experiments.arguments import parse
from experiments.robustness import CASES, SHORTEST, SPIKE, Case, not_a_number, shuffled, spike
from experiments.workloads import WORKLOADS, fit

STEPS = SHORTEST
CONTROL = Case()


def quick(out, *words: str):
    return robustness.main(parse(robustness.Args, ["--quick", "--steps", str(STEPS), "--out", str(out), *words]))


def losses(monkeypatch: pytest.MonkeyPatch, case: Case, name: str = "diabetes") -> list[float]:
    """The training losses that a tuner would be given, by a model that does not move."""
    seen = []

    def standing_still(task, lr, weight_decay, disturb, after_step):
        assert (lr, weight_decay) == (case.lr, case.weight_decay)
        return fit(
            task, task.make_optimizer(0.0, 0.0), lambda loss: seen.append(loss.item()), after_step, True, disturb
        )

    monkeypatch.setattr(robustness, "train_tuned", standing_still)
    row = robustness.tuned(WORKLOADS[name].build(0, steps=STEPS), case)
    assert row["nonfinite_weight_steps"] == 0
    return seen


def test_rows_summaries_and_counts_are_kept_and_runs_are_not_made_twice(tmp_path, monkeypatch, capsys):
    pools.main(parse(pools.Args, ["--quick", "--out", str(tmp_path / "pools")]))
    words = ("--pools", str(tmp_path / "pools"), "--cases", "lr_100", "nan")
    rows = quick(tmp_path, *words)
    kinds = [row["kind"] for row in rows]
    assert {kind: kinds.count(kind) for kind in kinds} == {"summary": 4, "overall": 2, "run": 4}
    assert json.loads((tmp_path / "robustness.json").read_text())["rows"] == rows
    by = {(row["workload"], row["case"]): row for row in rows if row["kind"] != "run"}
    assert by["diabetes", "nan"]["passed_over"] == 5 and by["all", "nan"]["passed_over"] == 10
    assert by["all", "lr_100"]["nonfinite_weight_steps"] == 0
    assert (
        by["diabetes", "nan"]["excess"] / by["diabetes", "nan"]["bound"] == by["diabetes", "nan"]["excess_over_floor"]
    )
    assert all("test" not in row for row in rows)

    monkeypatch.setattr(robustness, "tuned", lambda *_: pytest.fail("a finished run was run again"))
    assert quick(tmp_path, *words) == rows
    assert "lr_100" in capsys.readouterr().out


def test_unseen_seeds_read_the_test_set(tmp_path):
    rows = quick(tmp_path, "--seed", "1000", "--cases", "nan", "--workloads", "diabetes")
    assert [row["split"] for row in rows if row["kind"] != "run"] == ["test", "test"]
    assert all(math.isfinite(row["test"]) for row in rows if row["kind"] == "run")


@pytest.mark.parametrize(
    "words",
    [
        ("--workloads", "nothing"),
        ("--family", "large"),
        ("--cases", "nothing"),
        ("--seeds", "0"),
        ("--jobs", "0"),
        ("--seed", "999", "--seeds", "2"),
        ("--steps", str(SHORTEST - 1)),
        ("--steps", "-5"),
    ],
)
def test_bad_arguments_end_before_any_work(tmp_path, monkeypatch, words):
    monkeypatch.setattr(robustness, "sweep", lambda *_: pytest.fail("work began"))
    with pytest.raises(SystemExit, match=words[0]):
        quick(tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("steps", [SHORTEST, 1500])
def test_every_disturbance_has_a_step_of_its_own(name, steps):
    at = CASES[name].at(steps)
    assert len(at) == sum(n for _, _, n in CASES[name].events)
    assert all(1 <= step <= steps for step in at)


def test_spikes_and_nans_reach_the_loss_at_their_steps_and_nothing_else_changes(monkeypatch):
    usual = losses(monkeypatch, CONTROL)
    case = Case(events=((spike, 2, 1), (not_a_number, 0.1, 2), (spike, 1.0, 1)))
    seen = losses(monkeypatch, case)
    assert [i + 1 for i, loss in enumerate(seen) if math.isnan(loss)] == [5, 6]
    assert [i + 1 for i, loss in enumerate(seen) if loss > 1000 * usual[i]] == [2, STEPS]
    expected = [SPIKE * loss if i + 1 in (2, STEPS) else loss for i, loss in enumerate(usual)]
    assert seen[:4] + seen[6:] == pytest.approx(expected[:4] + expected[6:], rel=1e-6)


@pytest.mark.parametrize("name", ["char_gpt", "matrix_factorisation"])
def test_inputs_that_are_codes_give_a_loss_that_is_no_number(monkeypatch, name):
    seen = losses(monkeypatch, Case(events=((not_a_number, 3, 1),)), name)
    assert [i + 1 for i, loss in enumerate(seen) if math.isnan(loss)] == [3]


def test_shuffled_targets_are_the_same_ones_in_another_order():
    x, y = batch = next(WORKLOADS["diabetes"].build(0).batches())
    (x2, y2), factor = shuffled(batch, 7)
    assert factor == 1 and torch.equal(x, x2) and not torch.equal(y, y2)
    assert torch.equal(y.sort(0).values, y2.sort(0).values)
    assert torch.equal(y2, shuffled(batch, 7)[0][1])


def test_weights_that_are_no_numbers_are_counted(monkeypatch):
    """Without a tuner a NaN batch five steps from the end leaves NaN weights after five steps."""

    def plain(task, lr, weight_decay, disturb, after_step):
        return fit(task, task.make_optimizer(lr, 0.0), torch.Tensor.backward, after_step, True, disturb)

    monkeypatch.setattr(robustness, "train_tuned", plain)
    case = Case(events=((not_a_number, STEPS - 4, 1),))
    assert robustness.tuned(WORKLOADS["diabetes"].build(0, steps=STEPS), case)["nonfinite_weight_steps"] == 5
    assert robustness.tuned(WORKLOADS["diabetes"].build(0, steps=STEPS), CONTROL)["nonfinite_weight_steps"] == 0


def test_buffers_are_looked_at_too():
    model = torch.nn.BatchNorm1d(3)
    assert robustness.all_finite(model)
    model(torch.tensor([[math.inf, 0.0, 0.0], [0.0, 0.0, 0.0]]))
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert not robustness.all_finite(model)


def test_a_case_is_judged_by_its_mean_and_all_workloads_by_the_worst():
    def run(seed: int, test: float | None):
        same = {"seed": seed, "start_lr": 1e-3, "start_weight_decay": 1e-4, "rollbacks": 1, "passed_over": 2}
        return same | {"test": test, "nonfinite_weight_steps": 3}

    pool = {"l_star": 1.0, "sigma": 0.01, "l0": 3.0}
    good = robustness.of_case("v", "nan", [run(1000, 1.0), run(1001, 1.06)], pool)
    bad = robustness.of_case("w", "nan", [run(1000, 1.0), run(1001, 1.6)], pool)
    assert [bad[name] for name in ("excess", "bound", "excess_over_floor")] == pytest.approx([0.3, 0.12, 2.5])
    both = robustness.overall("nan", [good, bad])
    assert both["excess_over_floor"] == pytest.approx(2.5)
    assert [both[name] for name in ("runs", "rollbacks", "passed_over", "nonfinite_weight_steps")] == [4, 4, 8, 12]
    lost = robustness.of_case("w", "nan", [run(1000, 1.0), run(1001, None)], pool)
    assert robustness.overall("nan", [good, lost])["excess_over_floor"] is None
    unknown = robustness.of_case("w", "nan", [run(1000, 1.0)], None)
    assert unknown["excess"] is None and robustness.overall("nan", [good, unknown])["excess_over_floor"] is None
