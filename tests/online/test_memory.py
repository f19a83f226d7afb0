"""Memory of a tuned loop beyond that of a plain one, in vectors as long as the weights: counted, tensor by tensor."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

import hypergrad.optimizers.transition as steps
from experiments.price import Alive, net, stepper


def counted(optimizer: str, **options: Any) -> tuple[float, float]:
    """The most bytes alive in the first 25 steps, and those alive after them, over 4 n."""
    with warnings.catch_warnings(), Alive() as alive:
        warnings.simplefilter("ignore")
        model, loss = net(8, 2)
        step = stepper(model, loss, optimizer, **options)
        for _ in range(25):
            step()
        size = 4 * sum(p.numel() for p in model.parameters())
        return alive.peak / size, alive.now / size


@pytest.mark.parametrize(
    ("optimizer", "kept"),
    [
        # tangents, averages, two good states (slots in half as much), the start, the record, the weights as a step left them,
        # and the last gradient with its tangent, which may be added to
        ("AdamW", 3 + 2 + 4 + 1 + 1 + 1 + 2),
        ("SGD with momentum", 2 + 2 + 3 + 1 + 1 + 1 + 2),
    ],
)
def test_what_is_kept_between_steps_and_at_the_peak(optimizer: str, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "CHUNK", 8000)  # as long weights are worked on: a piece at a time
    plain = counted(optimizer)
    tuned = counted(optimizer, total_steps=1000)
    assert tuned[1] - plain[1] < kept + 0.1
    assert tuned[0] - plain[0] < kept + 2  # what a product takes in torch
