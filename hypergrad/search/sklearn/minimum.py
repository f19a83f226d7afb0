"""The held-out loss at the minimum of a training objective, and its hypergradient.

A fit ends at θ* = argmin F(θ, h), F(θ, h) the training objective, h the hyperparameters. Some coordinates do not move with h: the
zeros of a lasso, an intercept that is not fitted. With S those that do, ∂F/∂θ_S = 0 holds in a neighbourhood of h, and the
implicit function theorem gives

    dθ_S/dh = −H⁻¹ ∂²F/∂θ_S∂h,      H = ∂²F/∂θ_S²
    dL/dh   = −xᵀ ∂²F/∂θ_S∂h,       H x = ∂L/∂θ_S

for a held-out loss L(θ*). On S the penalty |θ| is linear, so a lasso is as smooth there as a ridge regression (Bertrand et al.
2020, arXiv 2002.08943; 2022, arXiv 2105.01637). A fit that stopped short of θ* by δ has ∂F/∂θ_S = g = Hδ + O(δ²), so

    L(θ* + δ) − L(θ*) = ∂L/∂θ · δ + O(δ²) = xᵀ g + O(δ²)

which says what the solver's tolerance is worth, without another fit: `HeldOut.gap`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hypergrad.solvers import cg

DENSE = 300  # coordinates up to which H is formed; above it cg takes products with H


@dataclass(frozen=True)
class Minimum:
    """A fitted model as the minimum of its training objective.

    Args:
        theta: θ*, [p].
        free: S, bool [p].
        objective: F(θ, h), a number, on the training data.
        scores: decision values [n, k] of rows X [n, d].
    """

    theta: Tensor
    free: Tensor
    objective: Callable[[Tensor, Mapping[str, Tensor]], Tensor]
    scores: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class HeldOut:
    """The loss on held-out data of one fit.

    Attributes:
        value: the loss.
        gradients: its derivative in each hyperparameter asked for.
        gap: by how much the loss differs from that of the exact minimum, to first order; 0 where no derivative was asked for.
    """

    value: float
    gradients: dict[str, float]
    gap: float = 0.0


def at_minimum(
    minimum: Minimum, loss: Callable[[Tensor], Tensor], x: Tensor, hypers: Mapping[str, float], wrt: Sequence[str]
) -> HeldOut:
    """The loss of the decision values of x, and its derivative in `wrt`, by the formula of the module's docstring."""
    theta = minimum.theta
    if not wrt:
        return HeldOut(float(loss(minimum.scores(theta, x))), {})
    index = minimum.free.nonzero()[:, 0]
    z = theta[index].requires_grad_()
    h = {name: torch.tensor(value, dtype=theta.dtype, requires_grad=name in wrt) for name, value in hypers.items()}
    value = loss(minimum.scores(theta.scatter(0, index, z), x))
    if len(index) == 0:
        return HeldOut(float(value.detach()), dict.fromkeys(wrt, 0.0))
    (v,) = torch.autograd.grad(value, z)
    (g,) = torch.autograd.grad(minimum.objective(theta.scatter(0, index, z), h), z, create_graph=True)
    solved = _solve(g, z, v)
    products = torch.autograd.grad(g, [h[name] for name in wrt], solved, allow_unused=True)
    gradients = {name: 0.0 if p is None else -float(p) for name, p in zip(wrt, products, strict=True)}
    return HeldOut(float(value.detach()), gradients, float(solved @ g.detach()))


def _solve(g: Tensor, z: Tensor, v: Tensor) -> Tensor:
    """H⁻¹ v; where H is singular, the solution of least norm."""
    if len(z) > DENSE:
        return cg(lambda d: torch.autograd.grad(g, z, d, retain_graph=True)[0], v, tol=1e-10)
    hessian = hessian_of(g, z)
    factor, failed = torch.linalg.cholesky_ex(hessian)
    if not failed:
        return torch.cholesky_solve(v[:, None], factor)[:, 0]
    return torch.linalg.pinv(hessian, hermitian=True) @ v


def hessian_of(g: Tensor, z: Tensor) -> Tensor:
    """∂g/∂z of a gradient g with its graph, [p, p]."""
    return torch.autograd.grad(g, z, torch.eye(len(z), dtype=z.dtype), retain_graph=True, is_grads_batched=True)[0]
