"""The soak: a training that is killed goes on from what it kept, and memory is watched."""

import json
from pathlib import Path

import pytest

from experiments import soak
from experiments.arguments import parse


@pytest.mark.slow
def test_a_killed_training_ends_as_one_that_nothing_stopped(tmp_path: Path) -> None:
    soak.main(parse(soak.Args, ["--quick", "--out", str(tmp_path)]))
    kills, memory = json.loads((tmp_path / "soak.json").read_text())["rows"]
    assert kills["killed"] == 2 and kills["equal"] and kills["checkpoints_lost"] == 0
    assert memory["steps"] == 400 and memory["bytes"] > 0
