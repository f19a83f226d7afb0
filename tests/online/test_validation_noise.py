"""A validation batch too small to give a hypergradient a sign is said, and one that is large enough is not."""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.nn.functional import mse_loss

import hypergrad
from hypergrad.online.validation_noise import DRAWS, ValidationNoise


def factors(rho: float, runs: int = 300) -> list[int | None]:
    """What is said of normal pairs of correlation rho whose scale shrinks a thousandfold, run by run."""
    draws, out = torch.Generator().manual_seed(0), []
    for _ in range(runs):
        noise = ValidationNoise()
        for i in range(DRAWS):
            signal, n, m = torch.randn(3, generator=draws, dtype=torch.float64).tolist()
            scale = 0.65**i
            noise.note(
                *([scale * (rho**0.5 * signal + (1 - rho) ** 0.5 * x)] for x in (n, m)),
            )
        assert not noise.wanted
        out.append(noise.size_factor())
    return out


def test_what_is_said_of_a_known_correlation() -> None:
    assert sum(k is not None for k in factors(0.9)) < 3  # of 300
    assert sum(k is not None for k in factors(0.7)) < 18
    said = [k for k in factors(0.0) if k is not None]
    assert len(said) > 180
    tenth = [k for k in factors(0.1) if k is not None]  # 9 times would do
    assert len(tenth) > 120 and sorted(tenth)[len(tenth) // 2] <= 9


def run(size: int, rows: int = 4000) -> tuple[hypergrad.Tuner, list[str], int]:
    """A linear model on noisy data, `size` of `rows` validation rows drawn each time; also how often val_loss was called."""
    torch.manual_seed(0)
    model, w = nn.Linear(20, 1), torch.randn(20, 1)
    x, y, called = torch.randn(rows, 20), torch.empty(0), []
    y = x @ w + 10 * torch.randn(rows, 1)

    def val_loss() -> torch.Tensor:
        called.append(1)
        picked = torch.randint(rows, (size,)) if size < rows else slice(None)
        return mse_loss(model(x[picked]), y[picked])

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tuner = hypergrad.Tuner(model, optimizer, val_loss, every=5, total_steps=1000)
        train_x = torch.randn(1000, 20)
        train_y = train_x @ w + 10 * torch.randn(1000, 1)
        for t in range(200):
            rows_of_batch = torch.arange(100) + 100 * (t % 10)
            loss = mse_loss(model(train_x[rows_of_batch]), train_y[rows_of_batch])
            optimizer.zero_grad()
            tuner.backward(loss)
            optimizer.step()
    return tuner, [str(w.message) for w in caught if "walk" in str(w.message)], len(called)


def test_a_batch_of_two_is_said_with_a_size() -> None:
    _, said, _ = run(2)
    assert len(said) == 1 and "times as large, or the whole validation set" in said[0]


def test_a_large_batch_is_not() -> None:
    assert not run(1000)[1]


def test_a_whole_set_is_drawn_twice_once() -> None:
    tuner, said, called = run(4000)
    assert not said
    assert tuner.stats["val_evaluations"] == tuner.stats["hyper_steps"] + 1
    assert called == tuner.stats["val_evaluations"] + 1  # one where the tuner is made
