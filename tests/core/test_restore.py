"""A user's objects are put back, whatever happens inside."""

from __future__ import annotations

import contextlib
import random

import numpy as np
import torch
from torch import nn

from hypergrad.core.restore import Buffers, HostRng, Rng, all_params, as_found, swapped
from tests.problems import DEVICE


def test_rng_is_restored() -> None:
    device = torch.device(DEVICE)
    state = Rng(device)
    first = torch.rand(3), torch.rand(3, device=device)
    state.restore()
    again = torch.rand(3), torch.rand(3, device=device)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def model_and_optimizer() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).to(DEVICE)
    return model, torch.optim.SGD([nn.Parameter(torch.ones(2, device=DEVICE)), *model[0].parameters()], lr=0.1)


def test_all_params_are_those_of_optimizers_and_model_once_each() -> None:
    model, optimizer = model_and_optimizer()
    found = all_params(model, [optimizer])
    assert len(found) == len({id(p) for p in found}) == 5


def test_as_found() -> None:
    """Values, gradients, the tensors that modules hold as buffers, and random numbers."""
    model, optimizer = model_and_optimizer()
    params, norm = all_params(model, [optimizer]), model[1]
    params[0].grad = grad = torch.ones(2, device=DEVICE)
    values, rng = [p.detach().clone() for p in params], torch.get_rng_state()
    mean = norm.running_mean
    with contextlib.suppress(KeyboardInterrupt), as_found(model, [optimizer]):
        model(torch.randn(4, 2, device=DEVICE)).sum().backward()
        norm.running_mean = torch.full((3,), 7.0, device=DEVICE)
        with torch.no_grad():
            for p in params:
                p.zero_()
                p.grad = None
        raise KeyboardInterrupt
    assert all(torch.equal(p, x) for p, x in zip(params, values, strict=True))
    assert params[0].grad is grad and all(p.grad is None for p in params[1:])
    assert norm.running_mean is mean and not mean.any()
    assert torch.equal(rng, torch.get_rng_state())


def test_swapped() -> None:
    model, _ = model_and_optimizer()
    buffers = Buffers(model)
    old, new = buffers.now(), [b.clone() for b in buffers.now()]
    with contextlib.suppress(KeyboardInterrupt), swapped(buffers.slots, new):
        assert all(a is b for a, b in zip(buffers.now(), new, strict=True))
        raise KeyboardInterrupt
    assert all(a is b for a, b in zip(buffers.now(), old, strict=True))


def test_numpys_and_pythons_generators_are_restored() -> None:
    state = HostRng()
    first = np.random.rand(3), random.random()  # noqa: NPY002
    state.seed(2**40)
    state.restore()
    again = np.random.rand(3), random.random()  # noqa: NPY002
    assert (first[0] == again[0]).all() and first[1] == again[1]
