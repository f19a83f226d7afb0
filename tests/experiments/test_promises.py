"""The promise of online tuning, in small: from four blind starts on unseen seeds, tuned beats untuned at every one of them, and
the ends lie within 10 % of each other."""

from __future__ import annotations

import math
import warnings

import pytest

from experiments import datasets, fashion_mnist

SEEDS = range(2000, 2004)


def keeps_the_promise(tuned: list[float], untuned: list[float]) -> None:
    assert all(math.isfinite(x) for x in tuned)
    assert all(not math.isfinite(y) or x < y for x, y in zip(tuned, untuned, strict=True)), (tuned, untuned)
    assert max(tuned) <= 1.1 * min(tuned), tuned


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_fashion_mnist():
    try:
        data = datasets.fashion_mnist(None)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    tuned, untuned = (
        [fashion_mnist.whole_loss(fashion_mnist.fit(data, m, s, 1500)[0], data.test) for s in SEEDS]
        for m in ("tuned", "untuned")
    )
    keeps_the_promise(tuned, untuned)
