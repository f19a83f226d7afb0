import json
import math
import re

import pytest

from experiments import results
from scripts import tables

ROWS = [
    {"method": "a", "seed": 0, "loss": 1.0, "diverged": False},
    {"method": "a", "seed": 1, "loss": 4.0, "diverged": False},
    {"method": "a", "seed": 2, "loss": math.nan, "diverged": True},
    {"method": "b", "seed": 0, "loss": 2.0, "diverged": False},
]
GOALS = json.loads((results.FOLDER / "goals.json").read_text(encoding="utf-8"))
RETIRED = json.loads((results.FOLDER / "goals_retired.json").read_text(encoding="utf-8"))
LISTS = ("goals.json", "goals_retired.json")
FILES = sorted(path for path in results.FOLDER.glob("*.json") if path.name not in LISTS)


@pytest.fixture
def folder(tmp_path):
    results.write(tmp_path / "losses.json", "python -m experiments.losses", ROWS)
    return tmp_path


def goal(op: str, target: float, how: str, field: str | None = "loss", **where) -> dict:
    source = {"file": "losses.json", "filter": where, "field": field, "aggregate": how}
    return {"goal": "g", "op": op, "target": target, "reached": None, "met": False, "unit": "", "source": source}


def test_a_result_file_is_plain_json_with_nulls_for_numbers_that_are_not_finite(folder):
    text = (folder / "losses.json").read_text()
    result = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert list(result) == ["command", "environment", "rows"]
    assert result["rows"][2]["loss"] is None
    assert set(result["environment"]) == {"python", "torch", "hypergrad", "platform", "cpus", "device"}
    assert [path.name for path in folder.iterdir()] == ["losses.json"]  # no draft is left


@pytest.mark.parametrize(
    ("row", "reached", "met"),
    [
        (goal("<=", 2.5, "mean", method="a", diverged=False), 2.5, True),
        (goal("<", 2.5, "mean", method="a", diverged=False), 2.5, False),
        (goal("<=", 2.5, "mean", method="a"), None, False),  # a diverged run is not left out silently
        (goal(">", 2.0, "median", method="a", diverged=False), 2.5, True),
        (goal(">=", 4.0, "max", method="a", diverged=False), 4.0, True),
        (goal("<=", 0.9, "min", method="a", diverged=False), 1.0, False),
        (goal("==", 7.0, "sum", diverged=False), 7.0, True),
        (goal("==", 1, "count", None, method="a", diverged=True), 1, True),
        (goal("==", 0, "count", None, method="b", diverged=True), 0, True),
        (goal("<=", 1.0, "mean", method="c"), None, False),
    ],
)
def test_a_goal_is_recomputed_from_its_source(folder, row, reached, met):
    again = results.recompute(row, folder)
    assert (again["reached"], again["met"]) == (reached, met)
    assert list(again) == list(row)


def test_a_goal_whose_file_is_missing_is_not_met(tmp_path):
    assert results.recompute(goal("==", 0, "count", None), tmp_path)["met"] is False


def test_a_misspelt_field_or_aggregate_is_an_error(folder):
    with pytest.raises(KeyError, match="no row has a field 'methd'"):
        results.recompute(goal("<=", 1.0, "mean", methd="a"), folder)
    with pytest.raises(ValueError, match="unknown aggregate 'average'"):
        results.recompute(goal("<=", 1.0, "average"), folder)


@pytest.mark.parametrize("row", GOALS, ids=[row["goal"] for row in GOALS])
def test_committed_goals_are_as_their_sources_have_them(row):
    assert set(row) == {"goal", "op", "target", "reached", "met", "unit", "command", "source"}
    assert set(row["source"]) == {"file", "filter", "field", "aggregate"}
    assert results.recompute(row) == row, "run: python scripts/tables.py"


def test_a_retired_goal_names_its_successor_and_is_no_goal_any_more():
    for row in RETIRED:
        assert set(row) == {"goal", "op", "target", "reached", "met", "unit", "command", "successor"}
        assert row["met"] is results.OPS[row["op"]](row["reached"], row["target"])
        assert row["successor"]
    assert not {row["goal"] for row in RETIRED} & {row["goal"] for row in GOALS}


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_committed_results_have_flat_rows_and_name_no_machine(path):
    result = json.loads(path.read_text(encoding="utf-8"))
    assert set(result) == {"command", "environment", "rows"}
    assert result["rows"]
    assert all(isinstance(value, str | int | float | None) for row in result["rows"] for value in row.values())
    assert not re.search(r"/(home|root|work|tmp|Users)/", path.read_text(encoding="utf-8"))


def test_texts_and_figures_are_as_the_results_have_them():
    assert tables.differences(write=False) == [], "run: python scripts/tables.py"


def test_every_table_and_figure_is_shown_once():
    """What a result file has is in the texts: a page that is rewritten loses no table."""
    text = "".join(path.read_text(encoding="utf-8") for path in tables.TEXTS)
    shown = re.findall(r"<!-- table:(\w+) -->", text)
    assert sorted(shown) == sorted(("goals", "goals_retired", *tables.TABLES))
    assert all(f"figures/{name}.png" in text for name in tables.PLOTS)


def test_readme_is_short():
    assert len((tables.ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_a_block_is_replaced_and_the_text_around_it_stays(folder, monkeypatch):
    monkeypatch.setitem(tables.TABLES, "losses", lambda result: f"{len(result['rows'])} rows")
    text = "before\n<!-- table:losses -->\nold\n<!-- /table -->\nafter <!-- table:quickstart --><!-- /table -->"
    made = tables.fill(text, [], folder)
    assert made == (
        "before\n<!-- table:losses -->\n4 rows\n<!-- /table -->\n"
        "after <!-- table:quickstart -->\n*Not measured yet.*\n<!-- /table -->"
    )
    assert tables.fill(made, [], folder) == made


def test_the_fashion_mnist_table_counts_every_run():
    def row(method, loss):
        return {
            "method": method,
            "steps": 10_000,
            "test_loss": loss,
            "diverged": loss is None,
            "flops_ratio": 2.0,
            "seconds": 3.0,
        }

    rows = [row("tuned", 0.3), row("tuned", 0.5), row("untuned", 0.9), row("untuned", None)]
    made = tables.fashion_mnist({"command": "c", "environment": results.environment(), "rows": rows})
    assert "| hypergrad, lr and weight decay | 2 | 0.4000 | 0.4000 | 0.3000 | 0.5000 | 0 | 2.00× | 3.0 |" in made
    assert "| untuned | 2 | 0.9000 | 0.9000 | 0.9000 | 0.9000 | 1 | 2.00× | 3.0 |" in made


def test_the_fashion_mnist_table_has_each_loss_beside_the_grids_winner_at_its_whole_cost():
    same = {"steps": 10_000, "diverged": False, "flops_ratio": 1.0, "seconds": 2.0}
    grid = [same | {"method": "grid", "test_loss": loss, "averaged_test_loss": loss} for loss in (0.4, 0.5, 0.6)]
    three = {"test_loss": 0.34, "averaged_test_loss": 0.33, "replay_test_loss": 0.32, "replay_seconds": 2.5}
    tuned = same | {"method": "tuned", "flops_ratio": 2.0, "seconds": 8.0}
    rows = [*grid, same | {"method": "winner"} | three, tuned | three, tuned | three | {"replay_test_loss": None}]
    made = tables.fashion_mnist({"command": "c", "environment": results.environment(), "rows": rows})
    body = [line for line in made.splitlines() if line.startswith("|")][2:]
    assert body == [
        "| grid of 3, its winner | 1 | 0.3400 | 0.3400 | 0.3400 | 0.3400 | 0 | 3.00× | 6.0 |",
        "| hypergrad, lr and weight decay | 2 | 0.3400 | 0.3400 | 0.3400 | 0.3400 | 0 | 2.00× | 8.0 |",
        "| averaged weights: grid's winner | 1 | 0.3300 | 0.3300 | 0.3300 | 0.3300 | 0 | 3.00× | 6.0 |",
        "| averaged weights: hypergrad, lr and weight decay | 2 | 0.3300 | 0.3300 | 0.3300 | 0.3300 | 0 | 2.00× | 8.0 |",
        "| replayed on training + validation: grid's winner | 1 | 0.3200 | 0.3200 | 0.3200 | 0.3200 | 0 | 4.00× | 8.5 |",
        "| replayed on training + validation: hypergrad, lr and weight decay | 2 | 0.3200 | 0.3200 | 0.3200 | 0.3200 | 1 "
        "| 3.00× | 10.5 |",
    ]
