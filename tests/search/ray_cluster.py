"""A local Ray of two CPUs for a module's tests."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator

import pytest

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'ray[tune]'")

# Ray 2.60 leaves what it opened of its own processes to the garbage collector, and its defaults announce their successors.
QUIET = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore:Tip. In future versions of Ray:FutureWarning"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
        ray.init(
            address="local",
            num_cpus=2,
            object_store_memory=80 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
        yield
        ray.shutdown()
        del os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"]
