"""The experiments on populations and the worked examples run, and say what they compare."""

from __future__ import annotations

from experiments import population, results, worked_examples
from experiments.arguments import parse


def test_population_measures_every_size_plain_and_tuned(tmp_path):
    rows = population.main(parse(population.Args, ["--quick", "--out", str(tmp_path)]))
    assert [(row["members"], row["tuned"]) for row in rows] == [(1, False), (2, False), (1, True), (2, True)]
    written = results.load("population.json", tmp_path)
    assert written is not None
    assert written["rows"] == rows


def test_worked_examples_compare_at_one_budget(tmp_path):
    rows = worked_examples.main(parse(worked_examples.Args, ["--quick", "--outer-steps", "1", "--out", str(tmp_path)]))
    assert len(rows) == 3 * len(worked_examples.EXAMPLES)
    for name in worked_examples.EXAMPLES:
        mine = {row["method"]: row for row in results.select(rows, {"example": name})}
        ours = mine["hypergrad"]
        assert (
            abs(mine["random search"]["gradient_evaluations"] - ours["gradient_evaluations"])
            <= ours["gradient_evaluations"] / 2
        )
        assert ours["wins"] == (ours["test"] < mine["random search"]["test"])
