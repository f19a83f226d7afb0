"""Steps of φ: slower where hypergradients disagree, and lr by Newton's step up, slowly down."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from hypergrad.core.hyperparameters import Hyperparameter
from hypergrad.differentiate.wrt import Entry
from hypergrad.online.outer_optimizer import OuterOptimizer
from hypergrad.online.policies import DEFAULT

ALL, NONE = torch.tensor([True]), torch.tensor([False])


class Numbers:
    """What an outer optimizer reads and writes of a vector of numbers, with φ from 0 and no bounds."""

    def __init__(self, lr: list[bool], scaled: list[bool] | None = None):
        k = len(lr)
        self.phi, self.moving, self.given = torch.zeros(k, dtype=torch.float64), list(range(k)), [False] * k
        self.is_lr, self.scaled = torch.tensor(lr), torch.tensor([True] * k if scaled is None else scaled)
        self.low, self.high = torch.full((k,), -math.inf), torch.full((k,), math.inf)
        self.entries = [Entry("lr" if x else "weight_decay", (i,), i, "", None) for i, x in enumerate(lr)]
        self.kinds = [Hyperparameter(kind="positive")] * k

    def __len__(self) -> int:
        return len(self.phi)

    @property
    def value(self) -> torch.Tensor:
        return self.phi.exp()

    def pairs(self, *_) -> list[tuple[int, int]]:
        return []

    def tuned_mask(self) -> torch.Tensor:
        mask = torch.zeros(len(self), dtype=torch.bool)
        mask[self.moving] = True
        return mask

    def called(self, name: str, optimizer: int | None = None) -> torch.Tensor:
        return torch.tensor([entry.name == name for entry in self.entries])

    def multiplied(self, mine: torch.Tensor, factor: float) -> torch.Tensor:
        return torch.where(mine, self.phi + math.log(factor), self.phi)

    def apply(self, phi: torch.Tensor) -> None:
        self.phi = phi


class Stepper:
    """An outer optimizer of such numbers."""

    def __init__(self, lr: list[bool], hyper_lr: float = 0.1, scaled: list[bool] | None = None):
        self.numbers = Numbers(lr, scaled)
        self.outer = OuterOptimizer(self.numbers, DEFAULT, hyper_lr)  # type: ignore[arg-type]

    def step(self, gradient: list[float], outgrown: torch.Tensor | None = None, newton: float = math.nan) -> float:
        """φ of the first number after one step."""
        k = len(self.numbers)
        outgrown = torch.zeros(k, dtype=torch.bool) if outgrown is None else outgrown
        log_c = torch.full((k,), newton, dtype=torch.float64)
        self.outer.step(torch.tensor(gradient, dtype=torch.float64), outgrown, log_c)
        return float(self.numbers.phi[0])


def walk(lr: bool, gradients: list[float], hyper_lr: float = 0.1, newton: float = math.nan) -> list[float]:
    """φ along the gradients, from 0."""
    stepper = Stepper([lr], hyper_lr)
    return [0.0, *(stepper.step([g], newton=newton) for g in gradients)]


def test_first_step_is_hyper_lr_long():
    assert walk(False, [3.0])[1] == pytest.approx(-0.1)
    assert walk(True, [-3.0])[1] == pytest.approx(0.1)
    assert walk(True, [3.0])[1] == pytest.approx(-0.05)


def test_lr_descends_at_half_the_pace_it_climbs_at_where_no_curvature_is_known():
    up, down = walk(True, [-1.0] * 12), walk(True, [1.0] * 12)
    assert up[-1] == pytest.approx(12 * 0.1)
    assert down[-1] == pytest.approx(-12 * 0.05)


@pytest.mark.parametrize(("newton", "climb"), [(math.log(1.5), math.log(1.5)), (math.inf, 0.7), (0.0, 0.01)])
def test_lr_climbs_by_newtons_step_within_bounds(newton, climb):
    assert walk(True, [-3.0], newton=newton)[-1] == pytest.approx(climb)
    assert walk(True, [3.0], newton=newton)[-1] == pytest.approx(-0.05)  # it is for climbing only
    assert walk(False, [-3.0], newton=newton)[-1] == pytest.approx(0.1)  # and for lr


def test_lr_descends_no_further_than_its_lead_below_its_mean():
    path = walk(True, [1.0] * 80, hyper_lr=1.0)
    for n in range(1, 80):
        mean = sum(math.exp(x) for x in path[:n]) / n
        assert path[n] >= min(path[n - 1], math.log(mean / 4)) - 1e-9
    assert path[-1] > math.log(1 / (4 * 80))


def test_numbers_without_a_logarithm_go_as_far_as_they_like():
    bound = walk(False, [-1.0] * 80, hyper_lr=1.0)
    free = Stepper([False], 1.0, [False])
    for _ in range(80):
        phi = free.step([-1.0])
    assert phi == pytest.approx(80)
    assert bound[-1] < 20


def test_where_training_was_chaotic_is_a_ceiling_that_rises_slowly():
    """By 0.01 · 1.5ⁿ in the n-th step after it."""
    stepper = Stepper([True])
    for _ in range(3):
        stepper.step([-1.0])
    top = ceiling = stepper.step([-1.0], ALL)
    for n in range(1, 30):
        phi = stepper.step([-1.0])
        assert phi <= ceiling + 1e-9
        ceiling += 0.01 * 1.5**n
    assert phi > top + 0.2


def test_a_step_down_in_chaos_is_one_however_far_lr_is_from_its_mean():
    stepper = Stepper([True], 1.0)
    assert [stepper.step([1.0], ALL) for _ in range(20)] == pytest.approx([-float(n) for n in range(1, 21)])


def test_lr_does_not_climb_on_a_hypergradient_of_zero():
    path = walk(True, [-1.0, -1.0, 0.0, 0.0], newton=math.log(1.5))
    assert path[2] > path[1] and path[2] == path[3] == path[4]


def test_multiplied_a_number_stays_free_to_move_and_is_not_climbing():
    """After a roll-back lr goes on from a quarter: what holds it is its mean, which is a quarter as well."""
    stepper = Stepper([True])
    for _ in range(4):
        phi = stepper.step([-1.0], newton=math.inf)
    outer = stepper.outer
    assert outer.climbing() and phi > math.log(1.3)
    before = float(outer.state["MeanTrustRegion"]["mean"])
    outer.multiply("lr", 0.25)
    outer.cap("lr", 2.0)
    cut = phi - math.log(4)
    assert float(stepper.numbers.phi) == pytest.approx(cut)
    assert float(outer.state["MeanTrustRegion"]["mean"]) == pytest.approx(before / 4)
    assert stepper.step([1.0]) < cut
    for _ in range(3):
        high = stepper.step([-1.0], newton=math.inf)
    assert cut < high < cut + math.log(2) + 0.1


def test_large_first_hypergradients_do_not_rule_for_long():
    """Ten times smaller from the tenth on: forty later their share of the second moment is 100 (10/50)⁴, less than a fifth."""
    path = walk(False, [10.0] * 10 + [-1.0] * 40)
    assert max(b - a for a, b in itertools.pairwise(path[30:])) == pytest.approx(0.1, rel=0.2)


def test_lr_climbs_no_further_than_its_lead_over_its_mean():
    path = walk(True, [-1.0] * 60, hyper_lr=1.0)
    for n in range(1, 60):
        mean = sum(math.exp(x) for x in path[:n]) / n
        assert path[n] <= max(path[n - 1], math.log(4 * mean)) + 1e-9


def test_lr_stops_climbing_at_the_first_disagreement():
    path = walk(True, [-1.0] * 10 + [0.1])
    assert path[-1] == path[-2]


def test_noise_slows_down():
    generator, stepper = torch.Generator().manual_seed(0), Stepper([False])
    for _ in range(100):
        stepper.step(torch.randn(1, generator=generator, dtype=torch.float64).tolist())
    assert float(stepper.outer.state["AgreementPace"]["pace"]) < 0.3


def test_what_is_not_tuned_stays_and_what_outgrew_the_weights_goes_down():
    stepper = Stepper([True, True])
    stepper.numbers.moving = [0]
    stepper.step([-1.0, -1.0], torch.tensor([True, False]))
    assert stepper.numbers.phi.tolist() == [pytest.approx(-0.1), 0.0]


def test_nan_moves_nothing():
    stepper = Stepper([False])
    assert stepper.step([math.nan]) == 0.0
    assert float(stepper.outer.state["AdamOnPhi"]["count"]) == 0


def test_a_number_begins_anew():
    stepper = Stepper([True, True])
    for _ in range(5):
        stepper.step([-1.0, -1.0], torch.tensor([True, False]))
    stepper.outer.restart(0)
    for name, state in stepper.outer.state.items():
        for key, x in state.items():
            fresh = Stepper([True, True]).outer.state[name][key]
            assert x[0] == fresh[0], (name, key)
    assert stepper.outer.state["AdamOnPhi"]["count"].tolist() == [0.0, 5.0]
