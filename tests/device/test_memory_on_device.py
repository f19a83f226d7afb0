"""What a tuner keeps on a device, and what it keeps on the host instead."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import hypergrad
from tests.device.stand_in import DEVICE, NAME, OnDevice, stand_in

STEPS = 120


def kept(root: Any, left_out: set[int]) -> dict[int, tuple[bool, int]]:
    """By storage, of every tensor that hangs on the library's objects: whether it is on the device, and its bytes.

    Left out is what waits between `backward` and the step: it is gone before the next gradient is formed.
    """
    found, seen, todo = {}, set[int](), [root]
    while todo:
        x = todo.pop()
        if id(x) in seen:
            continue
        seen.add(id(x))
        if isinstance(x, Tensor):
            storage = (x.host if isinstance(x, OnDevice) else x).untyped_storage()
            if storage.data_ptr() not in left_out:
                found[storage.data_ptr()] = isinstance(x, OnDevice), storage.nbytes()
        elif isinstance(x, dict):
            todo += x.values()
        elif isinstance(x, list | tuple) or type(x).__name__ == "deque":
            todo += x
        elif type(x).__module__.startswith("hypergrad"):
            todo += [part for name, part in getattr(x, "__dict__", {}).items() if name != "pending"]
    return found


def storages(tensors: list[Tensor]) -> set[int]:
    return {(x.host if isinstance(x, OnDevice) else x).untyped_storage().data_ptr() for x in tensors}


@pytest.mark.slow
def test_weights_to_go_back_to_lie_on_the_host() -> None:
    """AdamW with one number tuned at a time: on the device the tangents of weights and both moments, the running average of the
    weights and its tangent, and the weights that the last step left. On the host two good states (moments in 16 bits), the
    weights at the lowest validation loss, and those of best()."""
    torch.manual_seed(0)
    with stand_in(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 20)).to(NAME)
        n = sum(p.numel() for p in model.parameters())
        x, y = torch.randn(64, 20).to(NAME), torch.randn(64, 20).to(NAME)
        opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
        tuner = hypergrad.Tuner(model, opt, lambda: mse_loss(model(x[:32]), y[:32]), total_steps=300, cost=None)
        most = {True: 0.0, False: 0.0}
        for t in range(STEPS):
            opt.zero_grad()
            with DEVICE.aside():
                loss = mse_loss(model(x[32:]), y[32:])
            tuner.backward(loss)
            opt.step()
            if t % 10 == 9:
                users = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)]
                users += [s for state in opt.state.values() for s in state.values() if isinstance(s, Tensor)]
                found = [f for f in kept(tuner, storages(users)).values() if f[1] > n]
                for there in most:
                    most[there] = max(most[there], sum(size for where, size in found if where is there) / (4 * n))
    assert 5.9 < most[True] < 6.1, most  # 3 + 2 + 1
    assert 5.9 < most[False] < 6.1, most  # 2 × 2 + 1 + 1
