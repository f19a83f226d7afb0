"""Linear solvers of one protocol: `solve(matvec, b)` returns x with A x ≈ b, for A given by its products.

>>> import torch
>>> A, b = torch.diag(torch.tensor([1.0, 2.0, 4.0])), torch.ones(3)
>>> cg(lambda x: A @ x, b, max_iter=3)
tensor([1.0000, 0.5000, 0.2500])
>>> neumann(lambda x: A @ x, b, terms=2, scale=0.25)  # α Σ_{j<2} (I − αA)ʲ b
tensor([0.4375, 0.3750, 0.2500])
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Matvec = Callable[[Tensor], Tensor]
Solve = Callable[[Matvec, Tensor], Tensor]


# Hestenes & Stiefel 1952. The next direction is built from the NEW residual: β = ‖r'‖²/‖r‖².
def cg(matvec: Matvec, b: Tensor, max_iter: int | None = None, tol: float = 1e-12) -> Tensor:
    """Solve A x = b for a symmetric positive definite A by conjugate gradients.

    Args:
        matvec: x ↦ A x.
        b: right-hand side [n].
        max_iter: at most so many products; default 10 n.
        tol: stop where ‖b − A x‖ ≤ tol ‖b‖.

    Raises:
        ValueError: where a direction of curvature ≤ 0 is met: A is not positive definite, so the point is not a strict
            minimum.
    """
    x, r = torch.zeros_like(b), b.clone()
    d, rr = r.clone(), r @ r
    stop = (tol * torch.linalg.vector_norm(b)) ** 2
    for _ in range(10 * b.numel() if max_iter is None else max_iter):
        if rr <= stop:
            break
        ad = matvec(d)
        curvature = d @ ad
        if curvature <= 0:
            raise ValueError(
                "cg met a direction of curvature ≤ 0: the training loss has no strict minimum here. Train to a minimum, "
                "add weight decay, or use solver=hypergrad.solvers.neumann."
            )
        a = rr / curvature
        x, r = x + a * d, r - a * ad
        rr, old = r @ r, rr
        d = r + (rr / old) * d
    return x


# A⁻¹ = α Σ_j (I − αA)ʲ for ‖I − αA‖ < 1 (Lorraine, Vicol & Duvenaud 2019, arXiv 1911.02590, eq. 8)
def neumann(matvec: Matvec, b: Tensor, terms: int = 100, scale: float | None = None) -> Tensor:
    """Approximate A⁻¹ b by the first terms of the Neumann series α Σ_j (I − αA)ʲ b.

    Args:
        matvec: x ↦ A x.
        b: right-hand side [n].
        terms: number of terms; one product each after the first.
        scale: α, below 2/λ_max(A); default 1/λ_max as found by ten power iterations, with a margin of a tenth.
    """
    if scale is None:
        v = b / torch.linalg.vector_norm(b).clamp_min(torch.finfo(b.dtype).tiny)
        norm = torch.ones((), dtype=b.dtype, device=b.device)
        for _ in range(10):
            v = matvec(v)
            norm = torch.linalg.vector_norm(v).clamp_min(torch.finfo(b.dtype).tiny)
            v = v / norm
        scale = float(1 / (1.1 * norm))
    term, total = b, b
    for _ in range(terms - 1):
        term = term - scale * matvec(term)
        total = total + term
    return scale * total
