"""The cases are what their names say; otherwise the table would test less than it seems to."""

from __future__ import annotations

import torch

from tests.cases import Case
from tests.oracle import train
from tests.problems import Setup


def gradients(case: Case) -> list[list[torch.Tensor | None]]:
    """Every step's gradients in the stock loop, before clipping."""
    setup, seen = case.build(), []

    def look(setup: Setup) -> None:
        seen.append([None if p.grad is None else p.grad.clone() for p in setup.model.parameters()])

    setup.optimizer.register_step_pre_hook(lambda *_: look(setup))
    train(setup, {})
    return seen


def norms(case: Case) -> list[float]:
    return [float(torch.cat([g.flatten() for g in grads if g is not None]).norm()) for grads in gradients(case)]


def test_relus_are_dead() -> None:
    for weight, bias, *_ in gradients(Case("mlp", "adam")):
        assert weight is not None
        assert bias is not None
        assert not weight[:2].any()
        assert not bias[:2].any()
        assert (bias[2:] != 0).all()


def test_embedding_rows_are_unused() -> None:
    used = torch.stack([grads[0].abs().sum(1) > 0 for grads in gradients(Case("embedding", "adam"))])
    assert not used[:, 8:].any()
    assert used[:, :8].any(0).all()
    assert not used[:, :8].all()


def test_clipping_is_active_at_some_steps() -> None:
    active = [n > 0.245 for n in norms(Case("mlp", "momentum"))]
    assert any(active)
    assert not all(active)
    steps = [torch.cat([g.flatten().abs() for g in grads]) > 0.05 for grads in gradients(Case("mlp", "momentum"))]
    assert all(over.any() and not over.all() for over in steps)


def test_frozen_and_unused_parameters_have_no_gradient() -> None:
    setup = Case("tied_frozen", "adam").build()
    train(setup, {})
    assert setup.model.unused.grad is None
    assert all(p.grad is None for p in setup.model.frozen.parameters())
    assert setup.model.encode.weight.grad is not None


def test_live_optimizer_has_state() -> None:
    setup = Case("mlp_live", "adam").build()
    assert all(setup.optimizer.state[p]["step"] == 3 for p in setup.model.parameters())


def test_amsgrad_remembers_a_larger_second_moment() -> None:
    setup = Case("mlp", "adam_amsgrad").build()
    train(setup, {})
    state = setup.optimizer.state[setup.model[2].weight]
    over = state["max_exp_avg_sq"] > state["exp_avg_sq"]
    assert over.any()
    assert not over.all()
