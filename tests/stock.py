"""The stock loop with schedules, an average of the weights, and numbers moved at will; its finite differences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import hypergrad
from hypergrad import Result
from tests.cases import Case
from tests.oracle import AGREE, ROUNDING, WIDTH, derivative, shifted, train
from tests.problems import Setup

Number = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """A case with schedules and an average.

    Args:
        hypers: beside those of the problem, as nested lists of numbers.
        schedules: as for `hypergradient`.
        wrt: keys of hypers, and names.
        width: of finite differences, relative to max(|value|, 0.02).
    """

    case: Case
    wrt: tuple[str, ...]
    hypers: Number = field(default_factory=dict)
    schedules: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    ema: float | None = None
    per_step: bool = False
    width: float = 2e-3

    def tensors(self, setup: Setup) -> dict[str, Tensor]:
        return dict(setup.hypers or {}) | {k: torch.tensor(x, dtype=torch.float64) for k, x in self.hypers.items()}

    def hypergradient(self, **options: Any) -> Result:
        setup = self.case.build()
        with self.case.arithmetic():
            return hypergrad.hypergradient(
                setup.model, setup.optimizer, setup.loss, setup.batches, setup.val_loss, wrt=self.wrt,
                hypers=self.tensors(setup) or None, schedules=self.schedules or None, ema=self.ema,
                per_step=self.per_step, val_steps=self.case.val_steps, **self.case.clip, **options,
            )  # fmt: skip

    def stock(self, name: str = "", index: tuple[int, ...] = (), delta: float = 0.0) -> float:
        """The validation loss of torch's loop with one number moved by delta (at one step, with per_step)."""
        setup = self.case.build()
        with self.case.arithmetic():
            return self._stock(setup, name, index, delta)

    def _stock(self, setup: Setup, name: str, index: tuple[int, ...], delta: float) -> float:
        given, loss = self.tensors(setup), setup.loss
        in_loss, when, val_steps = setup.hypers or {}, None, self.case.val_steps or (len(setup.batches),)
        if self.per_step and index:
            when, index = index[0], index[1:]
        base = [dict(group) for group in setup.optimizer.param_groups]
        now: dict[str, Tensor] = {}
        decay, values = [self.ema], []
        setup.hypers = None
        setup.loss = lambda model, batch: loss(model, batch, now) if in_loss else loss(model, batch)
        mean = AveragedModel(setup.model, multi_avg_fn=lambda a, p, n: get_ema_multi_avg_fn(decay[0])(a, p, n))
        mean.update_parameters(setup.model)  # the first one copies

        def moved(key: str, value: Any, t: int) -> Any:
            return shifted(value, index, delta) if key == name and when in (None, t) else value

        def move(t: int, groups: Any, clip: dict[str, float], hypers: Any) -> None:
            now.update({key: moved(key, x, t) for key, x in given.items()})
            scheduled = {key: f(t, now) for key, f in self.schedules.items()}
            decay[0] = moved("ema", float(scheduled.get("ema", self.ema or 0.0)), t)
            for key in clip:
                clip[key] = moved(key, float(scheduled.get(key, clip[key])), t)
            for g, group in enumerate(groups):
                for key in group.keys() & {*scheduled, *self.wrt}:
                    value = numbers(scheduled[key], g, key) if key in scheduled else base[g][key]
                    group[key] = moved(key, value, t) if not index or g == index[0] else value

        def validate(t: int) -> None:
            if t > 0 and self.ema is not None:
                mean.update_parameters(setup.model)
            if t in val_steps:
                params, weights = list(setup.model.parameters()), [p.detach().clone() for p in setup.model.parameters()]
                with torch.no_grad():
                    for p, a in zip(params, mean.module.parameters(), strict=True):
                        p.copy_(a if self.ema is not None else p)
                    values.extend([float(setup.val_loss())] * val_steps.count(t))
                    for p, w in zip(params, weights, strict=True):
                        p.copy_(w)

        train(setup, self.case.clip, move, validate)
        return sum(values) / len(values)

    def present(self, name: str, index: tuple[int, ...]) -> float:
        """The number that is moved, or its size."""
        setup = self.case.build()
        given = self.tensors(setup)
        if name in given:
            return float(given[name][index[1:] if self.per_step else index])
        if name == "ema" or name in self.case.clip:
            return self.ema if name == "ema" else self.case.clip[name]  # type: ignore[return-value]
        value = setup.optimizer.param_groups[index[1 if self.per_step else 0]][name]
        return value[index[-1]] if isinstance(value, tuple) else float(value)

    def finite_difference(self, name: str, index: tuple[int, ...]) -> float:
        width = min(self.width, WIDTH.get(name, 1.0))
        h = width * max(abs(self.present(name, index)), 0.02)
        return derivative(lambda d: self.stock(name, index, d), h, what=f"{name}{list(index)}")


def numbers(value: Any, group: int, name: str) -> Any:
    """One group's share of what a schedule returned, as numbers: written without the library's own."""
    flat = value.tolist() if isinstance(value, Tensor) else value
    if not isinstance(flat, (list, tuple)):
        return float(flat)
    pair = name == "betas"
    nested = isinstance(flat[0], (list, tuple)) or (isinstance(flat[0], Tensor) and flat[0].dim() > 0)
    own = flat[group] if not pair or nested else flat
    return tuple(float(x) for x in own) if pair else float(own)


def indices(array: Tensor) -> Iterator[tuple[int, ...]]:
    return product(*map(range, array.shape))


def assert_right(run: Run, result: Result) -> None:
    """The value and every number of a hypergradient, against the stock loop."""
    assert abs(float(result.value) - run.stock()) <= 1e-12 * abs(run.stock())
    assert result.gradients.keys() == set(run.wrt)
    for name, array in result.gradients.items():
        for index in indices(array):
            got, want = float(array[index]), run.finite_difference(name, index)
            assert abs(got - want) <= AGREE * abs(want) + ROUNDING, f"d/d {name}{list(index)}: {got}, should be {want}"
