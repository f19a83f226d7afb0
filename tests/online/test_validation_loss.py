"""The val_loss of a model and a loader: what it draws, where from, in which mode, and what it says of wrong arguments."""

from __future__ import annotations

import copy
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, TensorDataset, WeightedRandomSampler

import hypergrad
from hypergrad.online.validation_loss import moved

N = 50
Pair = namedtuple("Pair", "x y")


class Seen(nn.Module):
    """A linear model that notes its inputs, and in which mode it saw them."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.inputs: list[list[float]] = []
        self.modes: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.inputs.append(x.tolist())
        self.modes.append(self.training)
        return self.weight * x


def numbers(n: int = N) -> TensorDataset:
    """Example i is (i, 0)."""
    return TensorDataset(torch.arange(float(n)), torch.zeros(n))


class Items(Dataset[Any]):
    """The same without `__getitems__`, as dicts."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> dict[str, float]:
        return {"x": float(i), "y": 0.0}


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[tuple[float, float]]:
        return iter([(float(i), 0.0) for i in range(N)])


def mean(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).mean()


def of_dict(model: nn.Module, batch: Any) -> Tensor:
    return model(batch["x"].float()).mean()


LOADERS: dict[str, tuple[Callable[[], Any], Callable[..., Tensor]]] = {
    "pairs": (lambda: DataLoader(numbers(), batch_size=8), mean),
    "shuffled": (lambda: DataLoader(numbers(), batch_size=8, shuffle=True), mean),
    "dicts": (lambda: DataLoader(Items(), batch_size=8), of_dict),
    "weighted": (lambda: DataLoader(numbers(), batch_size=8, sampler=WeightedRandomSampler([1.0] * N, N)), mean),
    "batch sampler": (lambda: DataLoader(numbers(), batch_sampler=BatchSampler(range(N), 8, False)), mean),
    "stream": (lambda: DataLoader(Endless(), batch_size=8), mean),
    "list": (lambda: [(torch.arange(8.0) + 8 * i, torch.zeros(8)) for i in range(6)], mean),
}


@pytest.mark.parametrize("name", LOADERS)
def test_a_reading_is_the_loss_of_examples_of_the_set_and_goes_on_for_ever(name: str) -> None:
    make, criterion = LOADERS[name]
    model = Seen()
    val_loss = hypergrad.validation(model, make(), criterion)
    losses = [val_loss() for _ in range(40)]
    assert all(set(x) <= set(range(N)) for x in model.inputs)
    assert [loss.item() for loss in losses] == pytest.approx([2 * sum(x) / len(x) for x in model.inputs], rel=1e-6)
    (slope,) = torch.autograd.grad(losses[0], [model.weight])
    assert slope.item() == pytest.approx(sum(model.inputs[0]) / len(model.inputs[0]))
    assert len(set(map(tuple, model.inputs))) > 4
    assert len({i for x in model.inputs for i in x}) > 0.9 * N  # of an unshuffled set not the first batch alone


@pytest.mark.parametrize("name", LOADERS)
def test_the_same_random_numbers_give_the_same_batch(name: str) -> None:
    """As of readings that a tuner compares. Of a set with indices whatever came before, as in a run that goes on."""
    make, criterion = LOADERS[name]
    model = Seen()
    val_loss, other = (hypergrad.validation(model, make(), criterion) for _ in range(2))

    def drawn(f: Callable[[], Tensor], seed: int) -> list[float]:
        torch.manual_seed(seed)
        f()
        return model.inputs[-1]

    first, same, another = drawn(val_loss, 1), drawn(val_loss, 1), drawn(val_loss, 2)
    assert first == same != another
    assert drawn(val_loss, 1) == first or name in ("stream", "batch sampler")
    if name not in ("stream", "batch sampler"):
        assert drawn(other, 2) == another


def test_examples_are_drawn_alike() -> None:
    """Without replacement: 4,000 readings of 8 of 50, each example in 640, give or take 6 standard deviations."""
    model = Seen()
    val_loss = hypergrad.validation(model, DataLoader(numbers(), batch_size=8), mean)
    counts = torch.zeros(N)
    for _ in range(4000):
        val_loss()
        assert len(set(model.inputs[-1])) == 8
        counts[torch.tensor(model.inputs.pop()).long()] += 1
    assert (counts - 640).abs().max() < 6 * (4000 * 0.16 * 0.84) ** 0.5


def test_size_and_sampler() -> None:
    model = Seen()
    loader = DataLoader(numbers(), batch_size=8)
    hypergrad.validation(model, loader, mean, size=20)()
    assert len(model.inputs[-1]) == 20
    for size in (N, 10 * N):  # the whole set, always the same
        hypergrad.validation(model, loader, mean, size=size)()
        assert model.inputs[-1] == list(range(N))
    some = DataLoader(numbers(), batch_size=8, sampler=torch.utils.data.SubsetRandomSampler(range(3, 6)))
    for _ in range(5):
        hypergrad.validation(model, some, mean)()
        assert sorted(model.inputs[-1]) == [3.0, 4.0, 5.0]


@pytest.mark.parametrize("mode", ["auto", "eval", "train"])
def test_mode_of_every_layer_is_as_before(mode: str) -> None:
    norms = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    model = nn.Sequential(nn.Linear(3, 4), *norms, nn.Dropout(0.5), nn.Linear(4, 1))
    norms[0].eval()  # one that training has frozen
    data = TensorDataset(torch.randn(20, 3), torch.randn(20, 1))
    val_loss = hypergrad.validation(model, DataLoader(data, batch_size=20), nn.MSELoss(), mode=mode)
    before = [module.training for module in model.modules()]
    heard: list[bool] = []
    for layer in (*norms, model[3]):
        layer.register_forward_pre_hook(lambda module, args: heard.append(module.training))
    losses = {val_loss().item() for _ in range(4)}
    assert [module.training for module in model.modules()] == before
    assert heard == [False, mode != "eval", mode == "train"] * 4  # frozen BatchNorm, BatchNorm, dropout
    assert len(losses) == (4 if mode == "train" else 1)
    with pytest.raises(RuntimeError):
        hypergrad.validation(model, [(torch.ones(2, 7), torch.ones(2, 1))], nn.MSELoss(), mode=mode)()
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize(
    "batch",
    [
        torch.ones(2),
        (torch.ones(2), torch.zeros(2)),
        [torch.ones(2), "name", 3],
        {"x": torch.ones(2), "more": [torch.ones(1)]},
        OrderedDict(x=torch.ones(2)),
        Pair(torch.ones(2), {"y": torch.ones(2)}),
    ],
)
def test_tensors_are_moved_in_containers_of_the_same_kinds(batch: Any) -> None:
    def devices(x: Any) -> list[str]:
        if isinstance(x, Tensor):
            return [x.device.type]
        inner = x.values() if isinstance(x, dict) else x if isinstance(x, (tuple, list)) else ()
        return [name for each in inner for name in devices(each)]

    there = moved(batch, torch.device("meta"))
    assert type(there) is type(batch)
    assert set(devices(there)) == {"meta"} and set(devices(batch)) == {"cpu"}
    if isinstance(batch, list):
        assert there[1:] == ["name", 3]


def run(total: int | None = 60) -> tuple[nn.Module, Any, hypergrad.Tuner, Callable[[int, int], None]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1))
    opt = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=1e-3)
    x = torch.randn(120, 3)
    y = x[:, :1].sin()
    val_loss = hypergrad.validation(model, DataLoader(TensorDataset(x[60:], y[60:]), batch_size=16), nn.MSELoss())
    tuner = hypergrad.Tuner(model, opt, val_loss, total_steps=total, every=3)

    def train(first: int, last: int) -> None:
        for t in range(first, last):
            torch.manual_seed(t)
            opt.zero_grad()
            tuner.backward(nn.functional.mse_loss(model(x[:60]), y[:60]))
            opt.step()

    return model, opt, tuner, train


def test_tuned_run_resumes_exactly() -> None:
    whole, half, again = run(), run(), run()
    whole[3](0, 60)
    half[3](0, 31)
    for part, other in zip(again[:3], half[:3], strict=True):
        part.load_state_dict(copy.deepcopy(other.state_dict()))
    again[3](31, 60)
    assert all(torch.equal(p, q) for p, q in zip(whole[0].parameters(), again[0].parameters(), strict=True))
    assert whole[2].val_loss == again[2].val_loss and whole[2].stats["hyper_steps"] > 10


def test_training_is_untouched() -> None:
    """Frozen from the start, the weights are those of a plain run, bit for bit."""
    tuned = run(None)
    tuned[2].freeze()
    tuned[3](0, 20)
    plain = run(None)
    plain[2].close()
    plain[3](0, 20)
    assert all(torch.equal(p, q) for p, q in zip(tuned[0].parameters(), plain[0].parameters(), strict=True))
    assert all(torch.equal(p, q) for p, q in zip(tuned[0].buffers(), plain[0].buffers(), strict=True))


def test_hypergradient_by_it_is_that_of_a_function_written_out() -> None:
    x = torch.randn(30, 3, dtype=torch.float64)
    y = x[:, :1].cos()

    def gradients(own: bool) -> Any:
        torch.manual_seed(0)
        model = nn.Linear(3, 1).double()
        opt = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.01)
        loader = DataLoader(TensorDataset(x[20:], y[20:]), batch_size=10)
        val_loss = (
            hypergrad.validation(model, loader, nn.MSELoss()) if own else lambda: nn.MSELoss()(model(x[20:]), y[20:])
        )
        loss = lambda model, batch: nn.functional.mse_loss(model(x[batch]), y[batch])  # noqa: E731
        return hypergrad.hypergradient(model, opt, loss, [slice(0, 10), slice(10, 20)], val_loss).gradients

    one, other = gradients(True), gradients(False)
    assert all(torch.equal(one[name], other[name]) and one[name] != 0 for name in ("lr", "weight_decay"))


def a_loader() -> Any:
    return DataLoader(numbers(), batch_size=8)


A_CLASS: Any = nn.MSELoss
A_FLOAT: Any = lambda outputs, targets: 0.0  # noqa: E731
WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "iterator": (lambda: hypergrad.validation(Seen(), iter(a_loader()), mean), r"rather than iter\(loader\)"),
    "dataset": (lambda: hypergrad.validation(Seen(), numbers(), mean), r"pass DataLoader\(dataset"),  # type: ignore[arg-type]
    "tensor": (lambda: hypergrad.validation(Seen(), torch.ones(3), mean), "must be a DataLoader"),  # type: ignore[arg-type]
    "no examples": (lambda: hypergrad.validation(Seen(), DataLoader(numbers(0)), mean), "has no examples"),
    "no batches": (lambda: hypergrad.validation(Seen(), [], mean), "has no batches"),
    "model": (lambda: hypergrad.validation(mean, a_loader(), mean), "must be a torch.nn.Module"),  # type: ignore[arg-type]
    "criterion's class": (lambda: hypergrad.validation(Seen(), a_loader(), A_CLASS), r"pass MSELoss\(\), not"),
    "criterion": (lambda: hypergrad.validation(Seen(), a_loader(), None), "pass a function"),  # type: ignore[arg-type]
    "mode": (lambda: hypergrad.validation(Seen(), a_loader(), mean, mode="test"), "'auto', 'eval' or 'train'"),
    "size": (lambda: hypergrad.validation(Seen(), a_loader(), mean, size=0), "1 or more"),
    "size of a list": (lambda: hypergrad.validation(Seen(), [1], mean, size=3), "make them larger"),
    "size of a stream": (lambda: hypergrad.validation(Seen(), DataLoader(Endless()), mean, size=3), "make them larger"),
    "dict": (
        lambda: hypergrad.validation(Seen(), DataLoader(Items()), nn.MSELoss())(),
        r"a batch is a dict, .* f\(model, batch\)",
    ),
    "not reduced": (lambda: hypergrad.validation(Seen(), a_loader(), torch.sub)(), r"shape \(8,\): take its mean"),
    "a float": (lambda: hypergrad.validation(Seen(), a_loader(), A_FLOAT)(), "one number, got float"),
    "no gradient": (
        lambda: hypergrad.validation(Seen(), a_loader(), lambda a, b: a.detach().mean())(),
        "accuracy has no gradient",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_say_what_to_do(name: str) -> None:
    act, words = WRONG[name]
    with pytest.raises((TypeError, ValueError), match=words):
        act()


def test_it_may_be_evaluated_without_gradients() -> None:
    with torch.no_grad():
        assert not hypergrad.validation(Seen(), a_loader(), mean)().requires_grad
