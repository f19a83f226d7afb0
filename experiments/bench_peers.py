"""Other ways to the same hypergradients: (case) → a call that computes dL/dlr and dL/dwd after the case's steps."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from experiments.bench_case import EPS, MOMENTUM, Answer, Call, Case


def plain_unrolled(case: Case) -> Call:
    """The same steps in plain code whose whole graph autograd keeps."""
    loss = case.loss_at

    def call() -> Answer:
        lr, wd = case.leaves()
        theta = [p.detach().clone().requires_grad_() for p in case.params]
        m, v = ([torch.zeros_like(p) for p in theta] for _ in range(2))
        for t, batch in enumerate(case.batches, 1):
            g = torch.autograd.grad(loss(theta, batch), theta, create_graph=True)
            g = [x + wd * p for x, p in zip(g, theta, strict=True)]
            if case.rule == "sgd":
                m = [MOMENTUM * b + x for b, x in zip(m, g, strict=True)]
                theta = [p - lr * b for p, b in zip(theta, m, strict=True)]
                continue
            m = [0.9 * b + 0.1 * x for b, x in zip(m, g, strict=True)]
            v = [0.999 * b + 0.001 * x * x for b, x in zip(v, g, strict=True)]
            c1, c2 = 1 - 0.9**t, math.sqrt(1 - 0.999**t)
            # + tiny: the root has no derivative at exactly 0
            roots = [(b + 1e-30).sqrt() / c2 + EPS for b in v]
            theta = [p - (lr / c1) * b / r for p, b, r in zip(theta, m, roots, strict=True)]
        found = torch.autograd.grad(loss(theta, case.held_out), [lr, wd])
        return float(found[0]), float(found[1])

    return call


def higher(case: Case) -> Call:
    """higher 0.2.1: innerloop_ctx, with lr overridden and weight decay in the loss."""
    library = import_module("higher")

    def call() -> Answer:
        lr, wd = case.leaves()
        optimizer = case.optimizer()
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0
        with library.innerloop_ctx(case.model, optimizer, override={"lr": [lr]}) as (model, inner):
            for batch in case.batches:
                inner.step(case.loss(model, batch) + _penalty(wd, model.parameters()))
            found = torch.autograd.grad(case.loss(model, case.held_out), [lr, wd])
        return float(found[0]), float(found[1])

    return call


def torchopt(case: Case) -> Call:
    """TorchOpt 0.7.3: functional optimizers with a tensor for lr, weight decay in the loss."""
    library = import_module("torchopt")

    loss = case.loss_at

    def call() -> Answer:
        lr, wd = case.leaves()
        if case.rule == "sgd":
            rule = library.sgd(lr=lambda count: lr, momentum=MOMENTUM)
        else:
            rule = library.adam(lr=lambda count: lr, eps=EPS)
        theta: Any = tuple(p.detach().clone().requires_grad_() for p in case.params)
        state = rule.init(theta)
        for batch in case.batches:
            g = torch.autograd.grad(loss(theta, batch) + _penalty(wd, theta), theta, create_graph=True)
            updates, state = rule.update(g, state, inplace=False)
            theta = library.apply_updates(theta, updates, inplace=False)
        found = torch.autograd.grad(loss(theta, case.held_out), [lr, wd])
        return float(found[0]), float(found[1])

    return call


def flag(case: Case) -> Call:
    """torch.optim.Adam(differentiable=True): the stock step through which autograd passes; SGD's momentum is wrong with it."""

    def call() -> Answer:
        lr, wd = case.leaves()
        theta = [p.detach().clone().requires_grad_().clone() for p in case.params]
        optimizer = torch.optim.Adam(theta, lr=lr, weight_decay=wd, eps=EPS, differentiable=True, foreach=False)  # type: ignore[arg-type]
        for batch in case.batches:
            loss = case.loss_at([p.clone() for p in theta], batch)  # the step writes over what the graph needs
            for p, g in zip(theta, torch.autograd.grad(loss, theta, create_graph=True), strict=True):
                p.grad = g
            optimizer.step()
        found = torch.autograd.grad(case.loss_at(theta, case.held_out), [lr, wd])
        return float(found[0]), float(found[1])

    return call


def _penalty(wd: Tensor, theta: Any) -> Tensor:
    return 0.5 * wd * sum((p * p).sum() for p in theta)
