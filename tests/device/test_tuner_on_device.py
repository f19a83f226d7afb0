"""The tuner on the stand-in for a GPU: the numbers of the CPU, one wait a step, kernels that do not grow with the tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

import hypergrad
from hypergrad.policies import WeightDecaySizing
from tests.device.stand_in import DEVICE, NAME, stand_in

pytestmark = pytest.mark.slow

STEPS = 40
EVERY = 10
SAME = 1e-12  # relative: the same operations in float64, some of them in one kernel for several tensors
CAPTURABLE = 1e-3  # torch's capturable steps correct their bias in float32

Optimizers = Callable[[list[list[nn.Parameter]]], list[torch.optim.Optimizer]]


def sgd(groups: list[list[nn.Parameter]]) -> list[torch.optim.Optimizer]:
    both = [{"params": groups[0]}, {"params": groups[1], "lr": 2e-3}]
    return [torch.optim.SGD(both, lr=1e-3, momentum=0.9, weight_decay=1e-4)]


def adam(groups: list[list[nn.Parameter]]) -> list[torch.optim.Optimizer]:
    return [torch.optim.Adam([{"params": g} for g in groups], lr=1e-3, weight_decay=1e-4)]


def adamw(groups: list[list[nn.Parameter]], **flags: Any) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW([{"params": g} for g in groups], lr=1e-3, **flags)]


def one_for_each(groups: list[list[nn.Parameter]]) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(groups[0], lr=1e-3, momentum=0.9, weight_decay=1e-4), torch.optim.AdamW(groups[1], lr=1e-3)]


def tensor_lr(groups: list[list[nn.Parameter]]) -> list[torch.optim.Optimizer]:
    device = groups[0][0].device
    on_host = device.type == "cpu"  # torch takes no lr in a tensor there without capturable
    lr = 1e-3 if on_host else torch.tensor(1e-3, dtype=torch.float64, device=device)
    return [torch.optim.AdamW([p for g in groups for p in g], lr=lr, capturable=not on_host, foreach=False)]


@dataclass(frozen=True)
class Loop:
    """A training loop, and what is different in it."""

    optimizers: Optimizers
    options: dict[str, Any] = field(default_factory=dict)
    clip: float | None = None
    parts: int = 1  # calls of backward a step
    to_none: bool = True  # what zero_grad leaves
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None
    bad: tuple[int, ...] = ()  # steps whose batch holds a NaN
    waits: int = 1  # a step may make
    same: float = SAME  # how far from the CPU

    def build(self, device: str, layers: int = 2) -> Run:
        torch.manual_seed(0)
        hidden = [part for _ in range(layers) for part in (nn.Linear(6, 6), nn.Tanh())]
        model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), *hidden, nn.Linear(6, 3))
        model = model.double().to(device)
        params = list(model.parameters())
        groups = [params[: len(params) // 2], params[len(params) // 2 :]]
        draws = torch.Generator().manual_seed(1)
        x = torch.randn(64, 5, generator=draws, dtype=torch.float64).to(device)
        y = torch.randint(3, (64,), generator=draws).to(device)
        optimizers = self.optimizers(groups)
        schedulers = [self.scheduler(opt) for opt in optimizers] if self.scheduler else []
        options = {"clip_norm": self.clip, "every": EVERY} | self.options
        tuner = hypergrad.Tuner(model, optimizers, lambda: cross_entropy(model(x[32:]), y[32:]), **options)
        return Run(self, model, optimizers, schedulers, tuner, x, y)


@dataclass
class Run:
    loop: Loop
    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    schedulers: list[Any]
    tuner: hypergrad.Tuner
    x: Tensor
    y: Tensor

    def step(self, t: int) -> None:
        loop = self.loop
        for opt in self.optimizers:
            with DEVICE.aside():
                opt.zero_grad(set_to_none=loop.to_none)
        for part in range(loop.parts):
            first = (8 * (t + part)) % 32
            x = self.x[first : first + 8]
            with DEVICE.aside():  # the user's forward pass
                x = x * float("nan") if t in loop.bad else x
                loss = cross_entropy(self.model(x), self.y[first : first + 8]) / loop.parts
            self.tuner.backward(loss)
        if loop.clip is not None:
            with DEVICE.aside():
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), loop.clip)
        for opt in self.optimizers:
            opt.step()
        for scheduler in self.schedulers:
            scheduler.step()

    def numbers(self) -> dict[str, Tensor]:
        found = {f"weights {name}": x.detach().cpu() for name, x in self.model.state_dict().items()}
        found |= {f"value of {name}": x for name, x in self.tuner.values.items()}
        found |= {f"hypergradient of {name}": x.cpu() for name, x in self.tuner.hypergradients.items()}
        return found | {"validation loss": torch.tensor(self.tuner.val_loss)}


KNOWN = {"total_steps": STEPS}
MOVED = hypergrad.Hyperparameter(start=0.05)
LOOPS: dict[str, Loop] = {
    "SGD": Loop(sgd, KNOWN),
    "SGD, no length": Loop(sgd),
    "SGD, momentum too": Loop(sgd, KNOWN | {"tune": ("lr", "weight_decay", "momentum")}),
    "Adam": Loop(adam, KNOWN),
    "AdamW": Loop(adamw, KNOWN),
    "AdamW, no length": Loop(adamw),
    "AdamW, betas": Loop(adamw, {"tune": ("lr", "betas", "eps")}),
    "AdamW, fused": Loop(lambda groups: adamw(groups, fused=True), KNOWN),
    "AdamW, capturable": Loop(lambda g: adamw(g, capturable=g[0][0].device.type != "cpu"), KNOWN, same=CAPTURABLE),
    "AdamW, lr in a tensor": Loop(tensor_lr, KNOWN, same=CAPTURABLE),
    "clipped": Loop(adamw, KNOWN, clip=0.05),
    "clipped now and then": Loop(sgd, KNOWN, clip=0.6),
    "accumulated": Loop(adamw, KNOWN, parts=3),
    "accumulated, zeros": Loop(sgd, KNOWN, parts=3, to_none=False),
    "zeros": Loop(sgd, KNOWN, to_none=False),
    "accumulated and clipped": Loop(sgd, KNOWN, clip=0.3, parts=2),
    "two optimizers": Loop(one_for_each, KNOWN, waits=2),
    "two optimizers, clipped": Loop(one_for_each, KNOWN, clip=0.3, waits=2),
    "cosine": Loop(sgd, scheduler=lambda opt: CosineAnnealingLR(opt, STEPS)),
    "lambda": Loop(adamw, scheduler=lambda opt: LambdaLR(opt, lambda t: 0.97**t)),
    # whether weights and buffers are finite is read where a gradient is not; a roll-back waits for what it goes back to
    "far too large": Loop(sgd, {"tune": {"lr": hypergrad.Hyperparameter(start=8.0)}}, bad=(12, 30), waits=5),
    "no warm start": Loop(sgd, {"tune": {"lr": MOVED}, "warm_start": False}),
    "no average": Loop(adamw, KNOWN | {"average": False}),
}


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # roll-backs, and weight decay that starts at 0
        yield


def assert_equal(there: dict[str, Tensor], here: dict[str, Tensor], rtol: float = SAME) -> None:
    assert there.keys() == here.keys()
    for name, x in there.items():
        torch.testing.assert_close(
            x, here[name], rtol=rtol, atol=1e-15, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


def trained(loop: Loop, device: str) -> tuple[Run, int, int]:
    """A run, the most waits of a step, and of one with a hyperparameter step in it; those of the user's losses left out.

    Not counted: the first step, which sizes lr and reads while it does. Where weight decay is sized, once or twice in a run,
    there is one wait more. Where a validation loss that may have risen is read again there are two, one of them for a copy on
    the host that was sent at an earlier reading, and where training goes back to where it was lowest, as counters on the
    device are read.
    """
    run, plain, hyper = loop.build(device), 0, 0
    every, hyper_steps, of_decay = run.tuner._loop.every, run.tuner._hyper, WeightDecaySizing.sized
    hyper_steps.validation = aside(hyper_steps.validation)
    for t in range(STEPS):
        DEVICE.clear()
        sizing = mock.patch.object(WeightDecaySizing, "sized", autospec=True, side_effect=of_decay)
        again = mock.patch.object(hyper_steps, "_read_both", wraps=hyper_steps._read_both)
        recovery = run.tuner._loop.recovery
        going_back = mock.patch.object(recovery, "go_back", wraps=recovery.go_back)
        with sizing as sized, again as read_again, going_back as back:
            run.step(t)
        waits = sum(DEVICE.waits.values()) - sized.call_count - 2 * read_again.call_count - back.call_count
        if (t + 1) % every == 0:
            hyper = max(hyper, waits)
        elif t > 0:
            plain = max(plain, waits)
    return run, plain, hyper


def aside(f: Callable[..., Any]) -> Callable[..., Any]:
    """What f does is not counted."""

    def call(*args: Any, **kw: Any) -> Any:
        with DEVICE.aside():
            return f(*args, **kw)

    return call


@pytest.mark.parametrize("name", LOOPS)
def test_a_run_is_that_of_the_cpu_and_waits_once_a_step(name: str) -> None:
    loop = LOOPS[name]
    with stand_in(), quiet():
        run, plain, hyper = trained(loop, NAME)
        there, stats = run.numbers(), dict(run.tuner.stats)
    with quiet():
        run, _, _ = trained(loop, "cpu")
    assert_equal(there, run.numbers(), loop.same)
    assert stats == run.tuner.stats
    assert plain <= loop.waits, f"{plain} waits a step"
    assert hyper <= loop.waits + 1, f"{hyper} waits a hyperparameter step"


@pytest.mark.parametrize("name", ["SGD", "AdamW, no length", "two optimizers"])
def test_recording_makes_no_step_wait_longer(name: str, tmp_path: Path) -> None:
    loop = LOOPS[name]
    recorded = replace(loop, options=loop.options | {"log_dir": tmp_path})
    with stand_in(), quiet():
        run, plain, hyper = trained(recorded, NAME)
        run.tuner.close()
    assert (plain, hyper) == (loop.waits, loop.waits + 1)


def test_printing_a_tuner_waits_no_longer_than_reading_its_values() -> None:
    weights = torch.zeros(64, 5)
    with stand_in(), quiet():
        for loop in (Loop(sgd), Loop(tensor_lr)):
            loop = replace(loop, options={"hypers": {"weights": weights.to(NAME)}, "mode": "forward"})
            tuner = loop.build(NAME).tuner
            DEVICE.clear()
            assert tuner.values["lr"].numel() > 0
            reading = DEVICE.waits.total()
            DEVICE.clear()
            assert "weights of shape (64, 5)" in repr(tuner)
            assert DEVICE.waits.total() == reading


@pytest.mark.parametrize("name", ["AdamW", "accumulated", "two optimizers", "cosine", "AdamW, fused"])
def test_a_run_that_goes_on_from_a_state_is_the_unbroken_one(name: str) -> None:
    found = []
    with stand_in(), quiet():
        for broken in (False, True):
            run = LOOPS[name].build(NAME)
            for t in range(STEPS):
                if broken and t == STEPS // 2:
                    state = [x.state_dict() for x in (run.model, *run.optimizers, *run.schedulers, run.tuner)]
                    run.tuner.close()
                    run = LOOPS[name].build(NAME)
                    parts = (run.model, *run.optimizers, *run.schedulers, run.tuner)
                    for part, x in zip(parts, state, strict=True):
                        part.load_state_dict(x)
                run.step(t)
            found.append(run.numbers())
    assert_equal(*found)


@pytest.mark.parametrize("mode", ["unrolled", "implicit", "forward"])
def test_whole_steps_taken_by_the_tuner(mode: str) -> None:
    found = []
    for device in (NAME, "cpu"):
        with stand_in() if device == NAME else nullcontext(), quiet():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double().to(device)
            x, y = torch.randn(64, 5, dtype=torch.float64).to(device), torch.randint(3, (64,)).to(device)
            opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
            tuner = hypergrad.Tuner(
                model, opt, lambda m=model, x=x, y=y: cross_entropy(m(x), y), loss=lambda m, b: cross_entropy(m(b[0]), b[1]),
                mode=mode, horizon=9, clip_norm=0.2,
            )  # fmt: skip
            for t in range(STEPS):
                first = 8 * t % 64
                tuner.step((x[first : first + 8], y[first : first + 8]))
            weights = {name: p.detach().cpu() for name, p in model.named_parameters()}
            found.append(weights | tuner.values)
    assert_equal(*found)


def test_weights_come_back_from_the_average_and_from_a_roll_back() -> None:
    with stand_in(), quiet():
        run = LOOPS["SGD"].build(NAME)
        for t in range(STEPS):
            run.step(t)
        before = [p.detach().cpu() for p in run.model.parameters()]
        with run.tuner.averaged():
            moved = [p.detach().cpu() for p in run.model.parameters()]
        after = [p.detach().cpu() for p in run.model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(before, moved, strict=True))


def own_kernels(loop: Loop, layers: int) -> tuple[int, list[int]]:
    """The number of tensors, and of the kernels of each step that are hypergrad's own.

    Not counted: the user's forward passes, autograd's own kernels in a backward pass or product, and torch's optimizer. Where
    there are gradients already, autograd adds to them tensor by tensor, as in `loss.backward()`; else it takes them as they are.
    """
    grad, backward, kernels = torch.autograd.grad, torch.autograd.backward, []
    adds = mock.patch("torch.autograd.backward", aside(backward) if loop.parts > 1 else backward)
    with stand_in(), quiet(), mock.patch("torch.autograd.grad", aside(grad)), adds:
        run = loop.build(NAME, layers)
        run.tuner._hyper.validation = aside(run.tuner._hyper.validation)
        for opt in run.optimizers:
            opt.register_step_pre_hook(lambda *_: setattr(DEVICE, "counts", False))
            last = opt.register_step_post_hook(lambda *_: setattr(DEVICE, "counts", True))
            opt._optimizer_step_post_hooks.move_to_end(last.id, last=False)
        for t in range(EVERY + 4):
            DEVICE.clear()
            run.step(t)
            kernels.append(sum(DEVICE.kernels.values()))
        return len(list(run.model.parameters())), kernels


@pytest.mark.parametrize("name", ["SGD", "AdamW", "accumulated, zeros", "clipped"])
def test_kernels_do_not_grow_with_the_number_of_tensors(name: str) -> None:
    """From the third step on: in the first the optimizer's state does not exist yet.

    Every tenth step the guard keeps the buffers of a good state, if it is one: these are left out.
    """
    loop = replace(LOOPS[name], options=LOOPS[name].options | {"warm_start": False})
    found = dict(own_kernels(loop, layers) for layers in (9, 27, 72))
    assert list(found) == [24, 60, 150]
    found = {n: [k for t, k in enumerate(kernels) if t > 1 and t % EVERY] for n, kernels in found.items()}
    assert found[24] == found[60] == found[150]
