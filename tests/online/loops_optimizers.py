"""Loops that differ in their optimizers, and in which models these train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.online.live_loops import Backward
from tests.online.loop_rows import Live, N, Row
from tests.online.loops_steps import batches, ce, each, net, plain_step, sgd

ADAM = {"lr": 0.02, "eps": 1e-3, "weight_decay": 0.1}


def adamw(**kw: Any) -> Callable[[nn.Module], torch.optim.AdamW]:
    return lambda model: torch.optim.AdamW(model.parameters(), **{**ADAM, **kw})


def tensor_lr(model: nn.Module) -> torch.optim.AdamW:
    return adamw(lr=torch.tensor(0.02))(model)


def head_faster(model: Any) -> torch.optim.SGD:
    """Fine-tuning: body and head with numbers of their own."""
    body, head = list(model[0].parameters()), list(model[3].parameters())
    parts = [{"params": body, "lr": 0.02}, {"params": head, "lr": 0.3, "weight_decay": 0.001}]
    return torch.optim.SGD(parts, lr=0.1, momentum=0.9, weight_decay=0.02, nesterov=True)


def one_group_a_parameter(model: nn.Module) -> torch.optim.SGD:
    parts = [{"params": [p], "lr": 0.1 + 0.05 * i} for i, p in enumerate(model.parameters())]
    return torch.optim.SGD(parts, weight_decay=0.01, momentum=0.5)


def several_models() -> Live:
    """An encoder and a head, two modules, one optimizer; the tuner is given both in a ModuleList."""
    torch.manual_seed(0)
    encoder, head = nn.Sequential(nn.Linear(5, 8), nn.Tanh()), nn.Linear(8, 3)
    opt = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], **ADAM)
    *training, held_out = batches(N + 1)

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(head(encoder(batch[0])), batch[1])

    def train(backward: Backward) -> None:
        for batch in training:
            opt.zero_grad()
            backward(loss(batch))
            opt.step()

    return Live(nn.ModuleList([encoder, head]), [opt], train, lambda: loss(held_out))


def first_of_several_models() -> Live:
    """The same with the encoder alone given as the model: what counts is what the optimizer holds."""
    live = several_models()
    live.model = live.model[0]  # type: ignore[index]
    return live


def one_model_two_optimizers() -> Live:
    """Matrices and the rest."""
    model = net()
    split = [[p for p in model.parameters() if (p.dim() == 2) == matrix] for matrix in (True, False)]
    opts = [torch.optim.SGD(split[0], lr=0.1, momentum=0.9, weight_decay=0.01), torch.optim.AdamW(split[1], **ADAM)]
    *training, held_out = batches(N + 1)

    def train(backward: Backward) -> None:
        for batch in training:
            for opt in opts:
                opt.zero_grad()
            backward(ce(model, batch))
            for opt in opts:
                opt.step()

    return Live(model, opts, train, lambda: ce(model, held_out))


OPTIMIZERS: dict[str, Row] = {
    "param groups with lr and weight decay of their own": Row(each(plain_step, head_faster)),
    "a param group for every parameter": Row(each(plain_step, one_group_a_parameter)),
    "foreach=True": Row(each(plain_step, adamw(foreach=True))),
    "foreach=False": Row(each(plain_step, adamw(foreach=False))),
    "fused=True": Row(each(plain_step, adamw(fused=True))),
    "amsgrad=True": Row(each(plain_step, adamw(amsgrad=True))),
    "SGD, fused": Row(each(plain_step, lambda m: sgd(m, fused=True))),
    "lr as a tensor": Row(each(plain_step, tensor_lr)),
    "Rprop (differentiated through its own step)": Row(
        each(plain_step, lambda m: torch.optim.Rprop(m.parameters(), lr=0.01)), wrt=("lr",)
    ),
    "ASGD (differentiated through its own step)": Row(
        each(plain_step, lambda m: torch.optim.ASGD(m.parameters(), lr=0.1, weight_decay=0.01))
    ),
    "several models under one optimizer": Row(several_models, how="`nn.ModuleList([encoder, head])` as the model"),
    "several models under one optimizer, one given": Row(first_of_several_models),
    "one model under two optimizers": Row(one_model_two_optimizers, how="a list of both"),
}  # fmt: skip
