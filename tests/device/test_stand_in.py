"""The stand-in for a GPU refuses and counts what a GPU would."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hypergrad.differentiate.checkpoints import Checkpoint
from hypergrad.optimizers.binding import State
from tests.device.stand_in import NAME, OnDevice, stand_in


def test_tensors_say_where_they_are_and_come_back() -> None:
    with stand_in():
        x = torch.randn(3, 2)
        y = x.to(NAME)
        assert isinstance(y, OnDevice) and y.device == torch.device(NAME, 0) and y.shape == (3, 2)
        assert not isinstance(y.cpu(), OnDevice) and torch.equal(y.cpu(), x)
        assert torch.zeros(2, device=NAME).device.type == torch.tensor([1.0], device=NAME).device.type == NAME
        with pytest.raises(TypeError, match="numpy"):
            y.numpy()


def test_host_tensors_are_refused() -> None:
    with stand_in():
        x, y = torch.ones(3, device=NAME), torch.ones(3)
        for meet in (
            lambda: x + y,
            lambda: x.addcmul_(y, x),
            lambda: torch.cat([x, y]),
            lambda: torch._foreach_add([x, x], [x, y]),
            lambda: torch._foreach_mul_([x], [y]),
            lambda: torch.where(y > 0, x, x),
            lambda: nn.Linear(3, 2)(x),
        ):
            with pytest.raises(RuntimeError, match="same device"):
                meet()


def test_single_numbers_and_indices_may_come_from_the_host() -> None:
    with stand_in() as device:
        x = torch.arange(4.0, device=NAME)
        assert (x * torch.tensor(2.0)).cpu().tolist() == [0, 2, 4, 6]
        device.clear()
        assert x[torch.tensor([1, 3])].host.tolist() == x[[1, 3]].host.tolist() == [1, 3]
        assert device.bytes_to_device == 2 * 2 * 8 and not device.waits


def test_kernels_are_counted_and_views_are_none() -> None:
    with stand_in() as device:
        xs = [torch.ones(4, device=NAME) for _ in range(5)]
        device.clear()
        _ = [x.view(2, 2).T[0].detach() for x in xs], torch.empty(3, device=NAME)
        assert sum(device.kernels.values()) == 0
        torch._foreach_mul_(xs, 2.0)
        assert sum(device.kernels.values()) == 1
        _ = [x + 1 for x in xs]
        assert sum(device.kernels.values()) == 6
        with device.aside():
            _ = xs[0] + 1
        assert sum(device.kernels.values()) == 6


@pytest.mark.parametrize(
    ("read", "nbytes"),
    [
        (lambda x: float(x.sum()), 4),
        (lambda x: x.tolist(), 12),
        (lambda x: bool((x > 0).all()), 1),
        (lambda x: torch.equal(x, x), 4),
        (lambda x: x.cpu(), 12),
        (lambda x: torch.empty(3).copy_(x), 12),
    ],
)
def test_what_is_read_is_a_wait(read, nbytes: int) -> None:
    with stand_in() as device:
        x = torch.ones(3, device=NAME)
        device.clear()
        read(x)
        assert (sum(device.waits.values()), device.bytes_to_host) == (1, nbytes)


@pytest.mark.parametrize("size", [lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: x.masked_select(x > 0)])
def test_a_size_that_depends_on_values_is_a_wait(size) -> None:
    with stand_in() as device:
        x = torch.ones(3, device=NAME)
        device.clear()
        size(x)
        assert sum(device.waits.values()) >= 1


def test_copies_to_the_device_are_counted_by_their_bytes() -> None:
    with stand_in() as device:
        torch.ones(3).to(NAME), torch.empty(3, device=NAME).copy_(torch.ones(3)), torch.tensor([1.0, 2.0], device=NAME)
        assert device.bytes_to_device == 12 + 12 + 8 and not device.waits


def test_a_model_moves_there_trains_and_is_copied() -> None:
    with stand_in():
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))
        twin = copy.deepcopy(model)
        model.to(NAME)
        for net, x in ((model, torch.ones(5, 3, device=NAME)), (twin, torch.ones(5, 3))):
            opt = torch.optim.SGD(net.parameters(), lr=0.1)
            net(x).square().mean().backward()
            opt.step()
        again = copy.deepcopy(model)
        for p, q, r in zip(model.parameters(), twin.parameters(), again.parameters(), strict=True):
            torch.testing.assert_close(p.cpu(), q)
            assert torch.equal(p, r) and p is not r


def test_digests_of_checkpoints_fit_into_64_bits() -> None:
    """`torch.hash_tensor` returns uint64, half of which `int` of a tensor refuses."""
    with stand_in():
        states = [torch.randn(7, generator=torch.Generator().manual_seed(i)).to(NAME) for i in range(40)]
        digests = [Checkpoint(State(x, {}, (0,)), []).digest() for x in states]
        assert all(0 <= d < 2**64 for d in digests) and any(d >= 2**63 for d in digests)
        assert len(set(digests)) == len(digests)
        assert digests[0] == Checkpoint(State(states[0].clone(), {}, (0,)), []).digest()
