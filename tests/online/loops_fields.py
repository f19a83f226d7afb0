"""Loops as they are written in different fields, each small."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.online.live_loops import Backward
from tests.online.loop_rows import REFUSED, Live, N, Row

Loss = Callable[[nn.Module, int], Tensor]


def adam(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, eps=1e-3, weight_decay=0.1)


def field(
    make: Callable[[], nn.Module], loss: Loss, val_loss: Loss | None = None, after: Callable[..., None] | None = None
) -> Callable[[], Live]:
    """A loop of `loss(model, t)`, held out at t = N; `after(model, t)` is what is done after a step."""

    def build() -> Live:
        torch.manual_seed(0)
        model = make()
        opt = adam(model)

        def train(backward: Backward) -> None:
            for t in range(N):
                opt.zero_grad()
                backward(loss(model, t))
                opt.step()
                if after is not None:
                    after(model, t)

        return Live(model, [opt], train, lambda: (val_loss or loss)(model, N))

    return build


def drawn(t: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(100 + t))


def mlp(i: int, o: int, act: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    return nn.Sequential(nn.Linear(i, 8), act(), nn.Linear(8, o))


# ---- physics: −u'' = sin on [0, π], u = 0 at the ends


def poisson(model: nn.Module, t: int) -> Tensor:
    x = (3.1416 * torch.rand(12, 1)).requires_grad_()
    u = model(x)
    (ux,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (uxx,) = torch.autograd.grad(ux.sum(), x, create_graph=True)
    return (uxx + x.sin()).square().mean() + 10 * model(torch.tensor([[0.0], [3.1416]])).square().mean()


def poisson_error(model: nn.Module, t: int) -> Tensor:
    x = torch.linspace(0, 3.1416, 9).unsqueeze(1)
    return (model(x) - x.sin()).square().mean()


# ---- graphs


class Attention(nn.Module):
    """Of a GAT: softmax over incoming edges by scatter_reduce, messages by index_add."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.score, self.head = nn.Linear(4, 8), nn.Linear(16, 1), nn.Linear(8, 2)
        g = torch.Generator().manual_seed(3)
        self.x, self.edges = torch.randn(12, 4, generator=g), torch.randint(12, (2, 40), generator=g)

    def forward(self) -> Tensor:
        h, (source, target) = self.lin(self.x.to(self.lin.weight)), self.edges
        a = F.leaky_relu(self.score(torch.cat([h[source], h[target]], 1)).squeeze(1))
        top = torch.full((12,), -1e9, dtype=h.dtype).scatter_reduce(0, target, a, "amax")
        e = (a - top[target]).exp()
        w = e / torch.zeros(12, dtype=h.dtype).scatter_add(0, target, e)[target]
        return self.head(torch.zeros_like(h).index_add(0, target, w.unsqueeze(1) * h[source]).tanh() + h)


def nodes(model: nn.Module, t: int) -> Tensor:
    held_out = torch.arange(12) % 2 == (t == N)
    labels = torch.arange(12) // 3 % 2
    return F.cross_entropy(model()[held_out], labels[held_out])


# ---- speech


def ctc(log_probs: Tensor, targets: Tensor, in_lengths: Tensor, lengths: Tensor, blank: int = 0) -> Tensor:
    """`nn.CTCLoss` with a second derivative. log_probs [T, B, classes], targets [B, S]; mean over the batch of loss / length."""
    steps, b, _ = log_probs.shape
    states = torch.full((b, 2 * targets.shape[1] + 1), blank)
    states[:, 1::2] = targets
    never = torch.full_like(states, -1e30, dtype=log_probs.dtype)
    skip = torch.zeros_like(states, dtype=torch.bool)
    skip[:, 2:] = (states[:, 2:] != blank) & (states[:, 2:] != states[:, :-2])
    emit = log_probs.gather(2, states.expand(steps, -1, -1))
    alpha, last = torch.where(torch.arange(states.shape[1]) < 2, emit[0], never), []
    for t in range(steps):
        if t > 0:
            one, two = (torch.cat([never[:, :k], alpha[:, :-k]], 1) for k in (1, 2))
            alpha = torch.stack([alpha, one, torch.where(skip, two, never)]).logsumexp(0) + emit[t]
        last.append(alpha)
    at_end = torch.stack(last, 1)[torch.arange(b), in_lengths - 1]
    ends = torch.stack([2 * lengths, 2 * lengths - 1], 1)
    return (-at_end.gather(1, ends).logsumexp(1) / lengths).mean()


def speech(by: Callable[..., Tensor]) -> Loss:
    def loss(model: nn.Module, t: int) -> Tensor:
        out = model(drawn(t, 9, 2, 3)).log_softmax(2)
        targets = torch.randint(1, 4, (2, 3), generator=torch.Generator().manual_seed(t))
        return by(out, targets, torch.tensor([9, 8]), torch.tensor([3, 2]))

    return loss


# ---- images: a detector whose matching is a choice, without gradients


def detector(model: nn.Module, t: int) -> Tensor:
    out, boxes = model(drawn(t, 10, 4)), drawn(50 + t, 3, 2)
    with torch.no_grad():
        match = torch.cdist(out[:, 1:], boxes).argmin(1)
        positive = (out[:, 1:] - boxes[match]).abs().sum(1) < 2
    p = torch.sigmoid(out[:, 0])
    truth = positive.to(p)
    focal = (1 - p * truth - (1 - p) * (1 - truth)) ** 2 * F.binary_cross_entropy_with_logits(
        out[:, 0], truth, reduction="none"
    )
    return focal.mean() + F.smooth_l1_loss(out[positive, 1:], boxes[match[positive]])


# ---- generative


def vae(model: nn.Module, t: int) -> Tensor:
    encoder, decoder = model.children()
    x = drawn(t, 6, 4).sigmoid()
    mean, log_var = encoder(x).chunk(2, 1)
    z = mean + torch.randn_like(mean) * (log_var / 2).exp()
    kl = -0.5 * (1 + log_var - mean**2 - log_var.exp()).sum(1).mean()
    return F.binary_cross_entropy_with_logits(decoder(z), x) + 0.1 * kl


def denoiser(model: nn.Module, t: int) -> Tensor:
    x, at = drawn(t, 6, 2), torch.randint(10, (6, 1))
    keep, e = torch.linspace(0.99, 0.1, 10, dtype=x.dtype)[at], torch.randn_like(x)
    noisy = keep.sqrt() * x + (1 - keep).sqrt() * e
    return (model(torch.cat([noisy, at / 10], 1)) - e).square().mean()


# ---- recommendation, survival, dynamics


def bpr(model: nn.Module, t: int) -> Tensor:
    users, items = model.children()
    u, liked, other = torch.randint(7, (6,)), torch.randint(9, (6,)), torch.randint(9, (6,))
    return -F.logsigmoid((users(u) * (items(liked) - items(other))).sum(1)).mean()


def cox(model: nn.Module, t: int) -> Tensor:
    risk, event = model(drawn(t, 8, 4)).squeeze(1), torch.arange(8) % 3 > 0
    return -(risk - risk.logcumsumexp(0))[event].mean()


def ode(model: nn.Module, t: int) -> Tensor:
    y, loss, h = drawn(t, 4, 2), 0.0, 0.1
    for _ in range(3):
        k1 = model(y)
        k2 = model(y + h / 2 * k1)
        k3 = model(y + h / 2 * k2)
        k4 = model(y + h * k3)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        loss = loss + (y - 0.5).abs().mean()
    return loss  # type: ignore[return-value]


def two(first: Callable[[], nn.Module], second: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.ModuleList([first(), second()])


FIELDS: dict[str, Row] = {
    "physics-informed net, u'' in the loss": Row(field(lambda: mlp(1, 1), poisson, poisson_error)),
    "graph attention by scatter and index_add": Row(field(Attention, nodes)),
    "speech, nn.CTCLoss": Row(
        field(lambda: mlp(3, 4), speech(nn.CTCLoss())), REFUSED, "the loss below", r"^ctc_loss has no .*docs/loops.md"
    ),
    "speech, CTC by logsumexp": Row(field(lambda: mlp(3, 4), speech(ctc)), how="the loss below"),
    "detector, matching without gradients, focal loss": Row(field(lambda: mlp(4, 3), detector)),
    "variational autoencoder": Row(field(two(lambda: mlp(4, 4), lambda: mlp(2, 4)), vae)),
    "diffusion, random t": Row(field(lambda: mlp(3, 2, nn.SiLU), denoiser)),
    "recommender, embeddings and BPR": Row(field(two(lambda: nn.Embedding(7, 3), lambda: nn.Embedding(9, 3)), bpr)),
    "survival, Cox loss": Row(field(lambda: mlp(4, 1, nn.SELU), cox)),
    "neural ODE by RK4": Row(field(lambda: mlp(2, 2), ode)),
}  # fmt: skip
