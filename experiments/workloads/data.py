"""The workloads' data: fixed sets in fixed splits, made or read once a process, none of them downloaded but Fashion-MNIST.

Each has a floor that no model gets below (labels at random, noisy targets) or little enough to train on that fitting it
too well shows.
"""

from __future__ import annotations

import math
import random
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from experiments import datasets
from experiments.datasets import Data, Split

Sizes = tuple[int, int, int]
LABELS_AT_RANDOM = 0.1  # of the digits
ACTION_NOISE = 0.3  # standard deviation of the expert's actions, which lie in [-1, 1]
CHARACTERS = 96  # printable ASCII, and line ends
CONTEXT = 32  # characters that GPT sees
PIECE = 321  # characters of the pieces in which the text is dealt out


def cut(x: Tensor, y: Tensor, sizes: Sizes) -> Data:
    """Training, validation and test examples, one after the other."""
    ends = np.cumsum([0, *sizes])
    assert ends[-1] <= len(y)
    return Data(*(Split(x[a:b].contiguous(), y[a:b].contiguous()) for a, b in pairwise(ends)))


def standardised(data: Data, targets: bool = False) -> Data:
    """Inputs (and targets) less the mean of the training examples, over their standard deviation."""

    def scaled(values: Tensor, by: Tensor) -> Tensor:
        std, mean = torch.std_mean(by, dim=0)
        return (values - mean) / std

    return Data(*(Split(scaled(x, data.train.x), scaled(y, data.train.y) if targets else y) for x, y in data))


@cache
def fashion(full: bool, train: int = 10_000, val: int = 5000) -> Data:
    """Fashion-MNIST as `datasets.fashion_mnist` has it; unless `full`, the first images of its training and validation."""
    whole = datasets.fashion_mnist()
    if full:
        return whole
    few, fewer = (Split(x[:n].clone(), y[:n].clone()) for (x, y), n in zip(whole, (train, val)))
    return Data(few, fewer, whole.test)


@cache
def small_fashion(full: bool) -> Data:
    """The same as images of one channel, shrunk to 14×14 unless `full`."""
    data = fashion(full)
    if full:
        return Data(*(Split(x.view(-1, 1, 28, 28), y) for x, y in data))
    sizes = (4000, 2000, 5000)
    shrunk = [Split(avg_pool2d(x[:n].view(-1, 1, 28, 28), 2), y[:n]) for (x, y), n in zip(data, sizes)]
    return Data(*shrunk)


@cache
def mnist1d(full: bool) -> Data:
    """MNIST-1D (Greydanus 2020, arXiv 2011.14439), generated: 4000 (`full`: 10,000) training, 2000 validation, 4000 test."""
    from mnist1d.data import get_dataset_args, make_dataset

    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    arguments = get_dataset_args()
    vars(arguments).update(num_samples=16_000 if full else 10_000, train_split=1.0)
    made = make_dataset(arguments)  # it seeds the global random numbers
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    x, y = torch.tensor(made["x"], dtype=torch.float32), torch.tensor(made["y"], dtype=torch.int64)
    return cut(x, y, (10_000 if full else 4000, 2000, 4000))


@cache
def digits(full: bool) -> Data:
    """scikit-learn's digits; one label in ten is drawn at random, in every split."""
    rng = np.random.default_rng(1)
    out = []
    for x, y in datasets.digits():
        wrong = torch.from_numpy(rng.random(len(y)) < LABELS_AT_RANDOM)
        out.append(Split(x, torch.where(wrong, torch.from_numpy(rng.integers(0, 10, len(y))), y)))
    return Data(*out)


@cache
def diabetes(full: bool) -> Data:
    """scikit-learn's diabetes, 442 patients: half of the targets' variance is beyond any model."""
    from sklearn.datasets import load_diabetes

    inputs, targets = load_diabetes(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(targets))
    x = torch.tensor(inputs[order], dtype=torch.float32)
    y = torch.tensor(targets[order], dtype=torch.float32)[:, None]
    return standardised(cut(x, y, (202, 120, 120)), targets=True)


@cache
def friedman(full: bool) -> Data:
    """Friedman's regression problem 1: y = 10 sin(πx₁x₂) + 20 (x₃ − ½)² + 10 x₄ + 5 x₅ + noise; x₆ … x₁₀ do nothing."""
    from sklearn.datasets import make_friedman1

    train = 2000 if full else 500
    inputs, targets = make_friedman1(train + 6000, noise=2.5, random_state=0)
    x, y = torch.tensor(inputs, dtype=torch.float32), torch.tensor(targets, dtype=torch.float32)[:, None]
    return standardised(cut(x, y, (train, 2000, 4000)), targets=True)


@cache
def characters(full: bool) -> Data:
    """scikit-learn's own descriptions of its data sets, 43,000 characters, next character by next character."""
    return dealt_out(text_codes())


def text_codes() -> Tensor:
    """The characters of that text as codes below CHARACTERS."""
    import sklearn.datasets

    files = sorted(Path(sklearn.datasets.__file__).with_name("descr").glob("*.rst"))
    text = "".join(file.read_text(encoding="utf-8") for file in files).encode("ascii", "ignore")
    return torch.tensor([0 if byte == 10 else byte - 31 for byte in text if byte == 10 or 32 <= byte < 127])


def dealt_out(codes: Tensor) -> Data:
    """Windows of a text in three splits, their targets one character on.

    The text is cut into pieces, of which three in five train, one validates and one tests: one kind of text in all three.
    Windows of CONTEXT characters start at every fourth character of a training piece, and tile the others.
    """
    pieces = codes[: len(codes) // PIECE * PIECE].view(-1, PIECE)
    which = torch.arange(len(pieces)) % 5
    out = []
    for chosen, stride in ((which < 3, 4), (which == 3, CONTEXT), (which == 4, CONTEXT)):
        windows = pieces[chosen].unfold(1, CONTEXT + 1, stride).flatten(0, 1)
        out.append(Split(windows[:, :-1].contiguous(), windows[:, 1:].contiguous()))
    return Data(*out)


@cache
def ratings(full: bool) -> Data:
    """Ratings r = b_u + c_i + ⟨p_u, q_i⟩ + noise of 400 users for 200 items, unit variance without the noise of variance ¼.

    x is (user, item). 15,000 of the 80,000 pairs train (`full`: 40,000), 5000 validate, 10,000 test.
    """
    rng = np.random.default_rng(0)
    users, items, rank = 400, 200, 4
    p, q = (rng.normal(size=(n, rank)) for n in (users, items))
    table = 0.5 * rng.normal(size=(users, 1)) + 0.5 * rng.normal(size=items) + p @ q.T * np.sqrt(0.5 / rank)
    table += 0.5 * rng.normal(size=table.shape)
    pairs = rng.permutation(users * items)
    x = torch.from_numpy(np.stack([pairs // items, pairs % items], axis=1))
    y = torch.tensor(table.reshape(-1)[pairs], dtype=torch.float32)
    return cut(x, y, (40_000 if full else 15_000, 5000, 10_000))


@cache
def expert(full: bool) -> Data:
    """A cart-pole near upright under its linear-quadratic regulator with saturation, seen acting: state → noisy action.

    s = (cart position, its velocity, pole angle, its velocity), linearised and discretised at 0.05 s; a = clip(−K s, −1, 1),
    K the regulator of cost Σ |s|² + a². Noise of ACTION_NOISE is put on a and acts on the pole too. 15 steps a
    trajectory; the first trajectories train (600 steps; `full`: 5000), the rest validate (2000) and test (4000).
    """
    from scipy.linalg import solve_discrete_are

    dt, g, length, force = 0.05, 9.8, 0.5, 10.0
    a = np.eye(4) + dt * np.array([[0, 1, 0, 0], [0, 0, -1, 0], [0, 0, 0, 1], [0, 0, g / length, 0]])
    b = dt * force * np.array([[0], [1], [0], [-1 / length]])
    cost = solve_discrete_are(a, b, np.eye(4), np.eye(1))
    gain = np.linalg.solve(np.eye(1) + b.T @ cost @ b, b.T @ cost @ a)
    rng, train = np.random.default_rng(0), 5000 if full else 600
    states, actions = [], []
    s = rng.normal(size=(math.ceil((train + 6000) / 15), 4)) * np.array([1.5, 1.5, 0.3, 1.0])
    for _ in range(15):
        action = np.clip(-s @ gain.T, -1, 1) + ACTION_NOISE * rng.normal(size=(len(s), 1))
        states.append(s)
        actions.append(action)
        s = s @ a.T + action @ b.T
    x, y = (torch.tensor(np.stack(part, axis=1), dtype=torch.float32).flatten(0, 1) for part in (states, actions))
    return standardised(cut(x, y, (train, 2000, 4000)))
