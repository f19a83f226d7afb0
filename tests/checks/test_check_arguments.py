"""`hypergrad.check` with schedules, one derivative a parameter or element, and an average of the weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hypergrad
from hypergrad import schedules
from hypergrad.checks.stock_run import StockRun

STEPS = 4
Loop = tuple[nn.Module, Any, Any, list[int], Any]


def loop(kind: str = "AdamW", hypers: bool = False) -> Loop:
    """A float32 loop of two param groups; as the arguments of `check`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    numbers: dict[str, Any] = {"SGD": {"momentum": 0.8}, "AdamW": {"eps": 1e-2}, "Muon": {}, "RMSprop": {"eps": 1e-2}}[
        kind
    ]
    matrices, rest = [p for p in model.parameters() if p.dim() == 2], [p for p in model.parameters() if p.dim() == 1]
    if kind == "Muon":
        optimizer: Any = [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=0.02, eps=1e-2)]
    else:
        groups = [{"params": rest, "lr": 0.03}, {"params": matrices}]
        optimizer = getattr(torch.optim, kind)(groups, lr=0.02, weight_decay=0.1, **numbers)
    x, y = torch.randn(STEPS + 1, 10, 4), torch.randn(STEPS + 1, 10, 2)

    def loss(model: nn.Module, i: int) -> Tensor:
        return ((model(x[i]) - y[i]) ** 2).mean()

    def penalised(model: nn.Module, i: int, h: dict[str, Tensor]) -> Tensor:
        return loss(model, i) + h["c"] * sum((p**2).sum() for p in model.parameters())

    return model, optimizer, penalised if hypers else loss, list(range(STEPS)), lambda: loss(model, STEPS)


KNOTS = {
    "hypers": {"v": torch.tensor([0.01, 0.04])},
    "schedules": {"lr": lambda t, h: schedules.knots(t / STEPS, h["v"])},
}
ROWS: dict[str, tuple[str, tuple[str, ...], dict[str, Any], int]] = {  # optimizer, wrt, arguments, rows of the report
    "knots": ("AdamW", ("v", "weight_decay"), KNOTS, 4),
    "a scheduled name itself": ("SGD", ("lr", "momentum"), {"schedules": {"lr": lambda t, h: [0.1 / (1 + t), 0.05]}}, 4),
    "pairs": ("AdamW", ("b", "betas"), {"hypers": {"b": 0.8}, "schedules": {"betas": lambda t, h: (h["b"], 0.9)}}, 5),
    "a clipping threshold": ("SGD", ("c", "clip_norm"), {"hypers": {"c": 0.3}, "clip_norm": 1.0,
        "schedules": {"clip_norm": lambda t, h: h["c"] * 0.9**t}}, 2),
    "two optimizers": ("Muon", ("v", "lr"), KNOTS, 4),
    "an average": ("AdamW", ("lr", "ema"), {"ema": 0.6, "val_steps": (0, 2, STEPS)}, 3),
    "a scheduled average": ("SGD", ("a", "ema"), {"ema": 0.5, "hypers": {"a": 0.4},
        "schedules": {"ema": lambda t, h: 1 - h["a"] / (1 + t)}}, 2),
    "parameters": ("AdamW", ("lr", "betas"), {"per": "parameter"}, 4 + 8),
    "parameters, Muon": ("Muon", ("lr",), {"per": "parameter"}, 4),
    "elements": ("RMSprop", ("lr",), {"per": "element", "limit": 6}, 6),
    "elements and groups": ("SGD", ("lr", "momentum"), {"per": {"lr": "element"}, "limit": 5}, 5 + 2),
    "elements of pairs": ("AdamW", ("betas",), {"per": "element", "limit": 6}, 6),
    "elements of a schedule, averaged, clipped": ("AdamW", ("lr", "v"), KNOTS | {"per": "element", "limit": 4, "ema": 0.6,
        "clip_norm": 0.3}, 4 + 2),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_agrees(name: str) -> None:
    kind, wrt, arguments, rows = ROWS[name]
    given = loop(kind)
    before = [p.clone() for p in given[0].parameters()]
    report = hypergrad.check(*given, wrt=wrt, **arguments)
    assert report, str(report)
    assert len(report.rows) == rows
    assert any(row.hypergradient for row in report.rows)
    assert all(torch.equal(a, b) for a, b in zip(before, given[0].parameters(), strict=True))


def test_loss_with_hypers_and_a_schedule() -> None:
    arguments = {"hypers": {"c": 0.01, "s": 0.03}, "schedules": {"lr": lambda t, h: h["s"] / (1 + t)}}
    report = hypergrad.check(*loop("SGD", hypers=True), wrt=("c", "s"), **arguments)
    assert report and len(report.rows) == 2, str(report)


def test_a_val_loss_that_leaves_the_model_in_eval_mode() -> None:
    """With dropout: the runs that differences are taken of train in train mode, all of them."""
    model, optimizer, loss, items, val_loss = loop("SGD")
    model.append(nn.Dropout(0.5))
    report = hypergrad.check(model, optimizer, loss, items, lambda: (model.eval(), val_loss())[1], wrt=("lr",))
    assert report, str(report)
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize(
    "arguments",
    [{}, {"per": "parameter"}, KNOTS | {"per": "element"}, {"ema": 0.6}],
    ids=["plain", "parameter", "schedule", "ema"],
)
def test_a_wrong_hypergradient_is_found(arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop that is differentiated is not the one that is trained."""
    step = StockRun._step
    monkeypatch.setattr(StockRun, "_step", lambda self, *a: [p.grad.mul_(1.1) for p in self.params] and step(self, *a))
    assert not hypergrad.check(*loop("SGD"), wrt=("lr",), **arguments)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"per": "row"}, "per must be one of"),
        ({"ema": 2.0}, "ema must be a decay"),
        ({"schedules": {"lr": 0.1}}, "must be a function"),
    ],
    ids=str,
)
def test_bad_arguments(arguments: dict[str, Any], match: str) -> None:
    given = loop()
    before = repr(given[1].state_dict())
    with pytest.raises((ValueError, TypeError), match=match):
        hypergrad.check(*given, wrt=("lr",), **arguments)
    assert repr(given[1].state_dict()) == before
