"""What is tuned when the length is known: the phases, their end, and what a frozen tuner leaves alone in each."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import hypergrad
from tests.online.live_loops import data, mse, two_layers, validation

TOTAL = 40


def train(model: nn.Module, val_loss, steps: int = TOTAL, freeze_at: int | None = None, loss=mse, lr=1e-3, **options):
    """A run of SGD under a tuner; yields the tuner after every step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, weight_decay=1e-1)
    tuner = hypergrad.Tuner(model, optimizer, val_loss, total_steps=TOTAL, every=2, **options)
    batches = data()[0]
    for step in range(steps):
        if step == freeze_at:
            tuner.freeze()
        optimizer.zero_grad()
        tuner.backward(loss(model, batches[step % len(batches)]))
        optimizer.step()
        yield tuner


@pytest.mark.parametrize("at", [0, 3, 11, 12])
def test_frozen_nothing_moves_in_any_phase(at):
    """Weight decay is sized when its own turn comes, after 12 steps; not by a tuner that was frozen before."""
    seen = []
    model = two_layers()
    for step, tuner in enumerate(train(model, validation(model), freeze_at=at)):
        if step >= at:
            seen.append([*tuner.values["lr"].tolist(), *tuner.values["weight_decay"].tolist()])
    assert all(values == seen[0] for values in seen)


def test_nothing_is_tuned_in_the_last_tenth_and_it_has_no_products():
    model, products, values, losses = two_layers(), [], [], []
    for tuner in train(model, validation(model)):
        products.append(tuner.stats["hessian_products"])
        values.append([*tuner.values["lr"].tolist(), *tuner.values["weight_decay"].tolist()])
        losses.append(tuner.val_loss)
    assert products[-5] > products[-7]
    assert products[-1] == products[-4]
    assert values[-1] == values[-5] != values[-9]
    assert losses[-1] != losses[-3]  # still looked at


def test_a_validation_loss_may_differentiate_to_the_end():
    """val_loss is called with gradients enabled, in every phase."""
    model = two_layers()
    x = torch.randn(5, 5)

    def penalty() -> Tensor:
        at = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(at).sum(), at, create_graph=True)
        return (slope**2).mean()

    assert [tuner.stats["steps"] for tuner in train(model, penalty)][-1] == TOTAL


def test_tensors_in_the_loss_rest_in_the_last_tenth():
    model, hypers = two_layers(), {"l2": hypergrad.Hyperparameter(torch.tensor(1e-2), kind="positive")}
    seen: list[float] = []
    live: dict[str, Tensor] = {}

    def loss(m: nn.Module, batch) -> Tensor:
        return mse(m, batch) + live.get("l2", hypers["l2"].start) * sum((p**2).sum() for p in m.parameters())

    for tuner in train(model, validation(model), tune=("lr",), hypers=hypers, loss=loss):
        live = tuner.hypers
        seen.append(tuner.values["l2"].item())
    assert seen[-1] == seen[-5] != seen[-9]


@pytest.mark.parametrize("mode", ["unrolled", "implicit"])
def test_modes_that_replay_come_to_the_end(mode):
    model = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, weight_decay=1e-3)
    tuner = hypergrad.Tuner(
        model, optimizer, validation(model), loss=mse, mode=mode, horizon=4, every=4, total_steps=TOTAL
    )
    batches = data()[0]
    values = []
    for step in range(TOTAL):
        tuner.step(batches[step % len(batches)])
        values.append(tuner.values["weight_decay"].tolist())
    assert values[-1] == values[-4]
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_lr_is_tuned_on_while_it_climbs_and_so_after_a_resume():
    """40 steps: its turn ends after 12, or after 32 where it is well above its mean so far."""
    ends = {}
    for lr, hyper_lr in ((1e-3, 1e-9), (1e-6, 0.1)):
        model, moving = two_layers(), []
        for tuner in train(model, validation(model), lr=lr, hyper_lr=hyper_lr, warm_start=False):
            moving.append(tuner._vector.entries[0].name == "lr" and 0 in tuner._vector.moving)
        ends[lr] = moving.index(False) + 1
    assert ends == {1e-3: 12, 1e-6: 32}


def test_what_is_tuned_is_part_of_the_state():
    model = two_layers()
    states = [tuner.state_dict() for tuner in train(model, validation(model), steps=20, lr=1e-6, warm_start=False)]
    other = two_layers()
    fresh = next(train(other, validation(other), steps=1, lr=1e-6, warm_start=False))
    fresh.load_state_dict(states[-1])
    assert fresh._vector.moving == states[-1]["vector"]["moving"] == [0]
    other = two_layers()
    early = next(train(other, validation(other), steps=1, warm_start=False))
    early.load_state_dict(states[-1] | {"vector": states[-1]["vector"] | {"moving": [1]}})
    assert early._vector.moving == [1]


@pytest.mark.parametrize("optimizers", [1, 2])
def test_the_first_step_beyond_total_steps_is_said_once(optimizers: int) -> None:
    """A loop of two epochs of 10 steps whose total_steps is that of one."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    x, y = torch.randn(16, 3), torch.randn(16, 1)
    parts = [[model.weight, model.bias]] if optimizers == 1 else [[model.weight], [model.bias]]
    sgds = [torch.optim.SGD(params, lr=0.01) for params in parts]

    def loss() -> torch.Tensor:
        return ((model(x) - y) ** 2).mean()

    tuner, said = hypergrad.Tuner(model, sgds, loss, total_steps=10, tune=("lr",)), []
    for _ in range(20):
        for sgd in sgds:
            sgd.zero_grad()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tuner.backward(loss())
            before = model.weight.detach().clone()
            for sgd in sgds:
                sgd.step()
        said.append([str(w.message) for w in caught if "total_steps" in str(w.message)])
        assert not torch.equal(before, model.weight)
    assert [t for t, sentences in enumerate(said) if sentences] == [10]
    assert "total_steps=10" in said[10][0] and "epochs * len(train_loader)" in said[10][0]
    assert "epochs * math.ceil(len(train_loader) / n)" in said[10][0]  # where gradients are accumulated


def test_as_an_error_it_comes_before_weights_change() -> None:
    model = torch.nn.Linear(3, 1)
    sgd = torch.optim.SGD(model.parameters(), lr=0.01)
    tuner = hypergrad.Tuner(model, sgd, lambda: (model.weight**2).sum(), total_steps=1, tune=("lr",))
    for step in range(2):
        sgd.zero_grad()
        tuner.backward((model(torch.ones(1, 3)) ** 2).sum())
        before = model.weight.detach().clone()
        if step == 0:
            sgd.step()
            continue
        with pytest.raises(UserWarning, match="total_steps"):  # pytest makes warnings errors
            sgd.step()
        assert torch.equal(before, model.weight)
