"""compile=True against the eager code: the same numbers, or an error.

Most cases run the traced graphs without a compiler behind them, which takes a tenth of the time; two go through inductor.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hypergrad
from hypergrad import Result
from hypergrad.differentiate.compile import compiled
from tests.cases import Case, case_of
from tests.oracle import assert_same, hypergradient
from tests.problems import DEVICE

SAME = 1e-10  # relative, in float64: another order of the same operations
SINGLE = 1e-4  # relative, in float32: that, and the adjoint of a few steps
MODES: dict[str, dict[str, Any]] = {"every": {"every": 1}, "segments": {"every": 3}, "forward": {"mode": "forward"}}
OPTIMIZERS = (
    "sgd",
    "momentum",
    "nesterov",
    "adam_amsgrad",
    "adamw",
    "rmsprop_momentum",
    "adagrad",
    "adamax",
    "radam",
    "lion",
)
PROBLEMS = ("cnn_batchnorm", "embedding", "tied_frozen", "loss_hypers")

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="inductor needs a C++ compiler on CPU"
)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "eager")


def assert_agrees(found: Result, truth: Result, tolerance: float = SAME) -> None:
    assert found.stats["compiled_steps"] > 0
    assert abs(float(found.value - truth.value)) <= tolerance * abs(float(truth.value))
    assert_same(found, truth, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "mode"),
    [*((name, "every") for name in OPTIMIZERS), *((name, "forward") for name in ("momentum", "adamw", "radam"))],
)
def test_every_optimizer(optimizer: str, mode: str, traced: None) -> None:
    case = Case("mlp", optimizer, wrt=("lr", "weight_decay") if mode == "forward" else None)  # half the directions
    assert_agrees(hypergradient(case, compile=True, **MODES[mode]), hypergradient(case, **MODES[mode]))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["segments", "forward"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_buffers_tied_unused_and_frozen_parameters_and_tensors_in_the_loss(
    problem: str, mode: str, traced: None
) -> None:
    case = Case(
        problem, "momentum", wrt=("lr", *(("weights", "smoothing") if problem == "loss_hypers" else ("weight_decay",)))
    )
    assert_agrees(hypergradient(case, compile=True, **MODES[mode]), hypergradient(case, **MODES[mode]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.slow
def test_clip_value_and_steps_of_validation(mode: str, traced: None) -> None:
    case = Case("mlp", "adam", clip_value=0.05, val_steps=(2, 4, 6))
    assert_agrees(hypergradient(case, compile=True, **MODES[mode]), hypergradient(case, **MODES[mode]))


@pytest.mark.parametrize("mode", ["every", "segments"])
def test_one_gradient_a_step(mode: str, traced: None) -> None:
    case = Case("mlp", "adam", per_step=True)
    assert_agrees(hypergradient(case, compile=True, **MODES[mode]), hypergradient(case, **MODES[mode]))


# ---- a problem of its own


class Work:
    """A small classifier with K batches."""

    def __init__(self, steps: int = 6, dtype: torch.dtype = torch.float64, sizes: tuple[int, ...] = (8,)):
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
        self.batches: list[Any] = [
            (torch.randn(n, 5, dtype=dtype), torch.randint(3, (n,))) for n in (sizes * steps)[:steps]
        ]
        self.held_out = self.batches[0]

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(model(batch[0]), batch[1])

    def __call__(self, loss: Callable[..., Tensor] | None = None, **options: Any) -> Result:
        return hypergrad.hypergradient(
            self.model,
            self.optimizer,
            loss or self.loss,
            self.batches,
            lambda: self.loss(self.model, self.held_out),
            **options,
        )


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_smaller_last_batch(mode: str, traced: None) -> None:
    work = Work(8, sizes=(8, 8, 8, 5))
    assert_agrees(work(compile=True, **MODES[mode]), work(**MODES[mode]))


def test_average_of_weights_and_a_schedule(traced: None) -> None:
    work = Work()
    options: dict[str, Any] = {
        "wrt": ("c", "weight_decay", "ema"),
        "ema": 0.7,
        "hypers": {"c": 1.0},
        "schedules": {"lr": lambda t, h: 0.1 * h["c"] ** (t + 1)},
    }
    for mode in MODES.values():
        assert_agrees(work(compile=True, **options, **mode), work(**options, **mode))


def test_by_parameter_and_by_element(traced: None) -> None:
    work, per = Work(), {"lr": "parameter", "weight_decay": "element"}
    assert_agrees(work(compile=True, per=per, every=2), work(per=per, every=2))


def test_a_second_call_compiles_nothing_and_a_changed_loss_is_compiled_anew(traced: None) -> None:
    work, factor = Work(), 1.0

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return factor * work.loss(model, batch)

    assert work(loss, compile=True, every=2).stats["compiled_graphs"] == 2
    found = work(loss, compile=True, every=2)
    assert found.stats["compiled_graphs"] == 0
    assert found.stats["eager_steps"] == 3  # the first step, computed twice, and its vjp
    assert_same(found, work(loss, every=2), SAME)
    factor = 0.5
    found = work(loss, compile=True, every=2)
    assert found.stats["compiled_graphs"] == 2
    assert_agrees(found, work(loss, every=2))


@pytest.mark.slow
def test_graphs_of_a_loss_that_changed_unseen_are_made_anew(traced: None) -> None:
    work, factor = Work(), {"of": 1.0}

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return factor["of"] * work.loss(model, batch)

    for mode in ({"every": 1}, {"mode": "forward"}):
        factor["of"] = 1.0
        work(loss, compile=True, **mode)
        factor["of"] = 0.5
        assert_agrees(work(loss, compile=True, **mode), work(loss, **mode))


def test_tensors_that_the_loss_reads_are_read_at_every_step(traced: None) -> None:
    work, scale = Work(), torch.ones((), dtype=torch.float64)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return scale * work.loss(model, batch)

    work(loss, compile=True)
    scale.fill_(0.5)
    assert_same(work(loss, compile=True), work(loss), SAME)


def test_everything_is_left_as_it_was(traced: None) -> None:
    work = Work()
    before = {name: x.clone() for name, x in work.model.state_dict().items()}
    objects, rng = [*work.model.parameters(), *work.model.buffers()], torch.get_rng_state()
    configs = [import_module(f"torch.{name}.config") for name in ("_dynamo", "_inductor")]
    config = [dict(each.get_config_copy()) for each in configs]
    work(compile=True)
    work(compile=True, mode="forward")
    assert all(torch.equal(x, before[name]) for name, x in work.model.state_dict().items())
    assert all(a is b for a, b in zip(objects, [*work.model.parameters(), *work.model.buffers()], strict=True))
    assert all(p.grad is None and p.requires_grad for p in work.model.parameters())
    assert torch.equal(rng, torch.get_rng_state())
    assert config == [dict(each.get_config_copy()) for each in configs]


# ---- what is refused


def _decides(work: Work) -> Callable[..., Tensor]:
    return lambda model, batch: work.loss(model, batch) * (2.0 if float(batch[0].sum()) > 0 else 1.0)


def _counts(work: Work) -> Callable[..., Tensor]:
    calls: list[int] = []
    return lambda model, batch: work.loss(model, batch) * (1.0 + 0.1 * len(calls.append(1) or calls))  # type: ignore[func-returns-value]


def _changes_late(work: Work) -> Callable[..., Tensor]:
    """As it was while the graph is traced and compared, then twice as much."""
    calls: list[int] = []
    return lambda model, batch: work.loss(model, batch) * (2.0 if len(calls.append(1) or calls) > 4 else 1.0)  # type: ignore[func-returns-value]


def _draws(work: Work) -> Callable[..., Tensor]:
    return lambda model, batch: work.loss(model, (nn.functional.dropout(batch[0], 0.5), batch[1]))


def _reads_aside(work: Work) -> Callable[..., Tensor]:
    weight = next(work.model.parameters())
    return lambda model, batch: work.loss(model, batch) + weight.square().sum()


@pytest.mark.parametrize(
    ("loss", "error", "says"),
    [
        (_decides, NotImplementedError, "decisions on the values of tensors"),
        (_counts, ValueError, "something in Python that changes from step to step"),
        (_changes_late, ValueError, "something in Python that changes from step to step"),
        (_draws, NotImplementedError, "draws random numbers"),
        (_reads_aside, NotImplementedError, "in another way than as an attribute"),
    ],
)
def test_losses_that_are_refused(loss: Any, error: type[Exception], says: str, traced: None) -> None:
    work = Work(12)
    before = [p.detach().clone() for p in work.model.parameters()]
    with pytest.raises(error, match=says):
        work(loss(work), compile=True)
    assert all(torch.equal(a, b) for a, b in zip(before, work.model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mode": "implicit", "wrt": "weight_decay"}, "for mode='unrolled' and mode='forward'"),
        ({"clip_norm": 1.0}, "does not take clip_norm"),
        ({"mode": "forward", "per": "parameter"}, "differentiates per group"),
        ({"mode": "forward", "per_step": True}, "differentiates per group"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(NotImplementedError, match=says):
        Work()(compile=True, **options)


@pytest.mark.parametrize("optimizer", ["adafactor", "lamb", "muon", "nadam"])
def test_rules_that_read_values_are_refused(optimizer: str) -> None:
    with pytest.raises(NotImplementedError, match="its update rule reads values of tensors"):
        hypergradient(case_of(optimizer), compile=True)


def test_hooks_and_optimizers_without_a_rule_are_refused() -> None:
    class Own(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    work = Work()
    work.optimizer = Own(work.model.parameters(), lr=0.1)
    with pytest.raises(NotImplementedError, match="no update rule"):
        work(compile=True)
    work = Work()
    next(work.model.parameters()).register_hook(lambda g: 2 * g)
    with pytest.raises(NotImplementedError, match="hooks"):
        work(compile=True)


def test_batches_of_ever_new_numbers_are_refused(traced: None) -> None:
    work = Work(24)
    work.batches = [(*batch, float(i // 2)) for i, batch in enumerate(work.batches)]
    with pytest.raises(NotImplementedError, match="Give batches one shape"):
        work(compile=True)
    work.batches = [[object(), *batch[:2]] for batch in work.batches]
    with pytest.raises(TypeError, match="there is a object in one"):
        work(lambda model, batch: work.loss(model, batch[1:]), compile=True)


def test_a_machine_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kw: Any) -> None:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch._inductor, "compile", fail)
    with pytest.raises(NotImplementedError, match="needs a C\\+\\+ compiler"):
        Work()(compile=True)


# ---- through inductor


@pytest.mark.slow
@needs_compiler
def test_inductor_unrolled_in_float32() -> None:
    work = Work(dtype=torch.float32)
    found = work(compile=True, every=2)
    assert_agrees(found, work(every=2), SINGLE)
    assert found.stats["compile_seconds"] > 0


@pytest.mark.slow
@needs_compiler
def test_inductor_forward_in_float64() -> None:
    work = Work()
    assert_agrees(work(compile=True, mode="forward"), work(mode="forward"))


@pytest.mark.slow
def test_tensors_of_the_users_own(traced: None) -> None:
    """Read by name, or held by a net: as the eager code. From a closure a graph would take them for constants."""
    work, c = Work(), torch.tensor(0.1, dtype=torch.float64, device=DEVICE)
    net = nn.Linear(1, 1).double().to(DEVICE)
    penalty = lambda m: sum(p.square().sum() for p in m.parameters())  # noqa: E731

    def named(model: nn.Module, batch: Any, hypers: Any) -> Tensor:
        return work.loss(model, batch) + hypers["c"] * penalty(model)

    def by_net(model: nn.Module, batch: Any) -> Tensor:
        return work.loss(model, batch) + net(penalty(model).reshape(1)).sum() ** 2

    def from_outside(model: nn.Module, batch: Any) -> Tensor:
        return work.loss(model, batch) + c * penalty(model)

    def both(model: nn.Module, batch: Any, hypers: Any) -> Tensor:
        return work.loss(model, batch) + hypers["c"] * c * penalty(model)

    for mode in MODES.values():
        options = {"wrt": "c", "hypers": {"c": c}, **mode}
        assert_agrees(work(named, compile=True, **options), work(named, **options))
        nets = {"wrt": "net", "hypers": {"net": net}, **mode}
        assert_agrees(work(by_net, compile=True, **nets), work(by_net, **nets))
        with pytest.raises(NotImplementedError, match=r"from a closure.*third argument"):
            work(from_outside, compile=True, **options)
        with pytest.raises(ValueError, match="a compiled step is not what the loss computes"):
            work(both, compile=True, **options)
