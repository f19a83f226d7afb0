"""Loops that write to weights or gradients by hand, between what autograd and the optimizer do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.online.live_loops import Backward
from tests.online.loop_rows import SAID, SUPPORTED, Live, N, Row
from tests.online.loops_steps import batches, ce, each, net, plain_step, sgd

Batch = tuple[Tensor, Tensor]


def then(change: Callable[[nn.Module, int], None], make: Callable[[nn.Module], Any] = sgd) -> Any:
    """A step, and what is done to the weights after it."""

    def step(model: nn.Module, opt: Any, backward: Backward, t: int, batch: Batch) -> None:
        plain_step(model, opt, backward, t, batch)
        if t < N - 1:  # the last validation loss is read before it
            change(model, t)

    return each(step, make)


def gradients_changed(change: Callable[[nn.Module, int], None]) -> Any:
    def step(model: nn.Module, opt: Any, backward: Backward, t: int, batch: Batch) -> None:
        opt.zero_grad()
        backward(ce(model, batch))
        change(model, t)
        opt.step()

    return each(step)


@torch.no_grad()
def normalised(model: nn.Module, t: int) -> None:
    """Max-norm: rows of every weight come back to norm 1."""
    for p in model.parameters():
        if p.dim() == 2:
            p.div_(p.norm(dim=1, keepdim=True))


def clamped(model: nn.Module, t: int) -> None:
    """WGAN's."""
    for p in model.parameters():
        p.data.clamp_(-0.3, 0.3)


@torch.no_grad()
def noise_on_gradients(model: nn.Module, t: int) -> None:
    for p in model.parameters():
        p.grad.add_(0.01 * torch.randn_like(p))  # type: ignore[union-attr]


@torch.no_grad()
def centralised(model: nn.Module, t: int) -> None:
    for p in model.parameters():
        if p.dim() == 2:
            p.grad.sub_(p.grad.mean(1, keepdim=True))  # type: ignore[union-attr]


@torch.no_grad()
def scaled_by_hand(model: nn.Module, t: int) -> None:
    for p in model.parameters():
        p.grad.mul_(0.5)  # type: ignore[union-attr]


def replaced(model: nn.Module, t: int) -> None:
    """p.grad = another tensor."""
    for p in model.parameters():
        p.grad = p.grad * 0.5 + 0.1 * p.detach()  # type: ignore[operator]


def reset_at_3(model: nn.Module, t: int) -> None:
    if t == 3:
        torch.manual_seed(5)
        model[3].reset_parameters()  # type: ignore[index]


def loaded_at_3() -> Callable[[nn.Module, int], None]:
    kept: list[Any] = []

    def change(model: nn.Module, t: int) -> None:
        if t == 1:
            kept[:] = [copy.deepcopy(model.state_dict())]
        if t == 3:
            model.load_state_dict(kept[0])

    return change


def masked(model: nn.Module, t: int) -> None:
    """Pruned weights are set to zero again after every step, as sparse training does."""
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p[torch.rand(p.shape, generator=torch.Generator().manual_seed(i)) < 0.4] = 0


def averaged_with(share: float) -> Callable[[], Live]:
    """The user's own Lookahead: every third step the slow weights go towards the fast ones, which start again there."""

    def build() -> Live:
        slow: list[Tensor] = []

        def step(model: nn.Module, opt: Any, backward: Backward, t: int, batch: Batch) -> None:
            if not slow:
                slow.extend(p.detach().clone() for p in model.parameters())
            plain_step(model, opt, backward, t, batch)
            if t % 3 == 1:
                with torch.no_grad():
                    for s, p in zip(slow, model.parameters()):
                        s.lerp_(p, share)
                        p.copy_(s)

        return each(step)()

    return build


def sharpness_aware(model: nn.Module, opt: Any, backward: Backward, t: int, batch: Batch) -> None:
    """SAM by hand: a gradient at perturbed weights, the weights put back, and the step."""
    params = list(model.parameters())
    opt.zero_grad()
    backward(ce(model, batch))
    before = [p.detach().clone() for p in params]
    with torch.no_grad():
        norm = torch.stack([p.grad.norm() for p in params]).norm()  # type: ignore[union-attr]
        for p in params:
            p.add_(0.05 * p.grad / norm)  # type: ignore[operator]
    opt.zero_grad()
    backward(ce(model, batch))
    with torch.no_grad():
        for p, old in zip(params, before):
            p.copy_(old)
    opt.step()


def federated() -> Live:
    """One module for all clients, which take the server's weights and train two steps each."""
    model = net()
    opt = sgd(model, momentum=0.0)
    *training, held_out = batches(N + 1)

    def train(backward: Backward) -> None:
        server = copy.deepcopy(model.state_dict())
        for turn in range(N // 2):
            model.load_state_dict(server)
            for t in (2 * turn, 2 * turn + 1):
                plain_step(model, opt, backward, t, training[t])
            if turn:
                server = {k: (x + server[k]) / 2 for k, x in model.state_dict().items()}

    return Live(model, [opt], train, lambda: ce(model, held_out))


WRITTEN = r"weights were written between two steps .*stats\['written_weights'\]"
CHANGED = r"gradients were changed between tuner.backward and optimizer.step .*stats\['changed_gradients'\]"
CONSTANT = "right: what is written is a constant; one warning"
RESTART = "hypergradients look back no further than the last such step"
BY_HAND: dict[str, Row] = {
    "weights clamped after every step (WGAN)": Row(then(clamped), SUPPORTED, CONSTANT, WRITTEN),
    "weights masked after every step (sparse training)": Row(then(masked), SUPPORTED, CONSTANT, WRITTEN),
    "a layer reset in mid-run": Row(then(reset_at_3), SUPPORTED, CONSTANT, WRITTEN),
    "weights normalised after every step": Row(then(normalised), SAID, RESTART + "; a parametrization is exact", WRITTEN),
    "weights loaded in mid-run": Row(then(loaded_at_3()), SAID, RESTART, WRITTEN),
    "Lookahead, by hand": Row(averaged_with(0.5), SAID, RESTART, WRITTEN),
    "federated averaging": Row(federated, SAID, RESTART + ": tune one client's local steps", WRITTEN),
    "SAM, by hand": Row(each(sharpness_aware), SAID, RESTART, WRITTEN),
    "noise added to p.grad": Row(gradients_changed(noise_on_gradients), SAID, "put it in the loss: (noise · θ).sum()", CHANGED),
    "p.grad centralised by hand": Row(gradients_changed(centralised), SAID, "p.register_hook is differentiated", CHANGED),
    "p.grad multiplied by hand": Row(gradients_changed(scaled_by_hand), SAID, "multiply the loss, or p.register_hook", CHANGED),
    "p.grad replaced": Row(gradients_changed(replaced), SAID, "p.register_hook is differentiated", CHANGED),
}  # fmt: skip
