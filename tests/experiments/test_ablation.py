import math

import pytest

from experiments import ablation
from experiments.arguments import parse


def test_a_summary_is_of_paired_logarithms() -> None:
    """ρ = 0, 0, log 1.1, log 1.1: mean √1.1; standard error log 1.1/2 · √(4/3)/2, Student's t of 3 at 97.5 % is 3.182446."""
    pairs = [("a", 1.0, 1.0), ("a", 2.0, 2.0), ("b", 1.1, 1.0), ("b", 3.3, 3.0)]
    row = ablation.summary("Phases", "workloads", pairs)
    assert row["mean"] == pytest.approx(math.sqrt(1.1))
    error = math.log(1.1) / 2 * math.sqrt(4 / 3) / 2
    assert row["upper"] == pytest.approx(math.sqrt(1.1) * math.exp(3.182446 * error), rel=1e-6)
    assert (row["worst_workload"], row["lost"], row["removable"]) == ("b", 0, False)
    assert row["worst"] == pytest.approx(1.1)


def test_what_may_go_and_what_a_lost_run_does() -> None:
    better = [("a", 0.9 + 0.001 * i, 1.0) for i in range(8)]
    assert ablation.summary("Phases", "hot", better)["removable"]
    lost = ablation.summary("Phases", "hot", [*better, ("a", None, 1.0)])
    assert lost["lost"] == 1 and not lost["removable"]
    assert not ablation.summary("Phases", "hot", [("a", 0.5, 1.0)])["removable"]  # one run has no interval


def test_a_suite_may_be_for_some_policies() -> None:
    args = parse(ablation.Args, ["--suites", "low_momentum", "short", "--policies", "Phases", "MomentumStart"])
    made = {(item["suite"], item["without"]) for item in ablation.items(args)}
    assert made == {
        ("low_momentum", "nothing"), ("low_momentum", "MomentumStart"),
        ("short", "nothing"), ("short", "Phases"), ("short", "MomentumStart"),
    }  # fmt: skip
    rows = ablation.summarised(args, [item | {"val": 1.0} for item in ablation.items(args)])
    made = [(row["without"], row["suite"], row["runs"]) for row in rows]
    assert made == [
        ("Phases", "short", 8), ("Phases", "all", 8),
        ("MomentumStart", "low_momentum", 8), ("MomentumStart", "short", 8), ("MomentumStart", "all", 16),
    ]  # fmt: skip


@pytest.mark.parametrize(("suite", "momentum"), [("momentum", 0.9), ("low_momentum", 0.5)])
def test_where_momentum_begins(suite, momentum, monkeypatch) -> None:
    row = dict.fromkeys(("val", "end_lr", "end_weight_decay", "rollbacks", "seconds"), 1.0)

    def begun(task, lr, weight_decay, tune, disturb, **options) -> dict[str, float]:
        (group,) = task.make_optimizer(lr, weight_decay).param_groups
        return row | {"val": group["momentum"], "end_lr": "momentum" in tune}

    monkeypatch.setattr(ablation, "train_tuned", begun)
    items = ablation.items(parse(ablation.Args, ["--suites", suite]))
    item = next(item for item in items if item["workload"] == "diabetes")
    made = ablation.run(item)
    assert (made["val"], made["end_lr"]) == (momentum, True)


def test_a_run_on_the_quadratic() -> None:
    """The loss at the start is 3.743 in the mean, half the sum of the curvatures; lr begins 20 times too large."""
    args = parse(ablation.Args, ["--suites", "quadratic", "--policies", "NewtonClimb", "--steps", "100"])
    items = [item for item in ablation.items(args) if item["start_lr"] == 10 and item["workload"] == "p1_s1_T500"]
    assert [item["without"] for item in items] == ["nothing", "NewtonClimb"]
    with_it, without = map(ablation.run, items)
    assert 0 < with_it["val"] < 3.743 and with_it["end_lr"] < 2  # where plain steps are stable
    assert with_it["val"] != without["val"]


@pytest.mark.slow
def test_a_quick_sweep_is_kept_and_paired(tmp_path) -> None:
    args = parse(ablation.Args, ["--quick", "--out", str(tmp_path), "--policies", "NewtonClimb"])
    ablation.main(args)
    lines = (tmp_path / "ablation.jsonl").read_text().splitlines()
    assert len(lines) == 2 * 4 * 2  # with and without, four workloads, two starts
    before = (tmp_path / "ablation.json").read_text()
    ablation.main(args)
    assert (tmp_path / "ablation.jsonl").read_text().splitlines() == lines
    assert (tmp_path / "ablation.json").read_text() == before


@pytest.mark.parametrize(
    ("words", "what"),
    [(("--seed", "1000"), "below"), (("--suites", "no"), "choose"), (("--policies", "AdamOnPhi"), "choose")],
)
def test_bad_arguments(words, what, tmp_path) -> None:
    with pytest.raises(ValueError, match=what):
        ablation.main(parse(ablation.Args, ["--quick", "--out", str(tmp_path), *words]))
