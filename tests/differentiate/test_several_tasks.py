"""Several data sets that share their numbers, and several losses whose weights are learned: the examples of docs/several.md."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import hypergrad

STEPS, TASKS = 20, 3


class Tasks(nn.Module):
    """A model a task, trained side by side: one run, one lr, one weight decay."""

    def __init__(self) -> None:
        super().__init__()
        self.models = nn.ModuleList(nn.Linear(4, 1).double() for _ in range(TASKS))


def draw(seed: int) -> tuple[Tensor, Tensor]:
    """[tasks, rows, …]: inputs, and targets in each task's own units, standardised: one lr can only suit losses of one scale."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(TASKS, 24, 4, generator=g, dtype=torch.float64)
    y = x.sum(-1, keepdim=True) + 0.5 * torch.randn(TASKS, 24, 1, generator=g, dtype=torch.float64)
    y = y * torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64).view(-1, 1, 1)
    return x, y / y.std(dim=(1, 2), keepdim=True)


def normalised(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return mse_loss(model(x), y) / y.var()


def task_losses(model: Tasks, data: tuple[Tensor, Tensor]) -> Tensor:
    return torch.stack([normalised(m, x, y) for m, x, y in zip(model.models, *data, strict=True)])


def fresh() -> tuple[Tasks, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Tasks()
    return model, torch.optim.SGD(model.parameters(), lr=0.01, weight_decay=1e-3)


def test_the_hypergradient_of_shared_numbers_is_the_mean_of_the_tasks_own():
    train, val = draw(1), draw(2)
    model, sgd = fresh()
    together = hypergrad.hypergradient(
        model, sgd, lambda m, _: task_losses(m, train).sum(), [None] * STEPS, lambda: task_losses(model, val).mean()
    )
    own = []
    for i, m in enumerate(model.models):
        alone = torch.optim.SGD(m.parameters(), lr=0.01, weight_decay=1e-3)
        own.append(
            hypergrad.hypergradient(
                m,
                alone,
                lambda m, _, i=i: normalised(m, train[0][i], train[1][i]),
                [None] * STEPS,
                lambda m=m, i=i: normalised(m, val[0][i], val[1][i]),
            )
        )
    for name in ("lr", "weight_decay"):
        mean = torch.stack([r.gradients[name] for r in own]).mean(0)
        torch.testing.assert_close(together.gradients[name], mean, rtol=1e-9, atol=1e-12)


def test_one_lr_and_decay_are_tuned_for_all_tasks():
    train, val = draw(1), draw(2)

    def build(seed: int) -> hypergrad.Run:
        model, sgd = fresh()
        batches = [None] * STEPS
        return hypergrad.Run(
            model, sgd, batches, lambda m, _: task_losses(m, train).sum(), lambda: task_losses(model, val).mean()
        )

    found = hypergrad.tune_run(build, {"lr": None, "weight_decay": None}, outer_steps=10, outer_lr=0.5, horizons=(1.0,))
    assert found.values["lr"].shape == (1,)
    assert found.value < 0.7 * found.history[0]["value"]


def test_weights_of_losses_leave_the_one_that_only_distracts():
    """A head of use and one of noise share a layer; validation is the useful one's loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 2)).double()
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    g = torch.Generator().manual_seed(3)
    x = torch.randn(2, 32, 6, generator=g, dtype=torch.float64)
    y = torch.stack([x[..., 0], 3 * torch.randn(2, 32, generator=g, dtype=torch.float64)], -1)
    tuner = hypergrad.Tuner(
        model,
        sgd,
        lambda: mse_loss(model(x[1])[:, 0], y[1, :, 0]),
        tune=(),
        hypers={"mix": hypergrad.Hyperparameter(torch.zeros(2, dtype=torch.float64), bounds=(-3, 3))},
    )
    for _ in range(300):
        losses = (model(x[0]) - y[0]).square().mean(0)
        sgd.zero_grad()
        tuner.backward(tuner.hypers["mix"].softmax(0) @ losses)
        sgd.step()
    weights = tuner.hypers["mix"].detach().softmax(0)
    assert weights[0] > 0.7
