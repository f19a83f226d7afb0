"""curvature="free": what it costs, what its hypergradient is, and that it changes nothing where nothing is to move."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import hypergrad
from hypergrad.online.low_rank_hessian import GAP, KEEP, RANK, LowRankHessian
from hypergrad.online.policies.lr_warm_start import LrSearch, LrWarmStart
from hypergrad.online.progress import gradient_evaluations
from tests.online.live_loops import data, mse, two_layers, validation

CURVATURES = torch.tensor([1.0, 0.3, 0.1])
RTOL = 1e-5  # float32, some tens of operations


class Bowl(nn.Module):
    """½ Σ h θ²; its validation loss is Σ θ."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))

    def forward(self) -> Tensor:
        return 0.5 * (CURVATURES * self.theta**2).sum()


def loop(model: nn.Module, optimizer: torch.optim.Optimizer, val_loss, steps: int, freeze: bool = False, **options):
    tuner = hypergrad.Tuner(model, optimizer, val_loss, **options)
    if freeze:
        tuner.freeze()
    for _ in range(steps):
        optimizer.zero_grad()
        tuner.backward(model())
        optimizer.step()
    return tuner


def test_the_hypergradient_is_that_of_the_stated_tangents():
    """z' = KEEP (z − η (Bz + g)) with B of the one product before them, along z: for a single v, B = y yᵀ/(yᵀv)."""
    lr, steps, model = 0.1, GAP + 5, Bowl()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    options = {"tune": {"lr": hypergrad.Hyperparameter(lr)}, "every": steps, "average": False, "curvature": "free"}
    tuner = loop(model, optimizer, lambda: model.theta.sum(), steps, **options)
    theta, z, b = torch.tensor([1.0, -2.0, 3.0]), torch.zeros(3), torch.zeros(3, 3)
    for t in range(steps):
        hz = b @ z
        if t == GAP:
            hz = CURVATURES * z
            b = torch.outer(hz, hz) / (hz @ z)
        z = KEEP * (z - lr * hz - lr * CURVATURES * theta)  # of log lr
        theta = theta - lr * CURVATURES * theta
    assert tuner.hypergradients["lr"].item() == pytest.approx(float(z.sum()) / lr, rel=RTOL)
    assert tuner.stats["hessian_products"] == 1


def test_b_is_exact_where_it_was_measured_and_never_negative():
    torch.manual_seed(0)
    secant, a = LowRankHessian(LrSearch(LrWarmStart(), False)), torch.randn(20, 20)
    h = a @ a.T
    for _ in range(2 * RANK):
        v = torch.randn(20)
        secant.learn(v, h @ v)
        measured = secant.times(v[None])[0]
        assert float(v @ measured) == pytest.approx(float(v @ h @ v), rel=1e-3)
    assert secant.u is not None and len(secant.u) <= RANK
    low = torch.linalg.eigvalsh(secant.times(torch.eye(20))).min()
    assert low > -1e-3
    before = float(v @ secant.times(v[None])[0])
    secant.learn(v, -v)  # negative curvature: B only shrinks
    assert 0 <= float(v @ secant.times(v[None])[0]) <= 0.5 * before * (1 + RTOL)
    secant.learn(v, v * float("nan"))
    assert bool(torch.isfinite(secant.times(torch.eye(20))).all())


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 2])
def test_a_run_of_1200_steps_costs_at_most_15_percent_more_than_plain(groups: int):
    steps = 1200
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    x, y = torch.randn(64, 4), torch.randn(64, 1)
    layers = (
        [{"params": model.parameters()}] if groups == 1 else [{"params": m.parameters()} for m in (model[0], model[2])]
    )
    optimizer = torch.optim.AdamW(layers, lr=1e-4)
    draws = torch.Generator().manual_seed(0)
    tuner = hypergrad.Tuner(model, optimizer, lambda: mse(model, (x, y)), total_steps=steps, curvature="free")
    for _ in range(steps):
        rows = torch.randint(64, (16,), generator=draws)
        optimizer.zero_grad()
        tuner.backward(mse(model, (x[rows], y[rows])))
        optimizer.step()
    assert tuner.stats["hyper_steps"] > 40
    assert gradient_evaluations(tuner.stats) <= 1.10 * steps + 2 * 30 * groups
    if groups == 1:
        assert gradient_evaluations(tuner.stats) <= 1.15 * steps


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_frozen_it_trains_as_if_it_were_not_there(kind):
    def trained(tuned: bool) -> Tensor:
        model = two_layers()
        optimizer = kind(model.parameters(), lr=1e-2, weight_decay=1e-3)
        tuner = hypergrad.Tuner(model, optimizer, validation(model), every=3, curvature="free") if tuned else None
        if tuner:
            tuner.freeze()
        torch.manual_seed(3)
        for batch in data()[0] * 4:
            optimizer.zero_grad()
            loss = mse(model, batch)
            tuner.backward(loss) if tuner else loss.backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(trained(True), trained(False))


def test_resumed_it_goes_on():
    def run(stop: int | None) -> list[float]:
        model = two_layers()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
        options = {"every": 5, "curvature": "free", "total_steps": 144}
        tuner = hypergrad.Tuner(model, optimizer, validation(model), **options)
        for step, batch in enumerate(data()[0] * 12):
            if step == stop:
                saved = tuner.state_dict(), optimizer.state_dict()
                tuner.close()
                optimizer = torch.optim.SGD(model.parameters(), lr=7.0, momentum=0.9, weight_decay=1e-4)
                optimizer.load_state_dict(saved[1])
                tuner = hypergrad.Tuner(model, optimizer, validation(model), **options)
                tuner.load_state_dict(saved[0])
            torch.manual_seed(step)
            optimizer.zero_grad()
            tuner.backward(mse(model, batch))
            optimizer.step()
        return [*tuner.values["lr"].tolist(), *tuner.values["weight_decay"].tolist(), tuner.val_loss]

    assert run(None) == run(95)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"curvature": "none"}, "'exact' or 'free'"),
        ({"curvature": "free", "mode": "unrolled"}, "mode='forward'"),
        ({"curvature": "free", "hypers": {"c": torch.tensor(1.0, requires_grad=True)}}, "hypers"),
    ],
)
def test_what_it_cannot_do_is_said_at_the_door(options, says: str):
    model = Bowl()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=says):
        hypergrad.Tuner(model, optimizer, model, **options)
    assert not optimizer._optimizer_step_pre_hooks
