"""The promise of online tuning, in small: from four blind starts on unseen seeds, tuned beats untuned at every one of them, and
the ends lie within 10 % of each other."""

from __future__ import annotations

import math
import warnings

import pytest

from experiments import datasets, fashion_mnist, noisy_quadratic
from experiments.workloads import WORKLOADS, train, train_tuned

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


@pytest.mark.slow
@pytest.mark.parametrize("problem", [noisy_quadratic.PROBLEMS[0], noisy_quadratic.PROBLEMS[3]], ids=str)
def test_noisy_quadratic(problem):
    """One seed, four starting values of lr: the loss differs between seeds by more than by its start."""
    tuned, untuned = (
        [noisy_quadratic.fit(problem, 2000, lr, m)[1]["final_loss"] for lr in (1e-5, 1e-3, 1e-1, 10.0)]
        for m in ("tuned", "untuned")
    )
    keeps_the_promise(tuned, untuned)


@pytest.mark.slow
def test_mnist1d():
    task = WORKLOADS["mlp_mnist1d"]
    tuned, untuned = (
        [run(task.build(2000), lr, wd)["test"] for lr, wd in ((1e-6, 1e-7), (1e-3, 0.1), (0.1, 1e-4), (10.0, 1e-3))]
        for run in (train_tuned, train)
    )
    keeps_the_promise(tuned, untuned)


@pytest.mark.slow
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
