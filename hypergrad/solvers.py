"""Linear solvers of one protocol: `solve(matvec, b)` returns x with A x ≈ b, for A given by its products.

>>> import torch
>>> A, b = torch.diag(torch.tensor([1.0, 2.0, 4.0])), torch.ones(3)
>>> cg(lambda x: A @ x, b, max_iter=3)
tensor([1.0000, 0.5000, 0.2500])
>>> neumann(lambda x: A @ x, b, terms=2, scale=0.25)  # α Σ_{j<2} (I − αA)ʲ b
tensor([0.4375, 0.3750, 0.2500])
>>> nystrom(lambda x: A @ x, b, rank=3, rho=1.0)  # (A + ρI)⁻¹ b at full rank
tensor([0.5000, 0.3333, 0.2000])

`WarmStart` wraps one of them, to start from its own last answer. Any function of this signature is a solver too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Matvec = Callable[[Tensor], Tensor]
Solve = Callable[..., Tensor]  # solve(matvec, b); one that can be warm-started takes x0= as well
Apply = Callable[[Tensor], Tensor]


# Hestenes & Stiefel 1952. The next direction is built from the NEW residual: d' = r' + β d, β = ‖r'‖²/‖r‖²; with a
# preconditioner, of z' = P⁻¹ r' and β = r'ᵀz'/rᵀz.
def cg(
    matvec: Matvec,
    b: Tensor,
    max_iter: int | None = None,
    tol: float = 1e-12,
    x0: Tensor | None = None,
    preconditioner: Callable[[Matvec, Tensor], Apply] | None = None,
) -> Tensor:
    """Solve A x = b for a symmetric positive definite A by conjugate gradients.

    Args:
        matvec: x ↦ A x.
        b: right-hand side [n].
        max_iter: at most so many products (a preconditioner's own not counted); default 10 n.
        tol: stop where ‖b − A x‖ ≤ tol ‖b‖.
        x0: start on the line through x0, where the residual is smallest, for one of the products; default 0.
        preconditioner: (matvec, b) ↦ (r ↦ P⁻¹ r), for example `partial(nystrom_inverse, rank=10)`.

    Raises:
        ValueError: where a direction of curvature ≤ 0 is met: A is not positive definite, so the point is not a strict
            minimum.
    """
    precondition = preconditioner(matvec, b) if preconditioner is not None else lambda r: r
    x, r = _start(matvec, b, x0)
    d = z = precondition(r)
    rz = r @ z
    stop = tol * torch.linalg.vector_norm(b)
    for _ in range(10 * b.numel() if max_iter is None else max_iter - (x0 is not None)):
        if torch.linalg.vector_norm(r) <= stop:
            break
        ad = matvec(d)
        curvature = d @ ad
        if curvature <= 0:
            raise ValueError(
                "cg met a direction of curvature ≤ 0: the training loss has no strict minimum here. Train to a minimum, "
                "add weight decay, or use solver=hypergrad.solvers.neumann."
            )
        a = rz / curvature
        x, r = x + a * d, r - a * ad
        z = precondition(r)
        rz, old = r @ z, rz
        d = z + (rz / old) * d
    return x


# A⁻¹ = α Σ_j (I − αA)ʲ for ‖I − αA‖ < 1 (Lorraine, Vicol & Duvenaud 2019, arXiv 1911.02590, eq. 8)
def neumann(
    matvec: Matvec, b: Tensor, terms: int = 100, scale: float | None = None, x0: Tensor | None = None
) -> Tensor:
    """Approximate A⁻¹ b by the first terms of the Neumann series α Σ_j (I − αA)ʲ b.

    Args:
        matvec: x ↦ A x.
        b: right-hand side [n].
        terms: number of terms; one product each after the first.
        scale: α, below 2/λ_max(A); default 1/λ_max as found by ten power iterations, with a margin of a tenth.
        x0: start on the line through x0, where the residual is smallest, for one more product; the series is then that
            of what is left.
    """
    if scale is None:
        v = b / torch.linalg.vector_norm(b).clamp_min(torch.finfo(b.dtype).tiny)
        norm = torch.ones((), dtype=b.dtype, device=b.device)
        for _ in range(10):
            v = matvec(v)
            norm = torch.linalg.vector_norm(v).clamp_min(torch.finfo(b.dtype).tiny)
            v = v / norm
        scale = float(1 / (1.1 * norm))
    x, term = _start(matvec, b, x0)
    total = term
    for _ in range(terms - 1):
        term = term - scale * matvec(term)
        total = total + term
    return x + scale * total


def nystrom(
    matvec: Matvec,
    b: Tensor,
    rank: int = 20,
    rho: float = 1e-2,
    shift: float = 0.0,
    seed: int = 0,
    x0: Tensor | None = None,
) -> Tensor:
    """Approximate (A + ρI)⁻¹ b with A's Nyström approximation of low rank: min(rank, n) products, none of which needs another.

    Hataya & Yamada 2023, arXiv 2302.09726, eq. 6. Good where A's spectrum falls off within `rank`, to `shift`: eigenvalues
    after these count as that. At full rank it is (A + ρI)⁻¹ b itself.

    Args:
        matvec: x ↦ A x, A symmetric positive semi-definite.
        b: right-hand side [n].
        rank: r. Memory 3 r n.
        rho: ρ, of the size of what is left out of the eigenvalues; ρ + shift > 0.
        shift: σ, a known lower bound of A's eigenvalues: the smallest weight decay, in `hypergradient`. A − σI is then what is
            approximated. Without it, a decay that every eigenvalue has hides their fall from the sketch.
        seed: of the sketch; random numbers of the caller's are not drawn.
        x0: start on the line through x0, where the residual is smallest, for one more product.

    Raises:
        ValueError: rank or ρ + σ not positive; curvature of −ρ or less in the sketch.
    """
    inverse = nystrom_inverse(matvec, b, rank, rho, shift, seed)
    x, r = _start(matvec, b, x0)
    return x + inverse(r)


# With D = A − σI, Ω [n, r] of orthonormal columns, Y = DΩ and W = ΩᵀY:   D ≈ D_r = Y W⁺ Yᵀ.
# W = V diag(w) Vᵀ, over w > 0:                                            D_r = B Bᵀ,   B = Y V w^(−1/2).
# B = U S Qᵀ:                                                              D_r = U S² Uᵀ,   UᵀU = I.
# Woodbury, with τ = ρ + σ:    (τI + D_r)⁻¹ = τ⁻¹(I − U S² (τI + S²)⁻¹ Uᵀ) = τ⁻¹(I − UUᵀ) + U (τI + S²)⁻¹ Uᵀ,
# the last form without the difference of two numbers of size 1/τ. (The paper has σ = 0, inverts W + YᵀY/ρ, and draws r
# columns of A: Ω = columns of I. An orthonormal Gaussian Ω costs the same products. Where eigenvectors spread over all
# coordinates both are alike; on softmax regression with features of very unequal size, at half the full rank, it is at
# least five times as accurate: tests/test_solvers.py.)
def nystrom_inverse(
    matvec: Matvec, b: Tensor, rank: int = 20, rho: float = 1e-2, shift: float = 0.0, seed: int = 0
) -> Apply:
    """The map r ↦ x of `nystrom`, for vectors like b: also a preconditioner of `cg`."""
    if rank < 1 or not rho >= 0 or not rho + shift > 0:
        raise ValueError(
            f"nystrom needs a rank from 1, rho from 0 and rho + shift > 0, got rank={rank!r}, rho={rho!r}, shift={shift!r}."
        )
    n = b.numel()
    gauss = torch.randn(n, min(rank, n), generator=torch.Generator().manual_seed(seed), dtype=b.dtype)
    omega = torch.linalg.qr(gauss.to(b.device)).Q
    y = torch.stack([matvec(column) for column in omega.T], dim=1) - shift * omega
    w, v = torch.linalg.eigh((omega.T @ y + y.T @ omega) / 2)
    noise = len(w) * torch.finfo(w.dtype).eps * (w[-1].abs() + abs(shift))
    if w[0] < -rho - noise:
        raise ValueError(
            f"nystrom met curvature {float(w[0]) + shift:.3g}, below shift − rho: the training loss has no minimum here, or "
            f"shift={shift:g} is too large. Train to a minimum, add weight decay, or pass a larger rho than {rho:g}."
        )
    kept, tau = w > noise, rho + shift
    u, s, _ = torch.linalg.svd(y @ (v[:, kept] * w[kept].rsqrt()), full_matrices=False)

    def apply(r: Tensor) -> Tensor:
        inside = u.T @ r
        outside = r - u @ inside
        outside = outside - u @ (u.T @ outside)  # once more, as it is divided by τ
        return u @ (inside / (s.square() + tau)) + outside / tau

    return apply


class WarmStart:
    """A solver that starts from its own last answer: for solves along a run, where one differs little from the next.

        solver = hypergrad.solvers.WarmStart(hypergrad.solvers.cg, max_iter=10)
        for part in parts_of_training:
            hypergradient(..., mode="implicit", solver=solver)

    The start is the best multiple of the last answer (‖b − c A x‖ is least), so it is never a worse one than 0. Where b has
    another shape, or the last answer was not finite, it starts from 0.

    Args:
        solve: `cg`, `neumann`, `nystrom`, or any solve(matvec, b, x0=None).
        options: passed on to it.

    Attributes:
        x: the last answer [n], or None.

    Example:
        >>> A, b = torch.diag(torch.tensor([1.0, 2.0, 4.0])), torch.ones(3)
        >>> solver = WarmStart(cg, max_iter=2)
        >>> [round(float((A @ solver(lambda x: A @ x, b) - b).norm()), 4) for _ in range(3)]
        [0.3207, 0.1618, 0.0919]
    """

    def __init__(self, solve: Solve, **options: Any):
        if not callable(solve):
            raise TypeError(f"WarmStart needs a function solve(matvec, b, x0=None), got {type(solve).__name__}.")
        try:
            inspect.signature(solve).bind(None, None, x0=None, **options)
        except TypeError as error:
            raise TypeError(
                f"WarmStart needs a function solve(matvec, b, x0=None) that takes its options: {error}."
            ) from None
        self.solve, self.options = solve, options
        self.x: Tensor | None = None

    def __call__(self, matvec: Matvec, b: Tensor) -> Tensor:
        start = None if self.x is None or self.x.shape != b.shape else self.x.to(b)
        x = self.solve(matvec, b, x0=start, **self.options)
        self.x = x.detach().clone() if bool(x.isfinite().all()) else None
        return x

    def state_dict(self) -> dict[str, Any]:
        return {"x": self.x}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if "x" not in state:
            raise ValueError("this is not the state_dict of a hypergrad.solvers.WarmStart: it has no 'x'.")
        self.x = state["x"]


# The point c x₀ with the smallest residual, c = (A x₀)ᵀb / ‖A x₀‖². Its residual is never above ‖b‖, that of 0.
def _start(matvec: Matvec, b: Tensor, x0: Tensor | None) -> tuple[Tensor, Tensor]:
    """A start x, and its residual b − A x."""
    if x0 is None:
        return torch.zeros_like(b), b.clone()
    ax = matvec(x0)
    c = (ax @ b) / (ax @ ax).clamp_min(torch.finfo(b.dtype).tiny)
    return c * x0, b - c * ax
