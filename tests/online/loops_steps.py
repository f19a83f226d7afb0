"""Loops that differ in what happens around the step: accumulation, averages, interruptions, weights written by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from tests.online.live_loops import Backward
from tests.online.loop_rows import REFUSED, Live, N, Row

Step = Callable[[nn.Module, Any, Backward, int, tuple[Tensor, Tensor]], None]


def net(dropout: float = 0.1) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3))


def batches(n: int = N) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(6, 5, generator=g), torch.randint(3, (6,), generator=g)) for _ in range(n)]


def ce(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def sgd(model: nn.Module, **kw: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.2, "momentum": 0.8, "weight_decay": 0.01, **kw})


def plain_step(model: nn.Module, opt: Any, backward: Backward, t: int, batch: tuple[Tensor, Tensor]) -> None:
    opt.zero_grad()
    backward(ce(model, batch))
    opt.step()


def each(step: Step, make: Callable[[nn.Module], Any] = sgd, steps: int = N) -> Callable[[], Live]:
    """A loop whose body is `step`."""

    def build() -> Live:
        model = net()
        opt = make(model)
        *training, held_out = batches(steps + 1)

        def train(backward: Backward) -> None:
            for t, batch in enumerate(training):
                step(model, opt, backward, t, batch)

        return Live(model, [opt], train, lambda: ce(model, held_out))

    return build


# ---- averages of the weights


def averaged(decay: float | None, validate_there: bool = False) -> Callable[[], Live]:
    def build() -> Live:
        model = net()
        opt, kw = sgd(model), {} if decay is None else {"multi_avg_fn": get_ema_multi_avg_fn(decay)}
        mean: Any = AveragedModel(model, **kw)
        *training, held_out = batches(N + 1)

        def train(backward: Backward) -> None:
            for t, batch in enumerate(training):
                plain_step(model, opt, backward, t, batch)
                mean.update_parameters(model)

        return Live(
            model, [opt], train, lambda: ce(mean if validate_there else model, held_out),
            also=lambda: list(mean.state_dict().values()),
        )  # fmt: skip

    return build


def swa() -> Live:
    """Torch's recipe: an average from step 3 on, and an lr that goes over to a constant."""
    model = net()
    opt, mean = sgd(model), AveragedModel(model)
    decay = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
    *training, held_out = batches(N + 1)

    def train(backward: Backward) -> None:
        constant = None
        for t, batch in enumerate(training):
            plain_step(model, opt, backward, t, batch)
            if t >= 3:
                constant = constant or SWALR(opt, swa_lr=0.05, anneal_epochs=2)
                mean.update_parameters(model)
                constant.step()
            else:
                decay.step()

    return Live(model, [opt], train, lambda: ce(model, held_out), also=lambda: list(mean.state_dict().values()))


# ---- steps that are left out, or broken off


def every_other_left_out(model: nn.Module, opt: Any, backward: Backward, t: int, batch: tuple[Tensor, Tensor]) -> None:
    opt.zero_grad()
    backward(ce(model, batch))
    if t % 3 != 1:
        opt.step()


def only_a_look(model: nn.Module, opt: Any, backward: Backward, t: int, batch: tuple[Tensor, Tensor]) -> None:
    """Batches that are thrown away before anything is done."""
    if t % 3 == 1:
        ce(model, batch)
        return
    plain_step(model, opt, backward, t, batch)


def interrupted(where: str) -> Step:
    """Ctrl-C at the third step, in a notebook, and the next cell goes on with the next batch."""

    def stopped(here: str, t: int) -> None:
        if here == where and t == 2:
            raise KeyboardInterrupt

    def step(model: nn.Module, opt: Any, backward: Backward, t: int, batch: tuple[Tensor, Tensor]) -> None:
        try:
            opt.zero_grad()
            loss = ce(model, batch)
            stopped("before backward", t)
            backward(loss)
            stopped("before the step", t)
            opt.step()
        except KeyboardInterrupt:
            pass

    return step


def validation_interrupted() -> Live:
    """Ctrl-C while the tuner calls val_loss; the next cell goes on. The plain loop is not interrupted there."""
    live, calls = each(plain_step)(), list[int]()
    validate = live.val_loss

    def val_loss() -> Tensor:
        calls.append(0)
        if len(calls) == 2:  # the first is the tuner's own trial
            raise KeyboardInterrupt
        return validate()

    step, opt = live.optimizers[0].step, live.optimizers[0]

    def interruptible(*args: Any) -> None:
        with suppress(KeyboardInterrupt):
            step(*args)

    opt.step = interruptible  # type: ignore[method-assign]
    live.val_loss = val_loss
    return live


def stops_early() -> Live:
    """Validates after every epoch, keeps the best weights, stops when patience ends, and loads the best."""
    model = net()
    opt = sgd(model)
    training, held_out = batches(3), batches(4)[3]

    def train(backward: Backward) -> None:
        best, kept, left = float("inf"), copy.deepcopy(model.state_dict()), 2
        for _ in range(4):
            model.train()
            for t, batch in enumerate(training):
                plain_step(model, opt, backward, t, batch)
            model.eval()
            with torch.no_grad():
                loss = float(ce(model, held_out))
            if loss < best:
                best, kept = loss, copy.deepcopy(model.state_dict())
            elif (left := left - 1) == 0:
                break
        model.train()
        assert kept

    return Live(model, [opt], train, lambda: ce(model, held_out))


def loaded(workers: int) -> Callable[[], Live]:
    def build() -> Live:
        model = net()
        opt = sgd(model)
        *training, held_out = batches(N + 1)
        x, y = (torch.cat(parts) for parts in zip(*training))
        generator = torch.Generator().manual_seed(3)
        loader = DataLoader(TensorDataset(x, y), 6, shuffle=True, generator=generator, num_workers=workers)

        def train(backward: Backward) -> None:
            for t, batch in enumerate(loader):
                plain_step(model, opt, backward, t, batch)

        return Live(model, [opt], train, lambda: ce(model, held_out))

    return build


# ---- gradients and losses in several parts


def two_calls(model: nn.Module, opt: Any, backward: Backward, t: int, batch: tuple[Tensor, Tensor]) -> None:
    """Two tasks, two calls."""
    opt.zero_grad()
    backward(ce(model, batch))
    backward(0.3 * model(batch[0]).square().mean())
    opt.step()


def one_graph_twice(model: nn.Module, opt: Any, backward: Any, t: int, batch: tuple[Tensor, Tensor]) -> None:
    opt.zero_grad()
    out = model(batch[0])
    backward(nn.functional.cross_entropy(out, batch[1]), retain_graph=True)
    backward(0.3 * out.square().mean())
    opt.step()


def accumulated(model: nn.Module, opt: Any, backward: Backward, t: int, batch: tuple[Tensor, Tensor]) -> None:
    """Karpathy's: no zero_grad before the first, a step every second batch, zeroed after it."""
    backward(ce(model, batch) / 2)
    if t % 2:
        opt.step()
        opt.zero_grad(set_to_none=True)


STEPS: dict[str, Row] = {
    "gradient accumulation, zeroed after the step": Row(each(accumulated)),
    "two tasks, two calls of backward": Row(each(two_calls)),
    "two losses of one graph (retain_graph)": Row(each(one_graph_twice), how="pass retain_graph to `tuner.backward`"),
    "EMA of the weights (AveragedModel)": Row(averaged(0.9)),
    "SWA (AveragedModel, SWALR)": Row(
        swa, how="lr is tuned as a multiplier of what the schedulers write, `swa_lr` too", scheduled=True
    ),
    "EMA model in val_loss": Row(
        averaged(0.9, True), REFUSED, "validate the model that trains; `average=True` takes a mean of its weights",
        "shares no parameter",
    ),
    "iterations without optimizer.step": Row(each(every_other_left_out)),
    "batches that are skipped (continue)": Row(each(only_a_look)),
    "KeyboardInterrupt in the forward pass, and on": Row(each(interrupted("before backward"))),
    "KeyboardInterrupt between backward and step, and on": Row(each(interrupted("before the step"))),
    "KeyboardInterrupt in val_loss, and on": Row(validation_interrupted, options={"every": 3}),
    "epochs with train()/eval(), early stopping": Row(stops_early),
    "DataLoader, shuffled": Row(loaded(0)),
    "DataLoader with a worker": Row(loaded(1), slow=True),
}  # fmt: skip
