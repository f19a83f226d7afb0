"""The comparison of two states of the code: it finds one bit, what is missing, what raises; and says "same" of what is."""

from __future__ import annotations

import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hypergrad
from experiments.same_numbers import __main__ as command
from experiments.same_numbers import names, sides
from experiments.same_numbers.cases import CASES, SLOW, chosen
from experiments.same_numbers.compare import compare, differences
from experiments.same_numbers.record import digest, exact
from experiments.same_numbers.sides import ROOT, checkout, outcomes

QUICK = ("loops/sgd_total_clip", "exact/unrolled_adam", "check/unrolled")
# what a changed default of the package does: appended to hypergrad/__init__.py
CHANGED = """
class _Changed(Tuner):
    def __init__(self, *args, hyper_lr=0.11, **options):
        super().__init__(*args, hyper_lr=hyper_lr, **options)


Tuner = _Changed
"""


def outcome(*steps: dict[str, Any], error: str | None = None, skipped: str | None = None) -> dict[str, Any]:
    return {"case": "a/b", "steps": list(steps), "error": error, "skipped": skipped, "seconds": 0.0}


def worktrees() -> str:
    words = ["git", "-C", str(ROOT), "worktree", "list"]
    try:
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git repository")


def test_one_bit_is_found_at_its_first_step():
    x = 0.1
    steps = [{"stats": {"steps": t}, "values": {"lr": [x, math.nan]}} for t in (1, 2, 3)]
    moved = [*steps[:1], {"stats": {"steps": 2}, "values": {"lr": [float(np.nextafter(x, 1)), math.nan]}}, *steps[2:]]
    assert compare(outcome(*steps), outcome(*steps)) == (True, "same, 3 steps")
    fine, text = compare(outcome(*steps), outcome(*moved))
    assert not fine
    assert text == "differs, first at step 2: values.lr[0]: 0.1 there, 0.10000000000000002 here"


def test_one_bit_of_weights_is_found():
    weights = torch.linspace(0, 1, 100)
    moved = weights.clone()
    moved[50] = torch.nextafter(moved[50], torch.tensor(1.0))
    assert digest([weights]) != digest([moved])
    assert exact({"x": weights}) != exact({"x": moved})
    assert exact({"x": weights[50:51]}) != exact({"x": moved[50:51]})
    assert exact(torch.zeros(3)) != exact(torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize(("old", "new"), [(0.0, -0.0), (1, 1.0), (math.nan, math.inf), (True, 1), ([1], [1, 1])])
def test_what_is_equal_in_python_is_not_yet_the_same(old: Any, new: Any):
    assert [*differences({"x": old}, {"x": new})] == [("x", old, new)]


def test_a_number_on_one_side_only_is_found():
    assert [*differences({"x": 1}, {"x": 1, "y": 2})] == [("y", "–", 2)]


def test_a_missing_case_is_found():
    fine, text = compare(outcome({"x": 1}), None)
    assert not fine and "not run here" in text
    fine, text = compare(None, outcome({"x": 1}))
    assert not fine and "not run there" in text


def test_more_steps_on_one_side_are_found():
    fine, text = compare(outcome({"x": 1}), outcome({"x": 1}, {"x": 2}))
    assert not fine and text == "differs: 1 steps there, 2 here"
    assert not compare(outcome(), outcome()).fine  # a case that records nothing holds nothing


def test_what_raises_on_one_side_is_found_with_its_message():
    fine, text = compare(outcome({"x": 1}, {"x": 2}), outcome({"x": 1}, error="ValueError: no such name"))
    assert not fine and "raises on one side" in text and "here after step 1: ValueError: no such name" in text
    fine, text = compare(outcome(error="ValueError: a"), outcome(error="ValueError: b"))
    assert not fine and "raises otherwise" in text
    fine, text = compare(outcome(error="ValueError: a"), outcome(error="ValueError: a"))
    assert not fine and text.startswith("error of the case") and "ValueError: a" in text


def test_what_is_skipped_on_both_sides_is_said_and_no_difference():
    assert compare(outcome(skipped="no data"), outcome(skipped="no data")) == (True, "skipped: no data")
    assert not compare(outcome(skipped="no data"), outcome({"x": 1})).fine


def test_the_status_is_that_of_the_comparison(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    worktrees()
    found = [{"check/unrolled": outcome({"x": 1.0})}, {"check/unrolled": outcome({"x": 1.0})}]
    monkeypatch.setattr(command, "outcomes", lambda *_: found)
    args = command.Args(cases=("check/unrolled",), quick=True)
    assert command.main(args)["check/unrolled"].fine
    found[1] = {"check/unrolled": outcome({"x": 2.0})}
    with pytest.raises(SystemExit) as left:
        command.main(args)
    assert left.value.code == 1
    assert "x: 1.0 there, 2.0 here" in capsys.readouterr().out


@pytest.mark.slow
def test_head_is_the_same_as_itself_and_a_change_is_found(tmp_path: Path):
    """Both in one run of two sides: the change moves hyperparameters, and nothing where none are moved."""
    worktrees()
    with checkout("HEAD") as base:
        other = tmp_path / "other"
        for package in ("hypergrad", "experiments"):
            shutil.copytree(base / package, other / package, ignore=shutil.ignore_patterns("results"))
        with (other / "hypergrad/__init__.py").open("a") as file:
            file.write(CHANGED)
        there, here = outcomes([base, other], QUICK, quick=True, jobs=1)
    verdicts = {name: compare(there[name], here[name]) for name in QUICK}
    assert verdicts["exact/unrolled_adam"].text == "same, 1 step"
    assert verdicts["check/unrolled"].text.startswith("same")
    changed = verdicts["loops/sgd_total_clip"]
    assert not changed.fine
    first = int(changed.text.removeprefix("differs, first at step ").split(":")[0])
    assert first >= 10 and "values" in changed.text  # the first hyperparameter step
    assert there["loops/sgd_total_clip"]["steps"][: first - 1] == here["loops/sgd_total_clip"]["steps"][: first - 1]


def test_the_checkout_goes_whatever_happens():
    worktrees()
    seen: list[Path] = []

    def interrupted() -> None:
        with checkout("HEAD") as base:
            assert (base / "hypergrad/__init__.py").exists() and str(base) in worktrees()
            seen.append(base)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not seen[0].exists()
    assert str(seen[0]) not in worktrees()
    with pytest.raises(SystemExit, match="no_such_commit"), checkout("no_such_commit"):
        pass


def test_a_line_cut_in_half_is_no_outcome(tmp_path: Path):
    file = tmp_path / "side.jsonl"
    file.write_text('{"case": "a/b", "steps": []}\n{"case": "a/c", "st')
    assert set(sides._read([file, tmp_path / "never written"])) == {"a/b"}


def test_renamed_names_are_found_by_either(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(names, "NAMES", {"hypergradient": "slope", "every": "interval", "spikes": "jumps"})
    assert names.public("slope") is hypergrad.hypergradient
    assert names.public("check") is hypergrad.check
    assert names.keywords(hypergrad.Tuner, {"interval": 5, "seed": 1}) == {"every": 5, "seed": 1}
    assert names.counts({"spikes": 2, "steps": 3}) == {"jumps": 2, "steps": 3}
    with pytest.raises(AttributeError, match="no public 'nothing'"):
        names.public("nothing")


def test_cases_are_chosen_by_group_name_or_pattern():
    assert chosen((), quick=False) == [*CASES]
    assert set(chosen((), quick=False)) - set(chosen((), quick=True)) == SLOW
    assert chosen(("check",), quick=True) == ["check/unrolled", "check/forward_clip"]
    assert chosen(("exact/forward_sg*", "check/unrolled"), quick=True) == ["exact/forward_sgd", "check/unrolled"]
    with pytest.raises(SystemExit, match="no case is called nothing"):
        chosen(("nothing",), quick=True)
