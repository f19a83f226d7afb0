"""Numbers that move together, Newton's step of lr, and the range of weight decay."""

from __future__ import annotations

import math

import pytest
import torch

import hypergrad
from tests.online.live_loops import CURVATURES, Bowl

STEPS = 12


def tuner_of(optimizer: torch.optim.Optimizer, model: torch.nn.Module, tune, **options) -> hypergrad.Tuner:
    return hypergrad.Tuner(model, optimizer, model, tune=tune, warm_start=False, every=1000, **options)


def step(tuner: hypergrad.Tuner, gradient: torch.Tensor, outgrown: torch.Tensor | None = None) -> None:
    """A hyperparameter step from dL/dφ, with no Newton step known."""
    none = torch.zeros(len(gradient), dtype=torch.bool)
    newton = torch.full((len(gradient),), math.nan, dtype=torch.float64)
    tuner._loop.outer.step(gradient, none if outgrown is None else outgrown, newton)


def trained(tuner: hypergrad.Tuner, steps: int = STEPS) -> hypergrad.Tuner:
    for _ in range(steps):
        tuner.optimizers[0].zero_grad()
        tuner.backward(tuner.model())
        tuner.optimizers[0].step()
    return tuner


def test_reset_is_the_start_whatever_came_between() -> None:
    model = Bowl()
    vector = tuner_of(torch.optim.SGD(model.parameters(), lr=0.1), model, ("lr",))._vector
    start, phi, slope = vector.value.clone(), vector.phi.clone(), vector.slope()
    for value in (0.5, 0.7):
        vector.put(0, value)
        assert vector.slope().tolist() == pytest.approx([value])  # dx/dlog x
    vector.reset()
    assert torch.equal(vector.value, start) and torch.equal(vector.phi, phi) and torch.equal(vector.slope(), slope)


@pytest.mark.parametrize("g", [1.0, -1.0])
def test_momentum_moves_at_a_fixed_lr_over_one_less_momentum(g):
    """A loss of lr/(1 − m) alone has no reason to move momentum; one of momentum alone leaves lr/(1 − m)."""
    model = Bowl()
    tuner = tuner_of(torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9), model, ("lr", "momentum"))
    hyper_vector, outer = tuner._vector, tuner._loop.outer
    # L = ± log(lr/(1 − m)): dL/dlog lr = ±1, dL/dlogit m = ± m
    step(tuner, torch.stack([torch.tensor(g).double(), g * hyper_vector.value[1]]))
    assert hyper_vector.value[1] == pytest.approx(0.9)
    assert hyper_vector.value[0] != pytest.approx(1e-2, rel=1e-3)
    before = float(hyper_vector.value[0] / (1 - hyper_vector.value[1]))
    outer.restart(0)
    step(tuner, torch.tensor([0.0, g]).double())
    lr, m = hyper_vector.value.tolist()
    assert (m < 0.9) == (g > 0) and m != 0.9
    assert lr / (1 - m) == pytest.approx(before)


def test_newtons_step_is_that_of_a_quadratic():
    """θ_t = (1 − lr h)^t θ₀, z = dθ_t/dlog lr = −t lr h (1 − lr h)^(t−1) θ₀, a = Σ h θ z, b = Σ h z²."""
    lr, model = 0.1, Bowl()
    tuner = trained(tuner_of(torch.optim.SGD(model.parameters(), lr=lr), model, ("lr",)))
    a = b = 0.0
    for t in range(1, STEPS):
        theta, z = (1 - lr * CURVATURES) ** t, -t * lr * CURVATURES * (1 - lr * CURVATURES) ** (t - 1)
        a += float((CURVATURES * theta * z).sum())
        b += float((CURVATURES * z * z).sum())
    tangents = tuner._loop.tangents
    assert tangents.curvature.take_newton().tolist() == pytest.approx([math.log(1 - a / b)], rel=1e-4)
    assert tangents.curvature.take_newton().isnan().all()


class Split(Bowl):
    """The same bowl in two parameters."""

    def __init__(self):
        super().__init__()
        self.theta, self.more = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(1))

    def forward(self) -> torch.Tensor:
        return 0.5 * (CURVATURES * torch.cat([self.theta, self.more]) ** 2).sum()


def newton(optimizers: int = 1, parts: int = 1, **options) -> list[float]:
    """c* − 1 of every lr, of a few tiny steps, so that it is the batches' alone and not that of where the steps led."""
    model = Split()
    groups = [[model.theta], [model.more]] if optimizers == 2 else [[model.theta, model.more]]
    sgds = [torch.optim.SGD(params, lr=1e-4) for params in groups]
    tuner = hypergrad.Tuner(model, sgds, model, tune=("lr",), warm_start=False, every=1000, **options)
    scaler = options.get("scaler")
    for _ in range(STEPS):
        for sgd in sgds:
            sgd.zero_grad()
        for _ in range(parts):
            loss = model() / parts
            tuner.backward(loss if scaler is None else scaler.scale(loss))
        if "clip_norm" in options:
            torch.nn.utils.clip_grad_norm_(model.parameters(), options["clip_norm"])
        for sgd in sgds:
            sgd.step() if scaler is None else scaler.step(sgd)
        if scaler is not None:
            scaler.update()
    return tuner._loop.tangents.curvature.take_newton().expm1().tolist()


def test_newtons_step_is_of_the_batch_whatever_is_done_to_its_gradient():
    plain = newton()
    assert newton(parts=3) == pytest.approx(plain, rel=1e-4)
    assert newton(scaler=torch.amp.GradScaler("cpu", init_scale=64.0)) == pytest.approx(plain, rel=1e-4)
    norm = math.sqrt(float((CURVATURES**2).sum()))
    # clipped to half, z is half as long: a is half, b a quarter
    assert newton(clip_norm=norm / 2) == pytest.approx([2 * plain[0]], rel=1e-2)


def test_every_lr_has_a_newton_step_of_its_own():
    """The bowl's parts do not see each other: c* − 1 = −a/b is as Σ h²/Σ h³ over each part."""

    def size(h: torch.Tensor) -> float:
        return float((h**2).sum() / (h**3).sum())

    (plain,) = newton()
    parts = [plain * size(h) / size(CURVATURES) for h in (CURVATURES[:2], CURVATURES[2:])]
    assert newton(optimizers=2) == pytest.approx(parts, rel=1e-3)


def test_several_lr_together_do_not_climb_too_far():
    """Whatever B ≥ 0 is, c of all together lowers a·(c − 1) + (c − 1)ᵀB(c − 1)/2, at least by half of what one alone would."""
    model = Split()
    sgds = [torch.optim.SGD(params, lr=1e-4) for params in ([model.theta], [model.more])]
    tangents = hypergrad.Tuner(model, sgds, model, tune=("lr",), warm_start=False)._loop.tangents
    a = torch.tensor([-1.0, -2.0]).double()
    for between in (0.0, 0.9, -0.9):
        b = torch.tensor([[1.0, between], [between, 1.0]]).double()
        tangents.curvature.sums = torch.cat([a.unsqueeze(1), b], dim=1)
        c = tangents.curvature.take_newton().expm1()
        assert c.tolist() == pytest.approx((-a / (1 + abs(between))).tolist())
        assert a @ c + c @ b @ c / 2 <= a @ c / 2 + 1e-12


@pytest.mark.parametrize("hits", [(True, False), (False, True), (True, True)])
def test_a_step_down_in_chaos_is_one(hits):
    """Momentum's at a fixed lr/(1 − m) would raise lr by nearly as much."""
    model = Bowl()
    tuner = tuner_of(torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9), model, ("lr", "momentum"))
    before = tuner._vector.phi.clone()
    step(tuner, torch.tensor([0.0, 0.0]).double(), torch.tensor(hits))
    down = (before - tuner._vector.phi).tolist()
    assert down == [pytest.approx(0.1 if hit else 0.0) for hit in hits]


def test_at_a_bound_of_lr_momentum_follows_its_own_hypergradient():
    model = Bowl()
    tune = {"lr": hypergrad.Hyperparameter(1e-2, bounds=(1e-4, 1e-2)), "momentum": None}
    tuner = tuner_of(torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.5), model, tune)
    for _ in range(20):
        m = float(tuner._vector.value[1])
        step(tuner, torch.tensor([-1.0, -m + 0.05]).double())
    assert tuner.values["lr"].item() == pytest.approx(1e-2)
    assert tuner.values["momentum"].item() > 0.6


def test_weight_decays_range_does_not_narrow_the_users_bounds():
    model, steps = Bowl(), 100
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, weight_decay=1e-4)
    tune = {"lr": hypergrad.Hyperparameter(1e-2), "weight_decay": hypergrad.Hyperparameter(bounds=(1e-5, 1e-4))}
    tuner = hypergrad.Tuner(model, optimizer, model, tune=tune, every=1000, total_steps=steps)
    tuner._loop.starts.hints = True
    trained(tuner, 40)
    for sign, end in ((1.0, 1e-5), (-1.0, 1e-4)):
        for _ in range(400):
            step(tuner, torch.tensor([0.0, sign]))
        assert tuner.values["weight_decay"].item() == pytest.approx(end, rel=0.1)


def test_a_reward_climbs_as_the_loss_does():
    found = []
    for maximize in (False, True):
        model = Bowl()
        tuner = tuner_of(torch.optim.SGD(model.parameters(), lr=0.1, maximize=maximize), model, ("lr",))
        for _ in range(STEPS):
            tuner.optimizers[0].zero_grad()
            tuner.backward(-model() if maximize else model())
            tuner.optimizers[0].step()
        found.append(tuner._loop.tangents.curvature.take_newton().item())
    assert found[0] > 0
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize(("sign", "end"), [(1.0, 0.01), (-1.0, 50.0)])
def test_weight_decay_stays_where_it_decays_something_but_not_all(sign, end):
    """D = Σ_t lr_t wd over what is left when its turn begins, after 30 % of 100 steps: 1e-2 × 70²/2 / 99 × wd."""
    model, steps = Bowl(), 100
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, weight_decay=1e-3)
    tune = {"lr": hypergrad.Hyperparameter(1e-2, bounds=(0.99e-2, 1.01e-2)), "weight_decay": None}
    tuner = hypergrad.Tuner(model, optimizer, model, tune=tune, every=1000, total_steps=steps)
    tuner._loop.starts.hints = True  # as after a warm start, with an lr that is known here
    trained(tuner, 40)
    for _ in range(300):
        step(tuner, torch.tensor([0.0, sign]))
    decayed = float(tuner.values["weight_decay"]) * 1e-2 * 70 * 71 / 2 / 99
    assert decayed == pytest.approx(end, rel=0.05)
