"""What hangs on the accumulation of gradients runs under `tuner.backward` as under `loss.backward()`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hypergrad
from tests.online.live_loops import STEPS, as_given, data, float64, mse, slope, validation

__all__ = ["float64"]  # the fixture

Watch = Callable[[nn.Module, list[Any]], Any]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))


def sgd(model: nn.Module, lr: float = 0.05) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.8, weight_decay=0.01)


def post_accumulate(model: nn.Module, seen: list[Any]) -> None:
    """Notes what is in .grad, and changes it: as clipping of each parameter by itself would."""

    def hook(p: Tensor) -> None:
        assert p.grad is not None
        seen.append(p.grad.clone())
        p.grad.mul_(0.5)

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(hook)


def after_node(model: nn.Module, seen: list[Any]) -> list[Any]:
    """As Horovod does: a hook on the node that accumulates, which the caller keeps alive."""
    nodes = [p.expand_as(p).grad_fn.next_functions[0][0] for p in model.parameters()]  # type: ignore[union-attr]
    for node, p in zip(nodes, model.parameters(), strict=True):
        node.register_hook(lambda *_, p=p: seen.append(p.grad.clone()))
    return nodes


def before_node(model: nn.Module, seen: list[Any]) -> list[Any]:
    nodes = [p.expand_as(p).grad_fn.next_functions[0][0] for p in model.parameters()]  # type: ignore[union-attr]
    for node in nodes:
        node.register_prehook(lambda grads: seen.append(grads[0].clone()))
    return nodes


def on_tensor(model: nn.Module, seen: list[Any]) -> None:
    """Runs once, on the gradient: not again as it is accumulated."""

    def hook(g: Tensor) -> Tensor:
        seen.append(g.detach().clone())
        return g * 0.5

    for p in model.parameters():
        p.register_hook(hook)


@pytest.mark.filterwarnings("ignore:the gradients were changed")
@pytest.mark.parametrize("watch", [post_accumulate, after_node, before_node, on_tensor])
@pytest.mark.parametrize("zeros", [False, True])
def test_hooks_see_what_they_see_under_loss_backward(watch: Watch, zeros: bool) -> None:
    runs = []
    for tuned in (False, True):
        model, seen = net(), list[Any]()
        kept = watch(model, seen)
        opt = sgd(model)
        tuner = as_given(model, opt, validation(model)) if tuned else None
        if tuner is not None:
            tuner.freeze()
        seen.clear()
        grads = []
        for x, y in data()[0]:
            opt.zero_grad(set_to_none=not zeros)
            for part in (slice(0, 3), slice(3, 6)):
                loss = mse(model, (x[part], y[part])) / 2
                loss.backward() if tuner is None else tuner.backward(loss)
            grads += [p.grad.clone() for p in model.parameters() if p.grad is not None]
            opt.step()
        del kept
        runs.append((seen, grads, [p.detach() for p in model.parameters()]))
    assert len(runs[0][0]) == STEPS * 2 * 4
    for plain, tuned in zip(*runs, strict=True):
        plain, tuned = (sorted(x, key=lambda t: (t.shape, t.flatten().tolist())) for x in (plain, tuned))
        assert all(torch.equal(a, b) for a, b in zip(plain, tuned, strict=True))


def test_a_hook_that_changes_gradients_is_a_change_that_is_not_known() -> None:
    model = net()
    post_accumulate(model, [])
    opt = sgd(model)
    tuner = as_given(model, opt, validation(model))
    with pytest.warns(UserWarning, match="changed between tuner.backward and optimizer.step"):
        for batch in data()[0]:
            opt.zero_grad()
            tuner.backward(mse(model, batch))
            opt.step()
    assert tuner.stats["changed_gradients"] == STEPS


def test_gradients_share_no_memory_with_the_graph() -> None:
    model = net()
    opt = sgd(model)
    tuner = as_given(model, opt, validation(model))
    loss = mse(model, data()[0][0])
    tuner.backward(loss, retain_graph=True)
    first = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    for p in model.parameters():
        assert p.grad is not None and not p.grad.requires_grad
        p.grad.zero_()
    tuner.backward(loss)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), first, strict=True))  # type: ignore[arg-type]


def test_inputs_that_are_no_leaves() -> None:
    runs = []
    for tuned in (False, True):
        model, seen = net(), list[Tensor]()
        opt = sgd(model)
        tuner = as_given(model, opt, validation(model)) if tuned else None
        if tuner is not None:
            tuner.freeze()
        for x, y in data()[0][:3]:
            opt.zero_grad()
            hidden = torch.tanh(model[0](x))  # type: ignore[index]
            loss = (model[2](hidden) - y).square().mean()  # type: ignore[index]
            given = [hidden, *model[2].parameters()]  # type: ignore[index]
            loss.backward(inputs=given) if tuner is None else tuner.backward(loss, inputs=given)
            opt.step()
            hidden.retain_grad()  # no warning where .grad is read
            assert model[0].weight.grad is None  # type: ignore[index]
            seen += [z.grad.clone() for z in given]
        runs.append(seen)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_an_optimizer_that_steps_in_the_backward_pass() -> None:
    """One for each parameter, which also frees its gradient: hypergradients are finite differences of that loop."""

    def loop(lr: float, tuned: bool) -> tuple[float, hypergrad.Tuner | None, list[Tensor]]:
        model = net()
        opts = {p: torch.optim.SGD([p], lr=lr, momentum=0.8) for p in model.parameters()}

        def hook(p: Tensor) -> None:
            opts[p].step()
            opts[p].zero_grad()

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(hook)
        validate = validation(model)
        given = {"tune": "lr", "every": STEPS, "average": False}
        tuner = as_given(model, list(opts.values()), validate, **given) if tuned else None
        for batch in data()[0]:
            loss = mse(model, batch)
            loss.backward() if tuner is None else tuner.backward(loss)
            assert all(p.grad is None for p in model.parameters())
        return float(validate().detach()), tuner, [p.detach() for p in model.parameters()]

    _, tuner, weights = loop(0.05, True)
    assert tuner is not None
    assert tuner.stats["steps"] == STEPS and tuner.stats["changed_gradients"] == tuner.stats["plain_steps"] == 0
    assert all(torch.equal(a, b) for a, b in zip(weights, loop(0.05, False)[2], strict=True))
    assert float(tuner.hypergradients["lr"].sum()) == pytest.approx(slope(lambda x: loop(0.05 + x, False)[0]), rel=1e-6)
