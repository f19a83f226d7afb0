"""Linear solvers against a direct solve."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import hessian
from torch.nn.functional import cross_entropy

from hypergrad.solvers import WarmStart, cg, neumann, nystrom, nystrom_inverse

DIRECT = 1e-8  # relative; cg stops at a residual of 1e-12, times the condition number 1e3


def system(n: int = 30, condition: float = 1e3) -> tuple[Tensor, Tensor]:
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))
    return q @ torch.diag(torch.logspace(0, torch.tensor(condition).log10().item(), n).double()) @ q.T, q.sum(1) + 1


def assert_close(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert torch.linalg.vector_norm(got - want) <= tolerance * torch.linalg.vector_norm(want)


def eye(b: Tensor) -> Tensor:
    return torch.eye(len(b), dtype=b.dtype)


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
    step = eye(b) - 0.05 * a
    want = 0.05 * sum(torch.linalg.matrix_power(step, j) @ b for j in range(terms))
    assert_close(neumann(lambda x: a @ x, b, terms=terms, scale=0.05), want, 1e-13)


def test_neumann_converges_at_its_own_scale() -> None:
    a, b = system(condition=20.0)
    assert_close(neumann(lambda x: a @ x, b, terms=1000), torch.linalg.solve(a, b), DIRECT)


# ---- Nyström


def decaying(n: int = 40, each: float = 0.5) -> tuple[Tensor, Tensor]:
    """Eigenvalues 1, ½, ¼, …"""
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))
    return (q * each ** torch.arange(n).double()) @ q.T, torch.randn(n, dtype=torch.float64)


def error(got: Tensor, want: Tensor) -> float:
    return float(torch.linalg.vector_norm(got - want) / torch.linalg.vector_norm(want))


@pytest.mark.parametrize("rho", [1e-10, 1e-2])
@pytest.mark.parametrize("rank", [30, 100])
def test_nystrom_at_full_rank_is_a_direct_solve(rank: int, rho: float) -> None:
    a, b = system()
    want = torch.linalg.solve(a + rho * eye(b), b)
    assert_close(nystrom(lambda x: a @ x, b, rank=rank, rho=rho), want, DIRECT)


def test_nystrom_is_exact_on_a_matrix_of_its_rank() -> None:
    a, b = decaying(each=0.8)
    w, q = torch.linalg.eigh(a)
    a = (q[:, -6:] * w[-6:]) @ q[:, -6:].T
    want = torch.linalg.solve(a + 0.1 * eye(b), b)
    assert_close(nystrom(lambda x: a @ x, b, rank=8, rho=0.1), want, DIRECT)


def softmax_hessian(n: int = 200, features: int = 12, classes: int = 4) -> Tensor:
    """At θ = 0, with features from size 1 down to 1/100."""
    x, y = torch.randn(n, features).double() * torch.logspace(0, -2, features), torch.randint(classes, (n,))
    start = torch.zeros(features * classes, dtype=torch.float64)
    return hessian(lambda theta: cross_entropy(x @ theta.view(features, classes), y), start)  # type: ignore[return-value]


def test_nystrom_by_a_gaussian_sketch_is_better_than_by_columns() -> None:
    """The paper's own sketch, r columns of A and its equation 6, as the reference; the median of 20 seeds."""
    rank, rho, errors = 24, 1e-2, {"columns": [], "gaussian": []}
    a = softmax_hessian()
    for seed in range(20):
        torch.manual_seed(seed)
        b = torch.randn(len(a), dtype=torch.float64)
        want = torch.linalg.solve(a + rho * eye(b), b)
        chosen = torch.randperm(len(b))[:rank]
        c, w = a[:, chosen], a[chosen][:, chosen]
        by_columns = b / rho - c @ torch.linalg.solve(w + c.T @ c / rho, c.T @ b) / rho**2
        errors["columns"].append(error(by_columns, want))
        errors["gaussian"].append(error(nystrom(lambda x: a @ x, b, rank=rank, rho=rho, seed=seed), want))
    gaussian, columns = (sorted(errors[name])[10] for name in ("gaussian", "columns"))
    assert gaussian < 0.05
    assert columns > 5 * gaussian


def test_nystrom_draws_by_its_seed_alone() -> None:
    a, b = decaying()
    state = torch.get_rng_state()
    x, again, other = (nystrom(lambda x: a @ x, b, rank=5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, again)
    assert not torch.equal(x, other)


@pytest.mark.parametrize(
    ("options", "match"), [({"rank": 0}, "rank"), ({"rho": 0.0}, "rho"), ({"rho": float("nan")}, "rho")], ids=str
)
def test_nystrom_refuses(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        nystrom(lambda x: x, torch.ones(3), **options)


def test_nystrom_refuses_a_saddle_that_rho_does_not_lift() -> None:
    a = torch.diag(torch.tensor([1.0, 2.0, -0.5]))
    with pytest.raises(ValueError, match="larger rho"):
        nystrom(lambda x: a @ x, torch.ones(3), rank=3, rho=0.4)
    assert nystrom(lambda x: a @ x, torch.ones(3), rank=3, rho=0.6).isfinite().all()


def test_nystrom_preconditions_cg() -> None:
    """Eigenvalues from 1 down to 1e-4: the products of the preconditioner included, fewer than half of plain CG's."""
    a, b = decaying(60, each=0.7)
    a = a + 1e-4 * eye(b)
    calls = 0

    def matvec(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return a @ x

    count = {}
    for name, options in {
        "plain": {},
        "preconditioned": {"preconditioner": partial(nystrom_inverse, rank=25, rho=1e-4)},
    }.items():
        calls = 0
        assert_close(cg(matvec, b, **options), torch.linalg.solve(a, b), DIRECT)
        count[name] = calls
    assert 25 < count["preconditioned"] < count["plain"] / 2


# ---- starts other than 0

STARTED: dict[str, Any] = {
    "cg": partial(cg, max_iter=8),
    "neumann": partial(neumann, terms=20),
    "nystrom": partial(nystrom, rank=20, rho=5.0),
}


def residual(a: Tensor, x: Tensor, b: Tensor) -> float:
    return error(a @ x, b)


@pytest.mark.parametrize("name", STARTED)
def test_a_start_at_the_answer_or_a_multiple_of_it_is_kept(name: str) -> None:
    a, b = system(condition=50.0)
    want = torch.linalg.solve(a, b)
    assert_close(STARTED[name](lambda x: a @ x, b, x0=-3 * want), want, DIRECT)


@pytest.mark.parametrize("solver", [cg, partial(neumann, terms=3000)], ids=["cg", "neumann"])
def test_the_answer_does_not_depend_on_the_start(solver: Any) -> None:
    a, b = system(condition=50.0)
    assert_close(solver(lambda x: a @ x, b, x0=torch.randn_like(b)), torch.linalg.solve(a, b), DIRECT)


def test_cg_counts_the_product_of_its_start() -> None:
    a, b = system()
    calls: list[Tensor] = []
    for x0 in (None, torch.randn_like(b)):
        calls.clear()
        cg(lambda x: calls.append(x) or a @ x, b, max_iter=5, x0=x0)
        assert len(calls) == 5


@pytest.mark.parametrize("name", STARTED)
def test_warm_started_solves_of_a_system_that_drifts(name: str) -> None:
    """A and b change by a hundredth each time; the same solver at the same number of products, from 0 and from its last x."""
    cold = STARTED[name]
    warm = WarmStart(cold)
    a, b = system(condition=50.0)
    residuals: list[tuple[float, float]] = []
    for _ in range(6):
        a, b = a + 0.01 * torch.diag(torch.rand_like(b)), b + 0.01 * torch.randn_like(b)
        residuals.append(tuple(residual(a, s(lambda x, a=a: a @ x, b), b) for s in (warm, cold)))  # type: ignore[arg-type]
    assert residuals[0][0] == residuals[0][1]
    assert all(w < c / 3 for w, c in residuals[3:]), residuals


def test_warm_start_state_and_resets() -> None:
    a, b = system()
    one, other = WarmStart(cg, max_iter=4), WarmStart(cg, max_iter=4)
    assert one.state_dict() == {"x": None}
    one(lambda x: a @ x, b)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(lambda x: a @ x, b), other(lambda x: a @ x, b))
    shorter = a[:9, :9]
    assert torch.equal(one(lambda x: shorter @ x, b[:9]), cg(lambda x: shorter @ x, b[:9], max_iter=4))
    one.x = one.x * float("nan")  # type: ignore[operator]
    one(lambda x: shorter @ x, b[:9])
    assert one.x is None
    with pytest.raises(ValueError, match="WarmStart"):
        one.load_state_dict({})


@pytest.mark.parametrize(
    ("solve", "options"),
    [(lambda matvec, b: b, {}), (cg, {"terms": 3}), ("cg", {})],
    ids=["no x0", "an option of another", "a name"],
)
def test_warm_start_refuses(solve: Any, options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="x0"):
        WarmStart(solve, **options)
