"""Tensors and nets of the user's own, given as `hypers`, which losses and val_loss read in whichever way.

Expected values: central differences of the stock loop, in which the user's own tensor is moved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import hypergrad
from tests.oracle import AGREE, MODES_AGREE, ROUNDING, derivative
from tests.problems import DEVICE, randn
from tests.tiers import slow_but

STEPS = 5


class TwoBranches(nn.Module):
    """Two operations mixed by the softmax of alpha, as in DARTS (Liu et al. 2019, arXiv 1806.09055)."""

    def __init__(self, alpha: Tensor | None = None):
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleList([nn.Linear(3, 1), nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))])
        self.double().to(DEVICE)
        self.alpha = alpha

    def forward(self, x: Tensor) -> Tensor:
        assert self.alpha is not None
        mix = self.alpha.softmax(0)
        return mix[0] * self.branches[0](x) + mix[1] * self.branches[1](x)


class Search:
    """A loop of architecture search. `hold` makes of the values of alpha what the user holds and the model reads."""

    def __init__(self, hold: Callable[[Tensor], Tensor] = lambda x: x, shift: Tensor | float = 0.0):
        value = torch.tensor([0.3, -0.2], dtype=torch.float64, device=DEVICE)
        self.alpha = hold(value + shift)
        self.model = TwoBranches(self.alpha)
        self.params = list(self.model.branches.parameters())
        self.optimizer = torch.optim.SGD(self.params, lr=0.1, momentum=0.8, weight_decay=0.01)
        self.batches = [(randn(8, 3, seed=i), randn(8, 1, seed=100 + i)) for i in range(STEPS)]
        self.val = (randn(9, 3, seed=50), randn(9, 1, seed=51))

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return mse_loss(model(batch[0]), batch[1])

    def loss_by_argument(self, model: nn.Module, batch: tuple[Tensor, Tensor], hypers: dict[str, Tensor]) -> Tensor:
        mix = hypers["alpha"].softmax(0)
        x, y = batch
        return mse_loss(mix[0] * self.model.branches[0](x) + mix[1] * self.model.branches[1](x), y)

    def val_loss(self) -> Tensor:
        return self.loss(self.model, self.val)

    def arguments(self, by: str = "closure", **options: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        loss = self.loss if by == "closure" else self.loss_by_argument
        given = (self.model, self.optimizer, loss, self.batches, self.val_loss)
        return given, {"wrt": ("alpha", "lr"), "hypers": {"alpha": self.alpha}} | options


def stock(i: int, delta: float, val_steps: tuple[int, ...] = (STEPS,)) -> float:
    """torch's loop with the i-th number of alpha moved, for training and for the validation loss."""
    search = Search(shift=delta * torch.eye(2, dtype=torch.float64, device=DEVICE)[i])
    values = []
    for t, batch in enumerate([*search.batches, None]):
        if t in val_steps:
            values.append(float(search.val_loss().detach()))
        if batch is not None:
            search.optimizer.zero_grad()
            search.loss(search.model, batch).backward()
            search.optimizer.step()
    return sum(values) / len(values)


def expected(val_steps: tuple[int, ...] = (STEPS,)) -> list[float]:
    return [derivative(lambda d, i=i: stock(i, d, val_steps), 1e-2, what=f"alpha[{i}]") for i in range(2)]


HELD: dict[str, Callable[[Tensor], Tensor]] = {
    "a tensor": lambda x: x,
    "one that requires a gradient": lambda x: x.requires_grad_(),
    "a parameter, of the model too": nn.Parameter,
    "part of a longer one": lambda x: torch.cat([x, x])[2:],
    "computed from another": lambda x: x.requires_grad_() * 1.0,
}
READ = ["closure", "argument"]


def close(got: list[float], want: list[float]) -> bool:
    return all(abs(a - b) <= AGREE * abs(b) + ROUNDING for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("by", READ)
@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize(
    "options",
    slow_but([{"mode": "unrolled"}, {"mode": "unrolled", "every": 2}, {"mode": "forward"}], {"mode": "unrolled"}),
    ids=str,
)
def test_a_tensor_that_val_loss_reads_too(options: dict[str, Any], held: str, by: str) -> None:
    search = Search(HELD[held])
    alpha, before = search.alpha, (search.alpha.requires_grad, search.alpha.detach().clone())
    given, more = search.arguments(by, **options)
    result = hypergrad.hypergradient(*given, **more)
    assert close(result.gradients["alpha"].tolist(), expected())
    assert alpha.requires_grad == before[0]
    assert torch.equal(alpha.detach(), before[1])
    assert not alpha.is_leaf or alpha.grad is None


@pytest.mark.parametrize("mode", ["unrolled", "forward"])
def test_on_the_way_and_step_by_step(mode: str) -> None:
    when = (2, 4, STEPS)
    given, more = Search().arguments(mode=mode, val_steps=when)
    assert close(hypergrad.hypergradient(*given, **more).gradients["alpha"].tolist(), expected(when))
    given, more = Search().arguments(mode=mode, val_steps=when, per_step=True)
    steps = hypergrad.hypergradient(*given, **more).gradients["alpha"]
    assert steps.shape == (STEPS, 2)
    assert close(steps.sum(0).tolist(), expected(when))


@pytest.mark.parametrize("held", [name for name in HELD if name != "computed from another"])
@pytest.mark.parametrize("by", slow_but(READ, "closure"))
def test_check_moves_what_the_user_holds(by: str, held: str) -> None:
    search = Search(HELD[held])
    before = search.alpha.detach().clone()
    given, more = search.arguments(by)
    report = hypergrad.check(*given, **more)
    assert report
    assert close([row.finite_difference for row in report.rows if row.name == "alpha"], expected())
    assert torch.equal(search.alpha.detach(), before)


def test_check_of_a_float32_tensor() -> None:
    search = Search(lambda x: x.float())
    search.model.float()
    alpha, storage = search.alpha, search.alpha.data_ptr()
    search.batches = [(x.float(), y.float()) for x, y in search.batches]
    search.val = (search.val[0].float(), search.val[1].float())
    given, more = search.arguments()
    assert hypergrad.check(*given, **more)
    assert (alpha.dtype, alpha.data_ptr(), alpha.requires_grad) == (torch.float32, storage, False)


def test_check_finds_a_direct_term_that_is_lost() -> None:
    """The oracle shares no fault with what it checks: a val_loss that cuts the graph is found."""
    search = Search()
    given, more = search.arguments("argument")

    def cut() -> Tensor:
        mix = search.alpha.detach().softmax(0)
        x, y = search.val
        return mse_loss(mix[0] * search.model.branches[0](x) + mix[1] * search.model.branches[1](x), y)

    report = hypergrad.check(*given[:4], cut, **more)
    assert [row.name for row in report.rows if not row.ok] == ["alpha", "alpha"]


def test_at_a_minimum() -> None:
    """θ = c/(1 + c) minimises c (θ − 1)²/2 + θ²/2, and L = c θ²: dL/dc = θ² + 2 c θ/(1 + c)²."""
    c, model = torch.tensor(0.7, dtype=torch.float64, device=DEVICE), nn.Linear(1, 1, bias=False).double().to(DEVICE)
    with torch.no_grad():
        model.weight.fill_(0.7 / 1.7)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    result = hypergrad.hypergradient(
        model, sgd, lambda m, b: (c * (m.weight - 1) ** 2 / 2 + m.weight**2 / 2).sum(), [None],
        lambda: (c * model.weight**2).sum(), wrt="c", mode="implicit", hypers={"c": c},
    )  # fmt: skip
    theta = 0.7 / 1.7
    assert float(result.gradients["c"]) == pytest.approx(theta**2 + 2 * 0.7 * theta / 1.7**2, rel=AGREE)


# ---- nets


class Reweighted:
    """Example weights by a small net of each example's inputs, which the loss calls itself."""

    def __init__(self, moved: tuple[str, int, float] | None = None):
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double().to(DEVICE)
        self.net = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1), nn.Sigmoid()).double().to(DEVICE)
        if moved is not None:
            with torch.no_grad():
                dict(self.net.named_parameters())[moved[0]].view(-1)[moved[1]] += moved[2]
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05, eps=1e-3)
        self.batches = [(randn(8, 3, seed=i), randn(8, 1, seed=100 + i)) for i in range(STEPS)]
        self.val = (randn(9, 3, seed=50), randn(9, 1, seed=51))

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (self.net(batch[0]) * (model(batch[0]) - batch[1]) ** 2).mean()

    def loss_by_argument(self, model: nn.Module, batch: tuple[Tensor, Tensor], hypers: dict[str, Any]) -> Tensor:
        return (hypers["net"](batch[0]) * (model(batch[0]) - batch[1]) ** 2).mean()

    def val_loss(self) -> Tensor:
        """With a small penalty of the net's outputs: a direct term."""
        return mse_loss(self.model(self.val[0]), self.val[1]) + 0.1 * self.net(self.val[0]).square().mean()

    def ends_at(self) -> float:
        for batch in self.batches:
            self.optimizer.zero_grad()
            self.loss(self.model, batch).backward()
            self.optimizer.step()
        return float(self.val_loss().detach())


WAYS: dict[str, Callable[[Reweighted], tuple[dict[str, Any], Any, str]]] = {
    "the net, called by the loss": lambda r: ({"net": r.net}, "net", "net."),
    "the net, by the argument": lambda r: ({"net": r.net}, "net", "net."),
    "its parameters by name": lambda r: (dict(r.net.named_parameters()), [n for n, _ in r.net.named_parameters()], ""),
}


@pytest.mark.parametrize("mode", ["unrolled", "forward"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.slow
def test_a_net_of_weights(way: str, mode: str) -> None:
    run = Reweighted()
    hypers, wrt, prefix = WAYS[way](run)
    loss = run.loss_by_argument if "argument" in way else run.loss
    call = (run.model, run.optimizer, loss, run.batches, run.val_loss, wrt)
    result = hypergrad.hypergradient(*call, mode=mode, hypers=hypers)
    assert result.gradients.keys() == {prefix + name for name, _ in run.net.named_parameters()}
    for name, p in run.net.named_parameters():
        assert p.grad is None
        for i in range(p.numel()):
            want = derivative(lambda d, name=name, i=i: Reweighted((name, i, d)).ends_at(), 1e-2, what=f"{name} {i}")
            got = float(result.gradients[prefix + name].view(-1)[i])
            assert abs(got - want) <= AGREE * abs(want) + ROUNDING, (name, i)
    assert hypergrad.check(*call, hypers=hypers, limit=2)


# ---- what is refused


def wrong(name: str) -> tuple[Any, type[Exception], str]:
    search, z = Search(), torch.zeros(())
    given, more = search.arguments()
    penalised = lambda model, batch, h: search.loss(model, batch) + h["a"].sum() + h["b"].sum()  # noqa: E731
    two = (*given[:2], penalised, *given[3:])
    spread, frozen = torch.zeros(()).expand(2), nn.Linear(1, 1).requires_grad_(False)
    calls: dict[str, tuple[Any, type[Exception], str]] = {
        "a copy that nothing reads": ((given, more | {"hypers": {"alpha": search.alpha.clone()}}), ValueError, "nothing reads"),
        "a number that nothing can read": ((given, more | {"hypers": {"alpha": 0.5}}), ValueError, "nothing reads"),
        "copies of a net's parameters": (
            (given, {"wrt": ("w",), "hypers": {"w": search.params[0].detach().clone()}}), ValueError, "nothing reads"),
        "a parameter that the optimizer trains": (
            (given, {"wrt": ("w",), "hypers": {"w": search.params[0]}}), ValueError, "trained by the optimizer"),
        "the net that the optimizer trains": (
            (given, {"wrt": ("w",), "hypers": {"w": search.model.branches}}), ValueError, "trained by the optimizer"),
        "one tensor by two names": ((two, {"wrt": ("a",), "hypers": {"a": z, "b": z}}), ValueError, "same tensor"),
        "one number in memory": ((two, {"wrt": ("a",), "hypers": {"a": spread, "b": z}}), ValueError, "expanded"),
        "a net without parameters": ((given, {"wrt": ("a",), "hypers": {"a": nn.ReLU()}}), ValueError, "no parameter"),
        "a frozen net": ((given, {"wrt": ("a",), "hypers": {"a": frozen}}), ValueError, "no parameter"),
    }  # fmt: skip
    return calls[name] if name else list(calls)  # type: ignore[return-value]


@pytest.mark.parametrize("name", wrong(""))
@pytest.mark.parametrize("mode", ["unrolled", "forward"])
def test_refused(name: str, mode: str) -> None:
    (given, more), error, message = wrong(name)
    weights = [p.detach().clone() for p in given[0].parameters()]
    with pytest.raises(error, match=message):
        hypergrad.hypergradient(*given, **more, mode=mode)
    assert all(torch.equal(a, b) for a, b in zip(weights, given[0].parameters(), strict=True))


def test_the_other_tensors_may_be_idle() -> None:
    """Only what is differentiated in has to be read."""
    given, more = Search().arguments()
    idle = more | {"hypers": more["hypers"] | {"idle": torch.zeros(3)}}
    assert "idle" not in hypergrad.hypergradient(*given, **idle).gradients


def test_modes_agree_on_a_tensor_of_the_users() -> None:
    found = []
    for mode in ("unrolled", "forward"):
        given, more = Search().arguments(mode=mode)
        found.append(hypergrad.hypergradient(*given, **more).gradients["alpha"])
    assert torch.allclose(*found, rtol=MODES_AGREE, atol=0)
