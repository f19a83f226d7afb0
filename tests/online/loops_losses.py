"""Loops that differ in what the loss is made of."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn import functional as F

from tests.online.live_loops import Backward
from tests.online.loop_rows import SAID, Live, N, Row
from tests.online.loops_steps import batches, ce, net, sgd

Batch = tuple[Tensor, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]


def of(loss: Loss, model: Callable[[], nn.Module] = net, make: Callable[[nn.Module], Any] = sgd) -> Callable[[], Live]:
    """The plain loop with this loss, validated by cross-entropy."""

    def build() -> Live:
        module = model()
        opt = make(module)
        *training, held_out = batches(N + 1)

        def train(backward: Backward) -> None:
            for batch in training:
                opt.zero_grad()
                backward(loss(module, batch))
                opt.step()

        return Live(module, [opt], train, lambda: ce(module, held_out))

    return build


def gradient_penalty(model: nn.Module, batch: Batch) -> Tensor:
    """WGAN-GP's: the norm of the gradient in the inputs."""
    x = batch[0].clone().requires_grad_()
    out = model(x)
    (g,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return F.cross_entropy(out, batch[1]) + 0.5 * (g.norm(dim=1) - 1).square().mean()


def penalty_on_weight_gradients(model: nn.Module, batch: Batch) -> Tensor:
    """The squared norm of the gradient in the weights."""
    loss = ce(model, batch)
    gs = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    return loss + 0.1 * torch.stack([g.square().sum() for g in gs]).sum()


def smoothed(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], label_smoothing=0.1)


def mixup(model: nn.Module, batch: Batch) -> Tensor:
    x, y = batch
    share, order = torch.distributions.Beta(0.4, 0.4).sample(), torch.randperm(len(x))
    out = model(share * x + (1 - share) * x[order])
    return share * F.cross_entropy(out, y) + (1 - share) * F.cross_entropy(out, y[order])


def distilled(model: nn.Module, batch: Batch) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        teacher = net(0.0).to(batch[0]).eval()
    with torch.no_grad():
        soft = F.softmax(3 * teacher(batch[0]), 1)
    return F.kl_div(F.log_softmax(model(batch[0]) / 2, 1), soft, reduction="batchmean") + 0.3 * ce(model, batch)


def l2_by_hand(model: nn.Module, batch: Batch) -> Tensor:
    return ce(model, batch) + 0.01 * torch.stack([p.square().sum() for p in model.parameters()]).sum()


def summed_uses(model: nn.Module, batch: Batch) -> Tensor:
    """One net, two views, consistency between them."""
    x, y = batch
    a, b = model(x + 0.1 * torch.randn_like(x)), model(x)
    return F.cross_entropy(a, y) + (a - b).square().mean()


def adversarial(model: nn.Module, batch: Batch) -> Tensor:
    """FGSM: the perturbation is a sign, constant in the weights wherever it has a derivative."""
    x = batch[0].clone().requires_grad_()
    (g,) = torch.autograd.grad(ce(model, (x, batch[1])), x)
    return ce(model, (batch[0] + 0.1 * g.sign(), batch[1]))


def functional(model: nn.Module, batch: Batch) -> Tensor:
    """functional_call on the module's own parameters, example by example."""
    params = dict(model.named_parameters())

    def one(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, params, (x.unsqueeze(0),)), y.unsqueeze(0))

    return vmap(one, randomness="different")(*batch).mean()


def jacobian(model: nn.Module, batch: Batch) -> Tensor:
    """A penalty on the Jacobian by torch.func."""

    def out(x: Tensor) -> Tensor:
        return model(x.unsqueeze(0)).squeeze(0)

    j = vmap(jacrev(out))(batch[0])
    g = vmap(grad(lambda x: out(x).square().sum()))(batch[0])
    return ce(model, batch) + 0.1 * j.square().mean() + 0.1 * g.square().mean()


def inner_steps(model: nn.Module, batch: Batch) -> Tensor:
    """MAML: one step inside the loss, its graph kept."""
    params = dict(model.named_parameters())
    inner = F.cross_entropy(functional_call(model, params, (batch[0][:3],)), batch[1][:3])
    gs = torch.autograd.grad(inner, list(params.values()), create_graph=True)
    fast = {name: p - 0.5 * g for (name, p), g in zip(params.items(), gs)}
    return F.cross_entropy(functional_call(model, fast, (batch[0][3:],)), batch[1][3:])


def pseudo_labels(model: nn.Module, batch: Batch) -> Tensor:
    out = model(batch[0])
    return ce(model, batch) + 0.3 * F.cross_entropy(out, out.detach().argmax(1))


def augmented(model: nn.Module, batch: Batch) -> Tensor:
    """By numpy and by Python's random, as augmentations of images are."""
    noise = torch.as_tensor(np.random.randn(*batch[0].shape)).to(batch[0])  # noqa: NPY002
    return ce(model, (batch[0] * (1 if random.random() < 0.5 else -1) + 0.1 * noise, batch[1]))


def augmented_both() -> Live:
    """Augmentation in training and in validation."""
    live = of(augmented)()
    held_out = batches(N + 1)[N]
    live.val_loss = lambda: augmented(live.model, held_out)
    return live


def with_norm(z: Tensor) -> Tensor:
    return z.norm(dim=-1)


def with_constant(z: Tensor) -> Tensor:
    return (z.square().sum(-1) + 1e-6).sqrt()


def hard_triplets(size: Callable[[Tensor], Tensor]) -> Loss:
    """Of all pairs, an example and itself too, whose distance 0 is hidden by a mask."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        z, y = model(batch[0]), batch[1]
        d, same = size(z[:, None] - z[None]), y[:, None] == y[None]
        return F.softplus((d * same).max(1).values - (d + 10 * same).min(1).values).mean()

    return loss


LOSSES: dict[str, Row] = {
    "gradient penalty in the inputs (WGAN-GP)": Row(of(gradient_penalty)),
    "penalty on the gradient in the weights": Row(of(penalty_on_weight_gradients)),
    "label smoothing": Row(of(smoothed)),
    "mixup": Row(of(mixup)),
    "distillation from a teacher": Row(of(distilled)),
    "L2 in the loss": Row(of(l2_by_hand)),
    "one net used twice in a loss": Row(of(summed_uses)),
    "adversarial training, sign of the gradient (FGSM, PGD)": Row(of(adversarial)),
    "torch.func: functional_call and vmap": Row(of(functional)),
    "torch.func: jacrev and grad in the loss": Row(of(jacobian, lambda: net(0.0))),
    "MAML, an inner step in the loss": Row(of(inner_steps)),
    "numpy and random draw in training and validation": Row(augmented_both),
    "hardest triplets, a constant inside the root": Row(of(hard_triplets(with_constant))),
    "hardest triplets, roots of 0 behind a mask": Row(
        of(hard_triplets(with_norm)), SAID, "a small constant inside the root", "nonfinite_products"
    ),
    "pseudo-labels (detached)": Row(of(pseudo_labels)),
}
