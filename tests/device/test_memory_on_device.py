"""What a tuner keeps on a device, and what it keeps on the host instead."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils._pytree import tree_leaves

import hypergrad
from tests.device.stand_in import DEVICE, NAME, OnDevice, stand_in


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


class Loop:
    """AdamW on the device, with one number tuned at a time."""

    def __init__(self, total: int) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 20)).to(NAME)
        self.n = sum(p.numel() for p in self.model.parameters())
        self.x, self.y = torch.randn(64, 20).to(NAME), torch.randn(64, 20).to(NAME)
        self.opt = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.tuner = hypergrad.Tuner(self.model, self.opt, lambda: self.loss(slice(32)), total_steps=total, cost=None)

    def loss(self, rows: slice) -> Tensor:
        return mse_loss(self.model(self.x[rows]), self.y[rows])

    def step(self) -> None:
        self.opt.zero_grad()
        with DEVICE.aside():
            loss = self.loss(slice(32, 64))
        self.tuner.backward(loss)
        self.opt.step()

    def copies(self) -> tuple[float, float]:
        """Of the weights, on the device and on the host; small tensors are left out."""
        users = [*self.model.parameters(), *(p.grad for p in self.model.parameters() if p.grad is not None)]
        users += [s for state in self.opt.state.values() for s in state.values() if isinstance(s, Tensor)]
        found = [f for f in kept(self.tuner, storages(users)).values() if f[1] > self.n]
        there, here = (sum(size for where, size in found if where is on) / (4 * self.n) for on in (True, False))
        return there, here


@pytest.mark.slow
def test_weights_to_go_back_to_lie_on_the_host() -> None:
    """On the device are the tangents of weights and both moments, the running average of the weights and its tangent, and the
    weights that the last step left. On the host two good states (moments in 16 bits), the weights at the lowest validation
    loss, those of best(), and in the first tenth of the run those before the first step."""
    with stand_in(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loop, early, late = Loop(1000), [], []
        for t in range(160):
            loop.step()
            if t % 7 == 0:
                (early if t < 115 else late).append(loop.copies())
    most = [tuple(max(x) for x in zip(*part, strict=True)) for part in (early, late)]
    assert most[0] == pytest.approx((3 + 2 + 1, 2 * 2 + 1 + 1 + 1), abs=0.1), most
    assert most[1] == pytest.approx((3 + 2 + 1, 2 * 2 + 1 + 1), abs=0.1), most


@pytest.mark.slow
@pytest.mark.parametrize("done", [15, 120])
def test_a_state_in_memory_is_not_written_to(done: int) -> None:
    with stand_in(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loop = Loop(200)
        for _ in range(done):
            loop.step()
        state = [x for x in tree_leaves(loop.tuner.state_dict()) if isinstance(x, Tensor)]
        before = [x.detach().cpu().clone() for x in state]
        for _ in range(30):
            loop.step()
        loop.tuner.state_dict()  # all that was on its way has arrived
        assert len(state) > 8
        assert all(torch.equal(x.detach().cpu(), y) for x, y in zip(state, before, strict=True))
