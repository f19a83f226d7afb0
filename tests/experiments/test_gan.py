import math

import pytest
import torch

from experiments.gan import GAN, energy_distance, fit, ring, with_ratios


def test_energy_distance_is_that_of_the_definition():
    x, y = torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.tensor([[3.0, 4.0], [3.0, 4.0]])
    assert float(energy_distance(x, y)) == pytest.approx(10.0)  # 2 · 5 − 0 − 0
    assert float(energy_distance(torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [1.0]]))) == pytest.approx(0.0)
    a, b = (ring(2000, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert abs(float(energy_distance(a, b))) < 0.01 < float(energy_distance(a, 2 * b))


def test_points_of_the_ring_lie_on_it():
    points = ring(4000, torch.Generator().manual_seed(0))
    assert float(points.norm(dim=1).mean()) == pytest.approx(1.0, abs=0.01)
    assert float(points.mean(0).norm()) < 0.05


def test_untrained_nets_have_the_losses_of_chance():
    """Logits near 0: 2 log 2 and log 2."""
    torch.manual_seed(0)
    model = GAN()
    assert float(model.loss_d(ring(512)).detach()) == pytest.approx(2 * math.log(2), rel=0.05)
    assert float(model.loss_g(512).detach()) == pytest.approx(math.log(2), rel=0.1)


def test_plain_run_keeps_its_lr_and_ratios_are_to_plain_runs_with_as_many_turns():
    _, row = fit(0, 1e-3, 2, 5, tuned=False)
    assert (row["lr_d"], row["lr_g"], row["passed_over"]) == (1e-3, 1e-3, 0)
    rows = [
        {"method": m, "turns": t, "distance": d}
        for m, t, d in [("plain", 1, 2.0), ("plain", 5, 1.0), ("tuned", 5, 3.0)]
    ]
    assert [r["ratio"] for r in with_ratios(rows)] == [1.0, 1.0, 3.0]
