"""Linear solvers against a direct solve."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hypergrad.solvers import cg, neumann

DIRECT = 1e-8  # relative; cg stops at a residual of 1e-12, times the condition number 1e3


def system(n: int = 30, condition: float = 1e3) -> tuple[Tensor, Tensor]:
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))
    return q @ torch.diag(torch.logspace(0, torch.tensor(condition).log10().item(), n).double()) @ q.T, q.sum(1) + 1


def assert_close(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert torch.linalg.vector_norm(got - want) <= tolerance * torch.linalg.vector_norm(want)


def test_cg_is_a_direct_solve() -> None:
    a, b = system()
    assert_close(cg(lambda x: a @ x, b), torch.linalg.solve(a, b), DIRECT)


def test_trap_cg_direction_from_the_old_residual() -> None:
    """cg minimises xᵀA x/2 − bᵀx over the Krylov space of every iteration; a wrong β loses that after two."""
    a, b = system(condition=50.0)
    basis = b[:, None]
    for k in range(1, 9):
        q, _ = torch.linalg.qr(basis)
        best = q @ torch.linalg.solve(q.T @ a @ q, q.T @ b)
        assert_close(cg(lambda x: a @ x, b, max_iter=k), best, DIRECT)
        basis = torch.cat([basis, a @ q[:, -1:]], dim=1)


def test_cg_of_zero_is_zero() -> None:
    a, b = system()
    assert not cg(lambda x: a @ x, 0 * b).any()


def test_cg_refuses_a_saddle() -> None:
    a = torch.diag(torch.tensor([1.0, -1.0]))
    with pytest.raises(ValueError, match="neumann"):
        cg(lambda x: a @ x, torch.tensor([0.1, 1.0]))


@pytest.mark.parametrize("terms", [1, 2, 7])
def test_neumann_is_its_truncated_series(terms: int) -> None:
    a, b = system(condition=20.0)
    step = torch.eye(len(b)).double() - 0.05 * a
    want = 0.05 * sum(torch.linalg.matrix_power(step, j) @ b for j in range(terms))
    assert_close(neumann(lambda x: a @ x, b, terms=terms, scale=0.05), want, 1e-13)


def test_neumann_converges_at_its_own_scale() -> None:
    a, b = system(condition=20.0)
    assert_close(neumann(lambda x: a @ x, b, terms=1000), torch.linalg.solve(a, b), DIRECT)
