"""tuner.best() on the stand-in for a GPU: a copy on the host that no hyperparameter step waits for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hypergrad
from tests.device.stand_in import DEVICE, NAME, stand_in

STEPS, EVERY = 40, 10


def trained(device: str, keep_best: bool, average: bool = True) -> tuple[nn.Module, Any, hypergrad.Tuner, list[int]]:
    """A run, and the waits of each of its steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)).double().to(device)
    x = torch.randn(64, 4, dtype=torch.float64).to(device)
    y = x.sum(1, keepdim=True)

    def val_loss() -> Tensor:
        with DEVICE.aside():
            return ((model(x[32:]) - y[32:]) ** 2).mean()

    sgd = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-3)
    tuner = hypergrad.Tuner(model, sgd, val_loss, every=EVERY, keep_best=keep_best, average=average)
    waits = []
    for _ in range(STEPS):
        DEVICE.clear()
        sgd.zero_grad()
        with DEVICE.aside():
            loss = ((model(x[:32]) - y[:32]) ** 2).mean()
        tuner.backward(loss)
        sgd.step()
        waits.append(sum(DEVICE.waits.values()))
    return model, val_loss, tuner, waits


@pytest.mark.slow
@pytest.mark.parametrize("average", [True, False])
def test_it_lies_on_the_host_and_no_step_waits_for_it(average: bool) -> None:
    with stand_in():
        waits = [trained(NAME, keep_best, average)[-1] for keep_best in (False, True)]
        model, val_loss, tuner, _ = trained(NAME, True, average)
        assert waits[0] == waits[1]
        assert DEVICE.on_their_way  # those of every new best
        before = [x.detach().cpu() for x in model.state_dict().values()]
        with tuner.best():
            assert not DEVICE.on_their_way
            assert val_loss().item() == tuner.best_val_loss
        assert all(torch.equal(x, y.cpu()) for x, y in zip(before, model.state_dict().values(), strict=True))
        tensors = tuner.state_dict()["best"]["tensors"]
        assert {x.device.type for x in tensors} == {"cpu"}
    here = trained("cpu", True, average)[2]
    assert here.best_step == tuner.best_step > EVERY
    for x, y in zip(tensors, here.state_dict()["best"]["tensors"], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=0)


@pytest.mark.slow
def test_a_state_waits_for_what_is_on_its_way() -> None:
    with stand_in():
        _, _, tuner, _ = trained(NAME, True)
        assert DEVICE.on_their_way
        state = tuner.state_dict()
        assert not DEVICE.on_their_way
        _, val_loss, other, _ = trained(NAME, True)
        other.load_state_dict(state)
        with other.best():
            assert val_loss().item() == tuner.best_val_loss
