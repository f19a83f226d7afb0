"""The plain loop and every framework's give the same lr and the same weights, to the last digit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.integrations import runs
from tests.integrations.runs import STEPS, Job

LOOPS: dict[str, Callable[..., Job]] = {
    "Lightning": lambda job, folder: runs.lightning(job),
    "Lightning, manual": lambda job, folder: runs.lightning(job, manual=True),
    "Lightning, no scheduler": lambda job, folder: runs.lightning(job),
    "accelerate, no scheduler": runs.accelerate,
    "skorch, no scheduler": runs.skorch,
    "Trainer": runs.transformers,
    "accelerate": runs.accelerate,
    "skorch": runs.skorch,
}


@pytest.mark.parametrize("name", LOOPS)
def test_lr_and_weights_are_those_of_the_plain_loop(name: str, tmp_path: Path) -> None:
    pytest.importorskip({"Trainer": "transformers"}.get(name, name.split(",")[0].lower()))
    scheduled = "no scheduler" not in name
    same(runs.plain(Job(scheduled=scheduled)), LOOPS[name](Job(scheduled=scheduled), tmp_path))


@pytest.mark.parametrize("name", ["Lightning", "Trainer", "accelerate", "skorch"])
@pytest.mark.slow
def test_accumulation_is_that_of_the_plain_loop(name: str, tmp_path: Path) -> None:
    pytest.importorskip({"Trainer": "transformers"}.get(name, name.lower()))
    same(runs.plain(Job(accumulate=2)), LOOPS[name](Job(accumulate=2), tmp_path))


@pytest.mark.parametrize("name", [name for name in LOOPS if "," not in name])
@pytest.mark.slow
def test_without_clipping(name: str, tmp_path: Path) -> None:
    pytest.importorskip({"Trainer": "transformers"}.get(name, name.lower()))
    same(runs.plain(Job(clip=0.0)), LOOPS[name](Job(clip=0.0), tmp_path))


def same(one: Job, other: Job) -> None:
    assert len(one.used) == STEPS // one.accumulate
    assert max(one.used) > 1000 * 1e-4  # lr was found: its trajectory says something
    assert other.used == one.used
    assert all(torch.equal(a, b) for a, b in zip(one.weights, other.weights, strict=True))
    assert other.tuner.stats == one.tuner.stats and one.tuner.stats["changed_gradients"] == 0
    assert one.tuner.stats["plain_steps"] == 0 and one.tuner.stats["hyper_steps"] > 3
