"""`check`: are the hypergradients of a user's own loop right? Finite differences of the stock optimizer in float64.

The user's float32 code runs unchanged: parameters, buffers, optimizer state and batches are float64 for the time of the
call, and a TorchFunctionMode promotes every other float tensor the moment an operation takes it in.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from hypergrad.exact import Optimizers, as_optimizers, hypergradient, leaves
from hypergrad.precision import Promote, all_params, in_float64, to_double
from hypergrad.problem import Rng, takes_step
from hypergrad.updates.rule import parts

RTOL = 1e-5  # agreement asked for; Richardson differences of a smooth loss reach 1e-8
STEP = 1e-4  # of the differences, relative to the value (absolute below 1e-3)


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
) -> Report:
    """Compare hypergradients of a loop with central finite differences of the stock optimizer, in float64.

    Runs the loop 4 times for every number. Model, optimizer, gradients, buffers and random numbers are left as found.

    Args:
        model, optimizer, loss, batches, val_loss, wrt, mode, hypers, val_steps, clip_norm, clip_value: as in
            `hypergrad.hypergradient`. A few batches are enough.
        limit: at most so many elements of each tensor in `hypers`, evenly spaced.

    Returns:
        Report: true if all agree to 1e-5; `print(report)` shows the table. A row that is off with `smooth` False tells of a
        loss with kinks or of a chaotic run at that place rather than of a wrong hypergradient.

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
    optimizers, rng = as_optimizers(optimizer), None
    params = [p for opt in optimizers for group in opt.param_groups for p in group["params"]]
    if params:
        rng = Rng(params[0].device)
    items = list(batches)
    if rng is not None:
        rng.restore()
    names = (wrt,) if isinstance(wrt, str) else tuple(wrt)
    with in_float64(model, optimizers), Promote():
        items = tree_map(to_double, items)
        tensors = {name: to_double(x.detach()) for name, x in leaves(hypers).items()}
        run = _StockRun(model, optimizers, loss, items, val_loss, tensors, val_steps, clip_norm, clip_value)
        _check_deterministic(run)
        arguments: dict[str, Any] = {"hypers": tensors or None, "val_steps": val_steps}
        arguments |= {"clip_norm": clip_norm, "clip_value": clip_value}
        result = hypergradient(model, optimizer, loss, items, val_loss, names, mode, **arguments)
        rows, value = [], float(result.value)
        for name, gradient in result.gradients.items():
            for index in _indices(gradient, limit if name in tensors else None):
                rows.append(_compare(run, name, index, float(gradient[index]), value))
    return Report(rows, _explain(rows) + result.stats["warnings"])


def _indices(gradient: Tensor, limit: int | None) -> Iterator[tuple[int, ...]]:
    n = gradient.numel()
    chosen = (
        range(n) if limit is None or n <= limit else sorted({i * (n - 1) // max(limit - 1, 1) for i in range(limit)})
    )
    for flat in chosen:
        yield tuple(int(i) for i in np.unravel_index(flat, gradient.shape))


# Richardson: (4 D(h/2) − D(h))/3 has an error of order h⁴. Where D(h) and D(h/2) differ by much, L is not smooth.
def _compare(run: _StockRun, name: str, index: tuple[int, ...], ours: float, value: float) -> Row:
    x = run.read(name, index)
    h = STEP * max(abs(x), 1e-3)

    def central(d: float) -> float:
        return (run(name, index, x + d) - run(name, index, x - d)) / (2 * d)

    one_sided = x - h < 0 and run.needs_nonnegative(name)
    if one_sided:
        base = run(name, index, x)
        d1, d2 = ((-3 * base + 4 * run(name, index, x + d) - run(name, index, x + 2 * d)) / (2 * d) for d in (h, h / 2))
    else:
        d1, d2 = central(h), central(h / 2)
    difference = (4 * d2 - d1) / 3
    noise = 1e-14 * abs(value) / h
    scale = max(abs(difference), abs(ours), 1e-300)
    error = abs(difference - ours)
    smooth = abs(d1 - d2) <= 0.05 * scale + 10 * noise
    return Row(name, index, ours, difference, error / scale, smooth, error <= RTOL * scale + noise)


def _explain(rows: list[Row]) -> list[str]:
    notes = []
    if any(not row.ok and row.smooth for row in rows):
        notes.append(
            "OFF: a part of the graph was lost (.detach(), .item(), numpy, or an autograd Function whose backward is not "
            "differentiable), or the loss is not the one that is trained."
        )
    if any(not row.smooth for row in rows):
        notes.append(
            "not smooth: the differences do not converge (a kink of ReLU or max-pooling, or a chaotic run). Try fewer steps, a "
            "smaller lr, a larger eps, or a smooth activation for this check."
        )
    return notes


class _StockRun:
    """The user's loop with torch's own optimizer, from the present state, with one number changed; its validation loss."""

    def __init__(self, model, optimizers, loss, items, val_loss, tensors, val_steps, clip_norm, clip_value):  # type: ignore[no-untyped-def]
        self.model, self.optimizers, self.loss, self.items, self.val_loss = model, optimizers, loss, items, val_loss
        self.tensors, self.clip = tensors, {"clip_norm": clip_norm, "clip_value": clip_value}
        self.val_steps = (len(items),) if val_steps is None else tuple(val_steps)

    def _group(self, index: tuple[int, ...]) -> tuple[int, int]:
        starts = [(i, g) for i, opt in enumerate(self.optimizers) for g in range(len(opt.param_groups))]
        return starts[index[0]]

    def read(self, name: str, index: tuple[int, ...]) -> float:
        if name in self.tensors:
            return float(self.tensors[name][index])
        if name in self.clip:
            return float(self.clip[name])
        i, g = self._group(index)
        value = self.optimizers[i].param_groups[g].get(name, 0.0)
        return float(value[index[1]] if len(parts(name)) > 1 else value)

    def needs_nonnegative(self, name: str) -> bool:
        """torch.optim.RMSprop takes no step of momentum below 0, Adagrad no root of it."""
        rms = any(isinstance(opt, torch.optim.RMSprop) for opt in self.optimizers)
        return (name == "momentum" and rms) or name == "initial_accumulator_value"

    def __call__(self, name: str, index: tuple[int, ...], x: float) -> float:
        tensors, clip = {k: v.clone() for k, v in self.tensors.items()}, dict(self.clip)
        twins = [twin(opt) for opt in self.optimizers]
        if name in tensors:
            tensors[name][index] = x
        elif name in clip:
            clip[name] = x
        else:
            i, g = self._group(index)
            group = twins[i].param_groups[g]
            if name == "initial_accumulator_value":  # torch.optim.Adagrad reads it in its constructor
                for state in (twins[i].state[p] for p in group["params"]):
                    state["sum"] += (x - group[name]) * (state["step"] == 0)
            elif len(parts(name)) > 1:
                group[name] = tuple(x if j == index[1] else v for j, v in enumerate(group[name]))
            elif name in group:
                group[name] = x
        with as_found(self.model, self.optimizers):
            return self._train(twins, tensors, clip)

    def _train(self, twins: list[torch.optim.Optimizer], tensors: dict[str, Tensor], clip: dict[str, Any]) -> float:
        params = [p for opt in twins for group in opt.param_groups for p in group["params"]]
        total = 0.0
        for t in range(len(self.items) + 1):
            total += self.val_steps.count(t) * self._validate(t)
            if t == len(self.items):
                break
            for p in params:
                p.grad = None
            extra = (tensors,) if tensors else ()
            self.loss(self.model, self.items[t], *extra).backward()
            if clip["clip_norm"] is not None:
                torch.nn.utils.clip_grad_norm_(params, clip["clip_norm"])
            if clip["clip_value"] is not None:
                torch.nn.utils.clip_grad_value_(params, clip["clip_value"])
            for opt in twins:
                opt.step()
        return total / len(self.val_steps)

    def _validate(self, t: int) -> float:
        if t not in self.val_steps:
            return 0.0
        buffers, rng = [b.clone() for b in self.model.buffers()], Rng(next(iter(self.model.parameters())).device)
        with torch.no_grad():
            value = float(self.val_loss(t) if takes_step(self.val_loss) else self.val_loss())
            for b, saved in zip(self.model.buffers(), buffers, strict=True):
                b.copy_(saved)
        rng.restore()
        return value


def _check_deterministic(run: _StockRun) -> None:
    with as_found(run.model, run.optimizers):
        first, second = run._validate(run.val_steps[-1]), run._validate(run.val_steps[-1])
        # random numbers were put back between the two, so what differs is drawn from elsewhere
        if first != second and not (first != first and second != second):
            raise ValueError(
                f"val_loss is not deterministic ({first:.17g}, then {second:.17g}): let it use one fixed batch, and no data "
                "iterator that moves on."
            )


def twin(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The same stock optimizer on the same parameters, with groups and state of its own and without anybody's hooks."""
    other = object.__new__(type(optimizer))  # copy.copy would write to its defaults
    other.__dict__ = {
        k: v for k, v in optimizer.__dict__.items() if k != "step"
    }  # schedulers wrap step on the instance
    for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        other.__dict__[hooks] = OrderedDict()
    other.param_groups = [dict(group) for group in optimizer.param_groups]
    other.state = defaultdict(dict, {p: tree_map(_copied, state) for p, state in optimizer.state.items()})
    return other


def _copied(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) else x


@contextmanager
def as_found(model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[None]:
    """Put values of parameters, gradients, buffers and random numbers back on the way out."""
    params = all_params(model, optimizers)
    values, grads = [p.detach().clone() for p in params], [p.grad for p in params]
    buffers, rng = [b.clone() for b in model.buffers()], Rng(params[0].device)
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value, grad in zip(params, values, grads, strict=True):
                p.copy_(value)
                p.grad = grad
            for b, saved in zip(model.buffers(), buffers, strict=True):
                b.copy_(saved)
        rng.restore()
