"""Hyperparameters inside the loss, as people use them: against the stock loop, and mode against mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import hypergrad
from hypergrad import Result
from tests.oracle import AGREE, MODES_AGREE, ROUNDING, derivative, shifted
from tests.problems import DEVICE, STEPS, randint, randn

H = dict[str, Tensor]
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "momentum": lambda params: torch.optim.SGD(params, lr=0.2, momentum=0.8, weight_decay=0.02),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.03, betas=(0.8, 0.9), eps=1e-2, weight_decay=0.05),
}


def label_smoothing(model: nn.Module, batch: Any, h: H) -> Tensor:
    x, y = batch
    logp = model(x).log_softmax(1)
    return -((1 - h["smoothing"]) * logp.gather(1, y[:, None]).mean() + h["smoothing"] * logp.mean())


def multi_task(model: nn.Module, batch: Any, h: H) -> Tensor:
    """Classes, the inputs back again, and small activations, mixed by the softmax of three logits."""
    x, y = batch
    out = model(x)
    losses = torch.stack([cross_entropy(out, y), mse_loss(out, x[:, :3]), out.square().mean()])
    return h["mix"].softmax(0) @ losses


def uncertainty(model: nn.Module, batch: Any, h: H) -> Tensor:
    """Losses of a task each divided by their variance (Kendall et al. 2018, arXiv 1705.07115)."""
    x, y = batch
    out = model(x)
    losses = torch.stack([cross_entropy(out, y), mse_loss(out, x[:, :3])])
    return (losses * torch.exp(-h["log_variance"])).sum() + h["log_variance"].sum() / 2


def per_class(model: nn.Module, batch: Any, h: H) -> Tensor:
    """As the argument `weight` of nn.CrossEntropyLoss, divided by the sum of weights."""
    x, y = batch
    each = cross_entropy(model(x), y, reduction="none")
    return (h["weight"][y] * each).sum() / h["weight"][y].sum()


def per_example(model: nn.Module, batch: Any, h: H) -> Tensor:
    x, y, which = batch
    return (torch.sigmoid(h["weight"][which]) * cross_entropy(model(x), y, reduction="none")).mean()


def augmented(model: nn.Module, batch: Any, h: H) -> Tensor:
    """Noise and a change of scale of the inputs, of learned strengths, drawn from torch's generator."""
    x, y = batch
    scale = 1 + h["scale"] * torch.randn(len(x), 1, dtype=x.dtype, device=x.device)
    return cross_entropy(model(x * scale + h["noise"] * torch.randn_like(x)), y)


def penalties(model: nn.Module, batch: Any, h: H) -> Tensor:
    """L1 and L2 of each tensor by itself; L1 rounded off at 0, where it has no derivative."""
    x, y = batch
    params = list(model.parameters())
    l1 = torch.stack([(p.square() + 1e-2).sqrt().sum() for p in params])
    l2 = torch.stack([p.square().sum() for p in params])
    return cross_entropy(model(x), y) + h["l1"] @ l1 + h["l2"] @ l2


def pairs(i: int) -> tuple[Tensor, ...]:
    return randn(12, 5, seed=i), randint(3, 12, seed=1000 + i)


def examples(i: int) -> tuple[Tensor, ...]:
    """200 of 1,000 examples a step: none of them is left out in 6 steps."""
    which = (torch.arange(200, device=DEVICE) + 200 * i) % 1000
    return randn(1000, 5, seed=7)[which], randint(3, 1000, seed=8)[which], which


@dataclass(frozen=True)
class Row:
    loss: Callable[..., Tensor]
    hypers: dict[str, list[float] | float]
    batch: Callable[[int], tuple[Tensor, ...]] = pairs
    compared: int = 1_000_000  # numbers of one tensor held against finite differences
    width: float = 2e-2  # largest step of these; below the distance to the next singularity


ROWS: dict[str, Row] = {
    "label smoothing": Row(label_smoothing, {"smoothing": 0.1}),
    "no label smoothing": Row(label_smoothing, {"smoothing": 0.0}),
    "mixing weights of losses": Row(multi_task, {"mix": [0.5, -0.2, 0.1]}),
    "uncertainty of losses": Row(uncertainty, {"log_variance": [0.3, -0.4]}),
    "per class": Row(per_class, {"weight": [1.0, 0.5, 2.0]}),
    "per example": Row(per_example, {"weight": [0.1 * ((7 * i) % 11 - 5) for i in range(1000)]}, examples, 7),
    "augmentation": Row(augmented, {"noise": 0.3, "scale": 0.2}),
    "no augmentation": Row(augmented, {"noise": 0.0, "scale": 0.0}),
    "penalties per tensor": Row(penalties, {"l1": [0.01, 0.0, 0.02, 0.0], "l2": [0.05, 0.1, 0.0, 0.2]}, width=3e-4),
}
CASES = [pytest.param(*key, id="-".join(key)) for key in product(ROWS, OPTIMIZERS)]


class Built:
    def __init__(self, row: Row, optimizer: str):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double().to(DEVICE)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.row, self.batches, self.val = row, [row.batch(i) for i in range(STEPS)], pairs(99)
        self.hypers = {name: torch.tensor(x, dtype=torch.float64, device=DEVICE) for name, x in row.hypers.items()}
        torch.manual_seed(7)  # what augmentation draws from

    def val_loss(self) -> Tensor:
        return cross_entropy(self.model(self.val[0]), self.val[1])

    def hypergradient(self, wrt: Any = None, **options: Any) -> Result:
        return hypergrad.hypergradient(
            self.model, self.optimizer, self.row.loss, self.batches, self.val_loss, wrt or tuple(self.hypers),
            hypers=self.hypers, **options,
        )  # fmt: skip

    def stock(self, name: str, index: tuple[int, ...], delta: float) -> float:
        hypers = self.hypers | {name: shifted(self.hypers[name], index, delta)}
        for batch in self.batches:
            self.optimizer.zero_grad()
            self.row.loss(self.model, batch, hypers).backward()
            self.optimizer.step()
        return float(self.val_loss().detach())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "optimizer"), CASES)
def test_matches_the_stock_loop(name: str, optimizer: str) -> None:
    row = ROWS[name]
    result = Built(row, optimizer).hypergradient()
    for key, array in result.gradients.items():
        assert array.shape == Built(row, optimizer).hypers[key].shape
        every = list(product(*map(range, array.shape)))
        for index in every[:: max(1, len(every) // row.compared)]:
            want = derivative(
                lambda d, key=key, index=index: Built(row, optimizer).stock(key, index, d),
                row.width,
                what=f"{key}{list(index)}",
            )
            got = float(array[index])
            assert want != 0
            assert abs(got - want) <= AGREE * abs(want) + ROUNDING, f"d/d {key}{list(index)}: {got}, should be {want}"


def directional(built: Built, key: str, direction: Tensor, mode: str) -> float:
    """The derivative along one direction of a tensor: hypers is start + s · direction, at s = 0."""
    start, row = built.hypers[key], built.row
    return float(hypergrad.hypergradient(
        built.model, built.optimizer, lambda model, batch, h: row.loss(model, batch, {key: start + h["s"] * direction}),
        built.batches, built.val_loss, "s", mode, hypers={"s": torch.zeros((), dtype=torch.float64, device=DEVICE)},
    ).gradients["s"])  # fmt: skip


@pytest.mark.parametrize(("name", "optimizer"), CASES)
def test_forward_is_unrolled(name: str, optimizer: str) -> None:
    """Along a few directions where there are many numbers."""
    row = ROWS[name]
    unrolled = Built(row, optimizer).hypergradient().gradients
    if sum(x.numel() for x in unrolled.values()) <= 10:
        forward = Built(row, optimizer).hypergradient(mode="forward").gradients
        for key, x in unrolled.items():
            assert torch.allclose(forward[key], x, rtol=MODES_AGREE, atol=MODES_AGREE * float(x.abs().max()))
        return
    for seed in range(3):
        for key, x in unrolled.items():
            direction = randn(*x.shape, seed=seed)
            want = float(x @ direction)
            assert abs(directional(Built(row, optimizer), key, direction, "forward") - want) <= MODES_AGREE * float(
                x.norm() * direction.norm()
            )
