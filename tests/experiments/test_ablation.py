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
