"""Steps of φ: slower where hypergradients disagree, and lr by Newton's step up, slowly down."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from hypergrad.online.outer_optimizer import DOWN, FURTHEST, GROW, LEAD, RELAX, SLOWEST, UPHILL, OuterOptimizer

ALL, NONE = torch.tensor([True]), torch.tensor([False])


def walk(climbs: bool, gradients: list[float], hyper_lr: float = 0.1, newton: float | None = None) -> list[float]:
    """φ along the gradients, from 0."""
    descent, phi, path = OuterOptimizer([climbs], hyper_lr), torch.zeros(1, dtype=torch.float64), [0.0]
    log_c = None if newton is None else torch.tensor([newton], dtype=torch.float64)
    for g in gradients:
        phi = descent.step(phi, torch.tensor([g], dtype=torch.float64), ALL, NONE, log_c)
        path.append(float(phi))
    return path


def test_first_step_is_hyper_lr_long():
    assert walk(False, [3.0])[1] == pytest.approx(-0.1)
    assert walk(True, [-3.0])[1] == pytest.approx(0.1)
    assert walk(True, [3.0])[1] == pytest.approx(-0.1 * DOWN)


def test_lr_descends_at_half_the_pace_it_climbs_at_where_no_curvature_is_known():
    up, down = walk(True, [-1.0] * 12), walk(True, [1.0] * 12)
    assert up[-1] == pytest.approx(12 * 0.1)
    assert down[-1] == pytest.approx(-12 * 0.1 * DOWN)


@pytest.mark.parametrize(
    ("newton", "climb"), [(math.log(1.5), math.log(1.5)), (math.inf, FURTHEST * 0.1), (0.0, SLOWEST * 0.1)]
)
def test_lr_climbs_by_newtons_step_within_bounds(newton, climb):
    assert walk(True, [-3.0], newton=newton)[-1] == pytest.approx(climb)
    assert walk(True, [3.0], newton=newton)[-1] == pytest.approx(-0.1 * DOWN)  # it is for climbing only
    assert walk(False, [-3.0], newton=newton)[-1] == pytest.approx(0.1)  # and for lr


def test_lr_descends_no_further_than_its_lead_below_its_mean():
    path = walk(True, [1.0] * 80, hyper_lr=1.0)
    for n in range(1, 80):
        mean = sum(math.exp(x) for x in path[:n]) / n
        assert path[n] >= min(path[n - 1], math.log(mean / LEAD)) - 1e-9
    assert path[-1] > math.log(1 / (LEAD * 80))


def test_numbers_without_a_logarithm_go_as_far_as_they_like():
    bound = walk(False, [-1.0] * 80, hyper_lr=1.0)
    descent, phi = OuterOptimizer([False], 1.0, [False]), torch.zeros(1, dtype=torch.float64)
    for _ in range(80):
        phi = descent.step(phi, torch.tensor([-1.0]).double(), ALL, NONE)
    assert float(phi) == pytest.approx(80)
    assert bound[-1] < 20


def test_where_training_was_chaotic_is_a_ceiling_that_rises_slowly():
    descent, phi, up = OuterOptimizer([True], 0.1), torch.zeros(1, dtype=torch.float64), torch.tensor([-1.0]).double()
    for _ in range(3):
        phi = descent.step(phi, up, ALL, NONE)
    top = float(descent.step(phi, up, ALL, ALL))
    phi, ceiling = torch.tensor([top], dtype=torch.float64), top
    for n in range(1, 30):
        phi = descent.step(phi, up, ALL, NONE)
        assert float(phi) <= ceiling + 1e-9
        ceiling += 0.1 * RELAX * GROW**n
    assert float(phi) > top + 0.2


def test_a_step_down_in_chaos_is_one_however_far_lr_is_from_its_mean():
    descent, phi, path = OuterOptimizer([True], 1.0), torch.zeros(1, dtype=torch.float64), [0.0]
    for _ in range(20):
        phi = descent.step(phi, torch.tensor([1.0]).double(), ALL, ALL)
        path.append(float(phi))
    assert path == pytest.approx([-float(n) for n in range(21)])


def test_lr_does_not_climb_on_a_hypergradient_of_zero():
    path = walk(True, [-1.0, -1.0, 0.0, 0.0], newton=math.log(1.5))
    assert path[2] > path[1] and path[2] == path[3] == path[4]


def test_multiplied_a_number_stays_free_to_move_and_is_not_climbing():
    """After a roll-back lr goes on from a quarter: what holds it is its mean, which is a quarter as well."""
    descent, phi = OuterOptimizer([True], 0.1), torch.zeros(1, dtype=torch.float64)
    for _ in range(4):
        phi = descent.step(phi, torch.tensor([-1.0]).double(), ALL, NONE, torch.tensor([math.inf]).double())
    assert bool(descent.climbing(phi)) and float(phi) > math.log(UPHILL)
    before, cut = float(descent.mean), phi - math.log(4)
    descent.turn(ALL, 0.25)
    descent.cap(ALL, cut + math.log(2))
    assert float(descent.mean) == pytest.approx(before / 4)
    assert float(descent.step(cut, torch.tensor([1.0]).double(), ALL, NONE)) < float(cut)
    high = cut
    for _ in range(3):
        high = descent.step(high, torch.tensor([-1.0]).double(), ALL, NONE, torch.tensor([math.inf]).double())
    assert float(cut) < float(high) < float(cut) + math.log(2) + 0.1


def test_large_first_hypergradients_do_not_rule_for_long():
    """Ten times smaller from the tenth on: forty later their share of the second moment is 100 (10/50)⁴, less than a fifth."""
    path = walk(False, [10.0] * 10 + [-1.0] * 40)
    assert max(b - a for a, b in itertools.pairwise(path[30:])) == pytest.approx(0.1, rel=0.2)


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
    descent = OuterOptimizer([False], 0.1)
    phi = torch.zeros(1, dtype=torch.float64)
    for _ in range(100):
        phi = descent.step(phi, torch.randn(1, generator=generator, dtype=torch.float64), ALL, NONE)
    assert float(descent.pace) < 3 * SLOWEST


def test_what_is_not_tuned_stays_and_too_high_goes_down():
    descent, phi = OuterOptimizer([True, True], 0.1), torch.zeros(2, dtype=torch.float64)
    g = torch.tensor([-1.0, -1.0], dtype=torch.float64)
    moved = descent.step(phi, g, torch.tensor([True, False]), torch.tensor([True, False]))
    assert moved.tolist() == [pytest.approx(-0.1), 0.0]


def test_nan_moves_nothing():
    descent = OuterOptimizer([False], 0.1)
    phi = descent.step(torch.zeros(1, dtype=torch.float64), torch.tensor([math.nan]).double(), ALL, NONE)
    assert phi.tolist() == [0.0]
    assert float(descent.count) == 0
