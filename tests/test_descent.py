"""Steps of φ: faster where hypergradients agree, slower where they do not, and lr more readily up than down."""

from __future__ import annotations

import math

import pytest
import torch

from hypergrad.descent import DOWN, LEAD, SLOWEST, Descent

ALL, NONE = torch.tensor([True]), torch.tensor([False])


def walk(climbs: bool, gradients: list[float], hyper_lr: float = 0.1) -> list[float]:
    """φ along the gradients, from 0."""
    descent, phi, path = Descent([climbs], hyper_lr), torch.zeros(1, dtype=torch.float64), [0.0]
    for g in gradients:
        phi = descent.step(phi, torch.tensor([g], dtype=torch.float64), ALL, NONE)
        path.append(float(phi))
    return path


def test_first_step_is_hyper_lr_long():
    assert walk(False, [3.0])[1] == pytest.approx(-0.1)
    assert walk(True, [-3.0])[1] == pytest.approx(0.1)
    assert walk(True, [3.0])[1] == pytest.approx(-0.1 * DOWN)


def test_lr_climbs_faster_and_faster_and_never_descends_so():
    up, down = walk(True, [-1.0] * 30), walk(True, [1.0] * 30)
    assert up[-1] > 3 * -down[-1] > 0
    assert -down[-1] == pytest.approx(30 * 0.1 * DOWN, rel=1e-6)


def test_lr_climbs_no_further_than_its_lead_over_its_mean():
    path = walk(True, [-1.0] * 60, hyper_lr=1.0)
    for n in range(1, 60):
        mean = sum(math.exp(x) for x in path[:n]) / n
        assert path[n] <= max(path[n - 1], math.log(LEAD * mean)) + 1e-9


def test_lr_stops_climbing_at_the_first_disagreement():
    path = walk(True, [-1.0] * 10 + [0.1])
    assert path[-1] == path[-2]


def test_noise_slows_down():
    generator = torch.Generator().manual_seed(0)
    descent = Descent([False], 0.1)
    phi = torch.zeros(1, dtype=torch.float64)
    for _ in range(100):
        phi = descent.step(phi, torch.randn(1, generator=generator, dtype=torch.float64), ALL, NONE)
    assert float(descent.pace) < 3 * SLOWEST


def test_what_is_not_tuned_stays_and_too_high_goes_down():
    descent, phi = Descent([True, True], 0.1), torch.zeros(2, dtype=torch.float64)
    g = torch.tensor([-1.0, -1.0], dtype=torch.float64)
    moved = descent.step(phi, g, torch.tensor([True, False]), torch.tensor([True, False]))
    assert moved.tolist() == [pytest.approx(-0.1), 0.0]


def test_nan_moves_nothing():
    descent = Descent([False], 0.1)
    phi = descent.step(torch.zeros(1, dtype=torch.float64), torch.tensor([math.nan]).double(), ALL, NONE)
    assert phi.tolist() == [0.0]
    assert float(descent.count) == 0
