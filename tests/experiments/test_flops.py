import pytest
import torch

from experiments import flops

A = torch.ones(4, 5)
B = torch.ones(5, 6)
PRODUCT = 2 * 4 * 5 * 6  # a multiplication and an addition each


def test_a_matrix_product_has_its_textbook_count():
    assert flops.count(lambda: A @ B) == PRODUCT


def test_second_derivatives_are_counted():
    w = torch.ones(5, 6, requires_grad=True)

    def twice():
        loss = (A @ w).square().sum()
        (g,) = torch.autograd.grad(loss, w, create_graph=True)
        torch.autograd.grad((g * g.detach()).sum(), w)

    # Forward A·w; backward Aᵀ·r; the product with a vector once more each way.
    assert flops.count(twice) == 4 * PRODUCT


@pytest.mark.parametrize("steps", [50, 600, 10_000])
def test_a_run_with_a_fixed_cost_and_a_phase_is_counted_exactly(steps):
    def run(length: int) -> None:
        products = 7 + length + length * 3 // 10
        for _ in range(products):
            torch.mm(A, B)

    assert flops.whole_run(run, steps, short=300) == flops.count(lambda: run(steps))
