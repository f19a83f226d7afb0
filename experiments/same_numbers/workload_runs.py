"""Tuned runs of experiments.workloads, from two starts, and of the protocol of experiments.fashion_mnist."""

from __future__ import annotations

from functools import partial

from experiments import datasets, fashion_mnist
from experiments.same_numbers.record import Recorder, Skip, weights
from experiments.same_numbers.watch import watched_tuners
from experiments.workloads import COMPARED, WORKLOADS, train_tuned

STARTS = {"low": (1e-5, 1e-5), "high": (0.1, 1e-3)}  # lr, weight decay
SMALL = ("noisy_digits_200_adamw", "random_labels")  # of the small family: these go back to earlier weights
TWO_OPTIMIZERS = ("muon_mnist1d",)
FASHION = ("tuned", "tuned_momentum")
QUICK, FASHION_STEPS = 60, 400


def workload(record: Recorder, quick: bool, *, name: str, start: str) -> None:
    needs_fashion(name)
    task = WORKLOADS[name].build(0, steps=QUICK if quick else None)
    with watched_tuners(record):
        row = train_tuned(task, *STARTS[start], at_best=True)
    record.add(row | {"weights": weights(task.model)})


def fashion(record: Recorder, quick: bool, *, method: str) -> None:
    needs_fashion("fashion")
    data = fashion_mnist.load(None, "cpu")
    with watched_tuners(record):
        found = fashion_mnist.fit(data, method, 0, QUICK if quick else FASHION_STEPS)
    average = None if found.average is None else weights(found.average)
    losses = {f"{split}_loss": fashion_mnist.whole_loss(found.model, getattr(data, split)) for split in ("val", "test")}
    record.add(found.row | losses | {"weights": weights(found.model), "average": average, "used": found.values[-1]})


def needs_fashion(name: str) -> None:
    """Raises Skip where the images are not on the machine; nothing is downloaded."""
    if "fashion" not in name:
        return
    try:
        datasets.find_fashion_mnist(None, download=False)
    except FileNotFoundError as error:
        raise Skip("Fashion-MNIST is not on this machine") from error


WORKLOAD_CASES = {
    f"{name}_{start}": partial(workload, name=name, start=start)
    for name in (*COMPARED, *SMALL, *TWO_OPTIMIZERS)
    for start in STARTS
}
FASHION_CASES = {method: partial(fashion, method=method) for method in FASHION}
