"""Members of a population are trained and tuned as each would be alone."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import hypergrad
from hypergrad.online.population import Population

ROUNDING = 1e-11  # sums of a batched matrix product have another order
OPTIMIZERS = {
    "sgd": lambda p, lr, wd: torch.optim.SGD(p, lr=lr, weight_decay=wd),
    "momentum": lambda p, lr, wd: torch.optim.SGD(p, lr=lr, weight_decay=wd, momentum=0.9, nesterov=True),
    "adamw": lambda p, lr, wd: torch.optim.AdamW(p, lr=lr / 10, weight_decay=wd, eps=1e-3),
}
LRS, DECAYS, STEPS = (0.01, 0.05, 0.1), (1e-3, 1e-2, 1e-1), 12


@pytest.fixture(autouse=True)
def float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def members(kind: str, which: tuple[int, ...] = (0, 1, 2)):
    models = []
    for i in which:
        torch.manual_seed(i)
        models.append(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 1)))
    return models, [OPTIMIZERS[kind](m.parameters(), LRS[i], DECAYS[i]) for i, m in zip(which, models, strict=True)]


@cache  # drawn outside of vmap
def data() -> tuple[list[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(STEPS + 1, 16, 4, generator=generator, dtype=torch.float64)
    y = torch.randn(STEPS + 1, 16, 1, generator=generator, dtype=torch.float64)
    return list(zip(x[:-1], y[:-1], strict=True)), (x[-1], y[-1])


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return mse_loss(model(batch[0]), batch[1])


def val_loss(model: nn.Module) -> Tensor:
    return loss(model, data()[1])


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_each_member_trains_as_with_its_own_torch_optimizer(kind):
    models, optimizers = members(kind)
    population = Population(models, optimizers, loss, tune=())
    for batch in data()[0]:
        population.step(batch)
    population.close()
    alone, own = members(kind)
    for model, optimizer in zip(alone, own, strict=True):
        for batch in data()[0]:
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
    for a, b, mine, stock in zip(models, alone, optimizers, own, strict=True):
        torch.testing.assert_close(flat(a), flat(b), rtol=ROUNDING, atol=ROUNDING)
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            for name, x in stock.state[q].items():
                if torch.is_tensor(x):
                    torch.testing.assert_close(mine.state[p][name], x, rtol=ROUNDING, atol=ROUNDING, check_dtype=False)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_each_member_has_the_hypergradient_it_has_alone(kind):
    models, optimizers = members(kind)
    population = Population(models, optimizers, loss, val_loss, every=None)
    for batch in data()[0]:
        population.step(batch)
    found = population.hypergradients()
    for i, (model, optimizer) in enumerate(zip(*members(kind), strict=True)):
        alone = hypergrad.hypergradient(model, optimizer, loss, data()[0], lambda model=model: val_loss(model))
        for name, x in alone.gradients.items():
            torch.testing.assert_close(found[name][i], x[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_each_member_is_tuned_as_alone(kind):
    def tuned(which):
        population = Population(*members(kind, which), loss, val_loss, every=3)
        for batch in data()[0]:
            population.step(batch)
        return population

    together = tuned((0, 1, 2))
    assert together.hyper_steps == STEPS // 3
    for i in range(3):
        alone = tuned((i,))
        torch.testing.assert_close(together.theta[i], alone.theta[0], rtol=1e-9, atol=1e-10)
        for name, x in alone.values.items():
            torch.testing.assert_close(together.values[name][i], x[0], rtol=1e-9, atol=0)
            assert together.values[name][i] != (LRS if name == "lr" else DECAYS)[i]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_closed_after_tuning_torch_goes_on_where_it_was(kind):
    """Weights, optimizer state and tuned values: the next stock step is the population's."""
    models, optimizers = members(kind)
    population = Population(models, optimizers, loss, val_loss, every=3)
    for batch in data()[0][:7]:
        population.step(batch)
    assert population.hyper_steps == 2
    population.close()
    for i, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
        assert torch.equal(flat(model), population.theta[i])
        for name, values in population.values.items():
            assert optimizer.param_groups[0][name] == values[i] != (LRS if name == "lr" else DECAYS)[i]
    population.step(data()[0][7])
    for i, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
        optimizer.zero_grad()
        loss(model, data()[0][7]).backward()
        optimizer.step()
        torch.testing.assert_close(flat(model), population.theta[i], rtol=ROUNDING, atol=ROUNDING)
        if kind == "adamw":
            assert {float(state["step"]) for state in optimizer.state.values()} == {8.0}


def test_values_move_as_torchs_adam_moves_them():
    """φ = log lr under torch.optim.Adam, on the population's own hypergradients."""
    models, optimizers = members("sgd")
    population = Population(models, optimizers, loss, val_loss, every=3)
    phi = [nn.Parameter(population.values[name].log()) for name in ("lr", "weight_decay")]
    outer = torch.optim.Adam(phi, lr=0.1, betas=(0.8, 0.95), eps=0.0)
    for t, batch in enumerate(data()[0], 1):
        population.every = None if t % 3 == 0 else 3
        population.step(batch)
        if t % 3 == 0:
            for p, d in zip(phi, population._along(), strict=True):
                p.grad = d
            population._hyper_step()
            outer.step()
            for p, name in zip(phi, population.values, strict=True):
                torch.testing.assert_close(population.values[name], p.detach().exp(), rtol=1e-10, atol=0)


def test_members_may_have_batches_of_their_own():
    models, optimizers = members("sgd")
    population = Population(models, optimizers, loss, tune=())
    batches = data()[0][:3]
    losses = population.step(tuple(torch.stack(x) for x in zip(*batches, strict=True)), own=True)
    expected = torch.stack([loss(model, batch).detach() for model, batch in zip(models, batches, strict=True)])
    torch.testing.assert_close(losses, expected)


def test_members_draw_dropout_masks_of_their_own():
    models, optimizers = members("sgd", (0, 0))
    for model in models:
        model[1] = nn.Dropout(0.5)
    losses = Population(models, optimizers, loss, tune=()).step(data()[0][0])
    assert losses[0] != losses[1]


def test_what_does_not_fit_is_refused_before_anything_changes():
    models, optimizers = members("sgd")
    with pytest.raises(ValueError, match="one optimizer a model"):
        Population(models, optimizers[:2], loss, val_loss)
    with pytest.raises(ValueError, match="val_loss"):
        Population(models, optimizers, loss)
    with pytest.raises(ValueError, match="momentum is to be tuned"):
        Population(models, optimizers, loss, val_loss, tune=("momentum",))
    with pytest.raises(ValueError, match="same flags"):
        Population(models, [*optimizers[:2], OPTIMIZERS["momentum"](models[2].parameters(), 0.1, 0.1)], loss, tune=())
    norm = [nn.Sequential(nn.Linear(4, 1), nn.BatchNorm1d(1)) for _ in range(2)]
    with pytest.raises(NotImplementedError, match="track_running_stats=False"):
        Population(norm, [torch.optim.SGD(m.parameters(), lr=0.1) for m in norm], loss, tune=())

    def branches(model, batch):
        value = loss(model, batch)
        return value if value > 0 else -value

    with pytest.raises(NotImplementedError, match="vmap cannot take"):
        Population(models, optimizers, branches, tune=()).step(data()[0][0])
