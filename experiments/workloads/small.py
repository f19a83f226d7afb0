"""The second family of workloads: few rows, or wrong labels, where fitting the training rows long is worse than stopping early.

Validation rows are as few as training rows, and where labels are wrong both have the same share of wrong ones; the test split
is clean. An untuned run of each takes at most two seconds on one thread. `full` is a longer run of a wider model.
"""

from __future__ import annotations

from copy import deepcopy
from functools import cache, partial

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from experiments import datasets
from experiments.datasets import Data, Split
from experiments.workloads import models
from experiments.workloads.data import cut, dealt_out, diabetes, standardised, text_codes
from experiments.workloads.task import Workload

WRONG = 0.4  # share of wrong labels
MOST_VALIDATION = 397  # of the 1,797 digits, where 1,000 train
TEXT = 20_000  # characters of GPT's text
OLD_CLASSES = 5  # digits 0 … 4 are pre-trained on, 5 … 9 are fine-tuned on
PRETRAINING = 300  # steps


def _standardised(data: Data) -> Data:
    """Inputs standardised by the training rows; columns that are constant in these are left at their own scale."""
    std, mean = torch.std_mean(data.train.x, dim=0)
    std[std == 0] = 1
    return Data(*(Split((x - mean) / std, y) for x, y in data))


def _all_digits() -> Split:
    splits = datasets.digits()
    return Split(torch.cat([x for x, _ in splits]), torch.cat([y for _, y in splits]))


@cache
def clean_digits(full: bool) -> Data:
    """300 training and 300 validation digits, every pixel standardised; the other 1,197 test."""
    x, y = _all_digits()
    return _standardised(cut(x, y, (300, 300, len(y) - 600)))


@cache
def noisy_digits(n: int, full: bool) -> Data:
    """n training and n validation digits (at most MOST_VALIDATION), 40 % of either with a wrong label; the others test.

    A wrong label is drawn uniformly from the nine others.
    """
    x, y = _all_digits()
    rng = np.random.default_rng(n)

    def spoilt(split: Split) -> Split:
        rows = len(split.y)
        wrong = torch.from_numpy(rng.permutation(rows) < round(WRONG * rows))
        return Split(split.x, torch.where(wrong, (split.y + torch.from_numpy(rng.integers(1, 10, rows))) % 10, split.y))

    validation = min(n, MOST_VALIDATION)
    train, val, test = cut(x, y, (n, validation, len(y) - n - validation))
    return Data(spoilt(train), spoilt(val), test)


@cache
def random_labels(full: bool) -> Data:
    """64 training, 64 validation and 1,000 test rows of ten normal inputs; labels at random, of three classes alike.

    No model has an expected loss below ln 3. In this draw the first weights of the grid's seed are no better than other seeds'.
    """
    rng = np.random.default_rng(1)
    sizes = (64, 64, 1000)
    x = torch.tensor(rng.normal(size=(sum(sizes), 10)), dtype=torch.float32)
    y = np.concatenate([rng.permutation(np.arange(rows) % 3) for rows in sizes])
    return cut(x, torch.from_numpy(y), sizes)


@cache
def breast_cancer(full: bool) -> Data:
    """scikit-learn's breast cancer, two classes: 60 training and 60 validation rows; the other 449 test."""
    from sklearn.datasets import load_breast_cancer

    inputs, labels = load_breast_cancer(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x, y = torch.tensor(inputs[order], dtype=torch.float32), torch.tensor(labels[order], dtype=torch.int64)
    return _standardised(cut(x, y, (60, 60, len(y) - 120)))


@cache
def small_diabetes(full: bool) -> Data:
    """100 training and 100 validation patients of the diabetes set; the other 242 test."""
    splits = diabetes(full)
    x, y = torch.cat([x for x, _ in splits]), torch.cat([y for _, y in splits])
    return standardised(cut(x, y, (100, 100, len(y) - 200)), targets=True)


def _old_digits(old: bool) -> Split:
    """The digits 0 … 4, or 5 … 9 with labels from 0."""
    x, y = _all_digits()
    of_it = (y < OLD_CLASSES) == old
    return Split(x[of_it], y[of_it] % OLD_CLASSES)


@cache
def new_digits(full: bool) -> Data:
    """150 training and 150 validation rows of the digits 5 … 9; the others test."""
    x, y = _old_digits(old=False)
    return cut(x, y, (150, 150, len(y) - 300))


@cache
def _pretrained(width: int) -> nn.Sequential:
    """A net trained on the digits 0 … 4 by AdamW, the same in every process."""
    x, y = _old_digits(old=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = models.mlp(64, width, width, OLD_CLASSES)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(PRETRAINING):
            rows = torch.randint(len(y), (50,))
            optimizer.zero_grad()
            cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    model.zero_grad()
    return model


def _to_fine_tune(data: Data, full: bool) -> nn.Sequential:
    """The pre-trained net with a fresh output layer."""
    model = deepcopy(_pretrained(256 if full else 64))
    model[-1] = nn.Linear(256 if full else 64, OLD_CLASSES)
    return model


@cache
def small_text(full: bool) -> Data:
    """The first 20,000 characters of the text of `data.characters`."""
    return dealt_out(text_codes()[:TEXT])


def _noisy(n: int, optimizer: str) -> Workload:
    return Workload(
        name=f"noisy_digits_{n}_{optimizer.lower()}",
        title=f"MLP 64-64-64-10, {n:,} digits, 40 % wrong labels, {optimizer}",
        optimizer=optimizer,
        data=partial(noisy_digits, n),
        model=lambda data, full: models.mlp(64, *(2 * [256 if full else 64]), 10),
        loss=cross_entropy,
        steps=600,
        full_steps=3000,
        batch=32,
        family="small",
    )


SMALL = (
    Workload(
        name="clean_digits_300",
        title="MLP 64-100-10, 300 digits",
        optimizer="AdamW",
        data=clean_digits,
        model=lambda data, full: models.mlp(64, 400 if full else 100, 10),
        loss=cross_entropy,
        steps=600,
        full_steps=3000,
        batch=24,
        family="small",
    ),
    *(_noisy(n, optimizer) for optimizer in ("AdamW", "SGD") for n in (100, 200, 1000)),
    Workload(
        name="random_labels",
        title="MLP 10-32-3, 64 rows, labels at random",
        optimizer="AdamW",
        data=random_labels,
        model=lambda data, full: models.mlp(10, 128 if full else 32, 3),
        loss=cross_entropy,
        steps=200,
        full_steps=1000,
        batch=16,
        family="small",
    ),
    Workload(
        name="breast_cancer_60",
        title="MLP 30-32-2, 60 rows of breast cancer",
        optimizer="AdamW",
        data=breast_cancer,
        model=lambda data, full: models.mlp(30, 128 if full else 32, 2),
        loss=cross_entropy,
        steps=400,
        full_steps=2000,
        batch=20,
        family="small",
    ),
    Workload(
        name="diabetes_100",
        title="MLP 10-50-1, 100 rows of diabetes",
        optimizer="SGD",
        data=small_diabetes,
        model=lambda data, full: models.mlp(10, 200 if full else 50, 1),
        loss=mse_loss,
        steps=600,
        full_steps=3000,
        batch=25,
        family="small",
    ),
    Workload(
        name="fine_tuned_digits",
        title="MLP 64-64-64-5, pre-trained on digits 0–4, fine-tuned on 150 rows of 5–9",
        optimizer="SGD",
        data=new_digits,
        model=_to_fine_tune,
        loss=cross_entropy,
        steps=300,
        full_steps=1500,
        batch=30,
        family="small",
    ),
    Workload(
        name="gpt_20kb",
        title="GPT over characters, 20 kB of text",
        optimizer="AdamW",
        data=small_text,
        model=lambda data, full: models.GPT(64, 4, 4) if full else models.GPT(32, 2, 2),
        loss=models.next_character,
        steps=600,
        full_steps=3000,
        batch=8,
        family="small",
    ),
)
