"""Settings of every test: one thread, seeded. Cases run on the device in HYPERGRAD_DEVICE (default cpu; see problems.py).

Tests that start Ray share one process under `pytest -n 2 --dist loadgroup`: a machine has one Ray at a time. So do
those that make git worktrees: git removes and makes their common folder as the last one goes and the first one comes;
and those that start processes for all tests of a file.
"""

import os
from collections.abc import Iterator

import pytest
import torch

from tests.unbounded import PLACE, without_clock

ALONE = {
    "ray": "test_ray",
    "worktrees": "test_same_numbers",
    "ranks": "test_distributed",
}  # group: how its files' names begin
torch.set_num_threads(1)
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # on a GPU, a replayed step is to be the recorded one
torch.backends.cudnn.deterministic = True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for group, start in ALONE.items():
            if item.path.name.startswith(start):
                item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(autouse=True)
def unbounded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tuner of this process reads a clock: runs repeat, with products in every step. The mark `clock` lets them."""
    if request.node.get_closest_marker("clock") is None:
        monkeypatch.setattr(PLACE, without_clock)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)
