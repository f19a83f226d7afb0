"""Loops in which weights act on later gradients through something that is in no graph: a detached value, a copy of the weights.

They train as they would, their hypergradients are off, and mostly nothing can tell: the rows say so.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.online.loop_rows import REFUSED, SAID, UNSEEN, Live, N, Row
from tests.online.loops_fields import drawn, field, mlp
from tests.online.loops_losses import Batch, of
from tests.online.loops_steps import batches, ce, net, plain_step, sgd


def adversarial_l2(model: nn.Module, batch: Batch) -> Tensor:
    """The perturbation is a gradient of norm 0.5: it moves with the weights, outside the graph."""
    x = batch[0].clone().requires_grad_()
    (g,) = torch.autograd.grad(ce(model, (x, batch[1])), x)
    return ce(model, (batch[0] + 0.1 * F.normalize(g, dim=1), batch[1]))


def focal(model: nn.Module, batch: Batch) -> Tensor:
    """Examples weighted by their detached losses."""
    losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return (losses.detach().softmax(0) * losses).sum()


# ---- what the weights act through outside every graph


class FakeQuantised(nn.Module):
    """Quantisation-aware training: weights rounded in the forward pass, passed straight through in the backward pass."""

    def __init__(self, inner: nn.Linear):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        w = self.inner.weight
        return F.linear(x, w + ((8 * w).round() / 8 - w).detach(), self.inner.bias)


def quantised() -> nn.Module:
    model = net()
    model[0] = FakeQuantised(model[0])  # type: ignore[arg-type]
    return model


class Hooked(nn.Module):
    """A hook between two layers halves the gradient of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = net(0.0)

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = self.layers
        x = first(x)
        if x.requires_grad:
            x.register_hook(lambda g: 0.5 * g)
        for layer in rest:
            x = layer(x)
        return x


class Carried(nn.Module):
    """A forecaster by truncated back-propagation: its hidden state goes on, detached."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRU(2, 6, batch_first=True), nn.Linear(6, 2)


def forecasts() -> Live:
    hidden: list[Tensor] = []

    def loss(model: Any, t: int) -> Tensor:
        x = drawn(t, 3, 5, 2)
        out, h = model.cell(x[:, :-1], hidden[-1].detach() if hidden and t < N else None)
        hidden.extend([h] * (t < N))
        return (model.head(out) - x[:, 1:]).square().mean()

    return field(Carried, loss)()


def q_learning() -> Live:
    live = field(lambda: mlp(3, 2), lambda model, t: td(model, t))()
    target = copy.deepcopy(live.model)

    def td(model: nn.Module, t: int) -> Tensor:
        if t % 2 == 0 and t < N:
            target.load_state_dict(model.state_dict())
        with torch.no_grad():
            y = drawn(50 + t, 6) + 0.9 * target(drawn(20 + t, 6, 3)).max(1).values
        return F.smooth_l1_loss(model(drawn(t, 6, 3))[:, 0], y)

    return live


def actor_critic(model: nn.Module, t: int) -> Tensor:
    out, returns = model(drawn(t, 8, 3)), drawn(30 + t, 8)
    policy, value = torch.distributions.Categorical(logits=out[:, :2]), out[:, 2]
    chosen = policy.log_prob(policy.sample())
    return -(chosen * (returns - value.detach())).mean() + 0.5 * (returns - value).square().mean()


class MoCo(nn.Module):
    """A query encoder, a key encoder that follows it, a queue of keys."""

    def __init__(self, careless: bool = False) -> None:
        super().__init__()
        self.q, self.careless = mlp(4, 3), careless
        self.k = (mlp(4, 3) if careless else copy.deepcopy(self.q)).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(12, 3), dim=1))
        self.queue: Tensor

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for p, q in zip(self.k.parameters(), self.q.parameters()) if self.training or self.careless else ():
                p.lerp_(q, 0.2)
            keys = F.normalize(self.k(x + 0.1), dim=1)
        q = F.normalize(self.q(x - 0.1), dim=1)
        logits = torch.cat([(q * keys).sum(1, keepdim=True), q @ self.queue.clone().T], 1) / 0.2
        self.queue.copy_(torch.cat([self.queue[6:], keys]))
        return F.cross_entropy(logits, torch.zeros(len(x), dtype=torch.long))


def contrast(model: nn.Module, t: int) -> Tensor:
    model.train(t < N)
    return model(drawn(t, 6, 4))


class Equilibrium(nn.Module):
    """A deep equilibrium: the fixed point without a graph, its backward pass in a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.u, self.head = nn.Linear(6, 6, bias=False), nn.Linear(3, 6), nn.Linear(6, 2)

    def f(self, z: Tensor, x: Tensor) -> Tensor:
        return (0.5 * self.w(z) + self.u(x)).tanh()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            z = torch.zeros(len(x), 6, dtype=x.dtype)
            for _ in range(40):
                z = self.f(z, x)
        z = self.f(z, x)
        z0 = z.detach().requires_grad_()
        f0 = self.f(z0, x)

        def solve(g: Tensor) -> Tensor:
            y = g
            for _ in range(40):
                y = torch.autograd.grad(f0, z0, y, retain_graph=True)[0] + g
            return y

        z.register_hook(solve)
        return self.head(z)


def classes(model: nn.Module, t: int) -> Tensor:
    return F.cross_entropy(model(drawn(t, 6, 3)), torch.arange(6) % 2)


def ema_swapped_in() -> Live:
    """EMA weights put into the model for validation by `.data`, and the weights themselves back, as torch_ema does."""
    model = net()
    opt, mean = sgd(model), [p.detach().clone() for p in model.parameters()]
    *training, held_out = batches(N + 1)

    def train(backward: Any) -> None:
        for t, batch in enumerate(training):
            plain_step(model, opt, backward, t, batch)
            for m, p in zip(mean, model.parameters()):
                m.lerp_(p.detach(), 0.2)

    def val_loss() -> Tensor:
        kept = [p.detach().clone() for p in model.parameters()]
        for p, m in zip(model.parameters(), mean):
            p.data.copy_(m)
        loss = ce(model, held_out)
        for p, k in zip(model.parameters(), kept):
            p.data.copy_(k)
        return loss

    return Live(model, [opt], train, val_loss)


GRAPH = "leave out `detach()` (`create_graph=True`) where the size matters; `hypergrad.check` tells it"
CHECK = "`hypergrad.check` tells how far off it is"
DETACHED: dict[str, Row] = {
    "adversarial training, normalised gradient": Row(of(adversarial_l2), UNSEEN, GRAPH),
    "weights from detached losses": Row(of(focal), UNSEEN, GRAPH),
    "fake quantisation, straight through": Row(of(ce, quantised), UNSEEN, CHECK),
    "a hook on a tensor between layers (register_hook, retain_grad)": Row(
        of(ce, Hooked), UNSEEN, "it runs again in every product: a hook on a parameter is differentiated"
    ),
    "truncated BPTT, hidden state carried": Row(forecasts, UNSEEN, "the path through the carried state is left out"),
    "Q-learning with a target network": Row(q_learning, UNSEEN, "the path through the target network is left out"),
    "actor-critic, detached advantage": Row(field(lambda: mlp(3, 3), actor_critic), UNSEEN, CHECK),
    "MoCo: momentum encoder and queue": Row(
        field(MoCo, contrast), SAID, "as far as the loss reads them", r"training changes queue, k\.0\.weight"
    ),
    "MoCo whose val_loss moves the momentum encoder": Row(
        field(lambda: MoCo(careless=True), contrast), REFUSED, "`if self.training`", r"^val_loss changes parameters \(k"
    ),
    "deep equilibrium, backward in a hook": Row(field(Equilibrium, classes), UNSEEN, CHECK),
    "EMA weights swapped in and out inside val_loss": Row(
        ema_swapped_in, REFUSED, "validate the weights themselves; `average=True` takes a mean of them",
        "val_loss writes to the parameters",
    ),
}  # fmt: skip
