"""`check`: are the hypergradients of a user's own loop right? Finite differences of the stock optimizer in float64.

The user's float32 code runs unchanged: parameters, buffers, optimizer state and batches are float64 for the time of the
call, and a TorchFunctionMode promotes every other float tensor the moment an operation takes it in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from hypergrad.checks.precision import Promote, in_float64, to_double
from hypergrad.checks.stock_run import Moved, StockRun
from hypergrad.core.data_parallel import processes_of
from hypergrad.core.finite_differences import central, extrapolated, one_sided
from hypergrad.core.float64 import has_float64
from hypergrad.core.loss_tensors import LossTensors
from hypergrad.core.restore import Rng, as_found
from hypergrad.differentiate.arguments import Optimizers, as_optimizers, granularity
from hypergrad.differentiate.hypergradient import hypergradient
from hypergrad.differentiate.schedule_gradients import Function

RTOL = 1e-5  # agreement asked for; Richardson differences of a smooth loss reach 1e-8
STEP = 1e-4  # of the differences, relative to the value (absolute below 1e-3)
# shares of it that are tried where the first disagrees: fewer kinks of ReLU or max-pooling lie within them
SMALLER = (1e-2, 1e-4)


@dataclass(frozen=True)
class Row:
    """One number that was checked."""

    name: str
    index: tuple[int, ...]
    hypergradient: float
    finite_difference: float
    relative_error: float
    smooth: bool  # whether the difference converges: False at a kink, or where the run is chaotic
    ok: bool


@dataclass(frozen=True)
class Report:
    """What `check` found. True where every hypergradient agrees with its finite difference.

    Attributes:
        ok: whether all rows agree.
        rows: one for each number.
        notes: sentences on what is off and what to do.
    """

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        lines = [f"{'hyperparameter':<22}{'hypergradient':>16}{'difference':>16}{'rel. error':>12}"]
        for r in self.rows:
            label = r.name + "".join(f"[{i}]" for i in r.index)
            verdict = "" if r.ok and r.smooth else "  not smooth" if not r.smooth else "  OFF"
            lines.append(
                f"{label:<22}{r.hypergradient:>16.8g}{r.finite_difference:>16.8g}{r.relative_error:>12.1e}{verdict}"
            )
        return "\n".join([*lines, *self.notes])


def check(
    model: torch.nn.Module,
    optimizer: Optimizers,
    loss: Callable[..., Tensor],
    batches: Iterable[Any],
    val_loss: Callable[..., Tensor],
    wrt: str | Sequence[str] = ("lr", "weight_decay"),
    mode: str = "unrolled",
    hypers: Mapping[str, Any] | None = None,
    val_steps: Sequence[int] | None = None,
    clip_norm: float | None = None,
    clip_value: float | None = None,
    limit: int = 10,
    schedules: Mapping[str, Function] | None = None,
    per: str | Mapping[str, str] = "group",
    ema: float | None = None,
) -> Report:
    """Compare hypergradients of a loop with central finite differences of the stock optimizer, in float64.

    Runs the loop 4 times for every number, and 8 times more where that does not agree, as a loss with kinks (ReLU, max-pooling)
    needs smaller steps. A tensor or net of your own in `hypers` is moved where it is, so that whatever reads it sees the move.
    Model, optimizer, `hypers`, gradients, buffers and random numbers are left as found.

    Args:
        model, optimizer, loss, batches, val_loss, wrt, mode, hypers, val_steps, clip_norm, clip_value, schedules, per, ema: as in
            `hypergrad.hypergradient`. A few batches are enough.
        limit: at most so many elements of each tensor in `hypers`, and of each name that `per` has for every parameter or
            element, evenly spaced.

    Returns:
        Report: true if all agree to 1e-5; `print(report)` shows the table. A row that is off with `smooth` False means a loss
        with kinks or a chaotic run at that place rather than a wrong hypergradient.

    Raises:
        ValueError: val_loss or the training loss is not deterministic.
        NotImplementedError: something in the user's code computes in lower precision; the message names it.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> x, y = torch.ones(4, 2), torch.zeros(4, 1)
        >>> mse = lambda model, batch: ((model(batch) - y) ** 2).mean()
        >>> bool(check(model, sgd, mse, [x] * 3, lambda: mse(model, x), wrt=("lr", "weight_decay", "momentum")))
        True
    """
    if limit < 1:
        raise ValueError(f"limit must be a whole number from 1, got {limit}.")
    if not processes_of(model, as_optimizers(optimizer)).alone:
        raise NotImplementedError(
            "check runs in one process: give it the model without DistributedDataParallel, in a process of its own."
        )
    optimizers, rng = as_optimizers(optimizer), None
    params = [p for opt in optimizers for group in opt.param_groups for p in group["params"]]
    if params and not has_float64(params[0].device):
        raise NotImplementedError(
            f"check computes in float64, which device {params[0].device.type!r} does not have: call it with model and batches "
            "on the CPU."
        )
    if params:
        rng = Rng(params[0].device)
    items = list(batches)
    if rng is not None:
        rng.restore()
    given = LossTensors(hypers, torch.float64)
    given.check_movable()
    tensors, names = given.leaves, given.expanded((wrt,) if isinstance(wrt, str) else wrt)
    if not names:
        raise ValueError("wrt names nothing to check: pass for example ('lr', 'weight_decay').")
    with in_float64(model, optimizers, given), Promote():
        items = tree_map(to_double, items)
        how = {k: x for k, x in granularity(per, [n for n in names if n not in tensors]).items() if x != "group"}
        single = {"clip_norm": clip_norm, "clip_value": clip_value, "ema": ema}
        run = StockRun(model, optimizers, loss, items, val_loss, given, val_steps, single, dict(schedules or {}), how)
        _check_deterministic(run)
        arguments: dict[str, Any] = {"hypers": given.given or None, "val_steps": val_steps, **single}
        arguments |= {"schedules": schedules, "per": per}
        result = hypergradient(model, optimizer, loss, items, val_loss, names, mode, **arguments)
        rows, value = [], float(result.value)
        for name, gradient in result.gradients.items():
            for index in _indices(gradient, limit if name in tensors or name in how else None):
                rows.append(_compare(run, run.moved(name, index), float(gradient[index]), value))
    return Report(rows, _explain(rows) + result.stats["warnings"])


def _indices(gradient: Tensor, limit: int | None) -> Iterator[tuple[int, ...]]:
    n = gradient.numel()
    chosen = (
        range(n) if limit is None or n <= limit else sorted({i * (n - 1) // max(limit - 1, 1) for i in range(limit)})
    )
    for flat in chosen:
        yield tuple(int(i) for i in np.unravel_index(flat, gradient.shape))


@dataclass(frozen=True)
class _Difference:
    """f'(0) by steps h and h/2, how far those are apart, and what rounding may add."""

    value: float
    spread: float
    noise: float


def _compare(run: StockRun, at: Moved, ours: float, value: float) -> Row:
    h = STEP * max(abs(run.read(at)), 1e-3)
    found = _difference(run, at, h, value)
    if not _agrees(ours, found):
        smaller = [_difference(run, at, h * share, value) for share in SMALLER]
        told = [d for d in smaller if d.noise <= RTOL * _scale(ours, d)]
        agreeing = [d for d in told if _agrees(ours, d)]
        found = agreeing[0] if agreeing else min([found, *told], key=lambda d: d.spread + d.noise)
    scale = _scale(ours, found)
    # Where D(h) and D(h/2) differ by much, L is not smooth.
    smooth = found.spread <= 0.05 * scale + 10 * found.noise
    return Row(at.name, at.index, ours, found.value, abs(found.value - ours) / scale, smooth, _agrees(ours, found))


def _difference(run: StockRun, at: Moved, h: float, value: float) -> _Difference:
    loss = cache(lambda delta: run(at, delta))
    if run.read(at) - h < 0 and run.needs_nonnegative(at.name):
        d1, d2 = one_sided(loss, 2 * h), one_sided(loss, h)
    else:
        d1, d2 = central(loss, h), central(loss, h / 2)
    return _Difference(extrapolated(d1, d2), abs(d1 - d2), 1e-14 * abs(value) / h)


def _scale(ours: float, found: _Difference) -> float:
    return max(abs(found.value), abs(ours), 1e-300)


def _agrees(ours: float, found: _Difference) -> bool:
    return abs(found.value - ours) <= RTOL * _scale(ours, found) + found.noise


def _explain(rows: list[Row]) -> list[str]:
    notes = []
    if any(not row.ok and row.smooth for row in rows):
        notes.append(
            "OFF: a part of the graph was lost (.detach(), .item(), numpy, or an autograd Function whose backward is not "
            "differentiable), or the loss is not the one that is trained. With many kinks (ReLU, max-pooling) it may be the "
            "difference that is off: try other batches, or a smooth activation for this check."
        )
    if any(not row.smooth for row in rows):
        notes.append(
            "not smooth: the differences do not converge (a kink of ReLU or max-pooling, or a chaotic run). Try fewer steps, a "
            "smaller lr, a larger eps, or a smooth activation for this check."
        )
    return notes


def _check_deterministic(run: StockRun) -> None:
    with as_found(run.model, run.optimizers):
        first, second = (run.validate(run.val_steps[-1]) for _ in range(2))
        # random numbers were put back between the two: the difference comes from elsewhere
        if first != second and not (first != first and second != second):
            raise ValueError(
                f"val_loss is not deterministic ({first:.17g}, then {second:.17g}): let it use one fixed batch, and no data "
                "iterator that moves on."
            )
