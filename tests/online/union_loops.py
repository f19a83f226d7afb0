"""Loops that run on every rank of DistributedDataParallel, each on its share of the rows, or in one process on all of them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import hypergrad

ROWS, INPUTS = 8, 4  # of a batch of all ranks; of a row


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(INPUTS, 6), nn.Tanh(), nn.Linear(6, 1))


def linear() -> nn.Module:
    return nn.Linear(INPUTS, 1)


def norm() -> nn.Module:
    return nn.Sequential(nn.Linear(INPUTS, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 1))


class Unused(nn.Module):
    """A layer that only some rows use, so that a rank may have none of them."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.extra = nn.Linear(INPUTS, 6), nn.Linear(6, 1), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        uses = x[:, :1] > 0.7
        return self.last(hidden) + (self.extra(hidden) * uses if uses.any() else 0)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, weight_decay=0.01)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.003, weight_decay=0.1)


@dataclass(frozen=True)
class UnionLoop:
    """A user's loop.

    Args:
        inner: the tuner is given the module inside the wrapper.
        sharded: every rank validates on rows of its own.
        shares: rows of a batch that each rank has; their losses are weighted by them.
        accumulate: micro-batches of a step, all but the last in no_sync().
        resume: the step at which model, optimizer and tuner are made anew from their state.
    """

    net: Callable[[], nn.Module] = mlp
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = sgd
    steps: int = 200
    inner: bool = False
    sharded: bool = True
    shares: tuple[int, ...] = (4, 4)
    accumulate: int = 1
    clip_norm: float | None = None
    scheduler: Callable[[Any], Any] | None = None
    resume: int | None = None
    nan: tuple[range, int] | None = None  # steps, and the rank whose loss is NaN there
    scaler: bool = False
    autocast: bool = False
    own_draws: bool = False  # val_loss seeds its random numbers itself
    rising: bool = False  # the validation targets turn in mid-run, by and by
    frozen: bool = False  # nothing is tuned
    ddp: dict[str, Any] = field(default_factory=dict)
    tuner: dict[str, Any] = field(default_factory=dict)

    def rows(self, rank: int | None) -> slice:
        """The rows of a rank; None: of all."""
        if rank is None:
            return slice(0, sum(self.shares))
        return slice(sum(self.shares[:rank]), sum(self.shares[: rank + 1]))

    def weight(self, rank: int | None) -> float:
        """What makes the mean of the ranks' mean losses the mean over all rows."""
        return 1.0 if rank is None else self.shares[rank] * len(self.shares) / sum(self.shares)

    def run(self, alone: bool, tuned: bool = True) -> dict[str, Any]:
        """The whole loop. alone: one process on all rows; else this is a rank."""
        rank = None if alone else dist.get_rank()
        g = torch.Generator().manual_seed(1)
        target = torch.randn(INPUTS, 1, generator=g)

        def draw(rows: int, noise: float) -> tuple[Tensor, Tensor]:
            x = torch.randn(rows, INPUTS, generator=g)
            return x, torch.sin(x @ target) + noise * torch.randn(rows, 1, generator=g)

        data = [[draw(sum(self.shares), 0.3) for _ in range(self.accumulate)] for _ in range(self.steps)]
        val = draw(sum(self.shares) * 2, 0.3)
        torch.manual_seed(2)
        parts, val_loss = self._made(alone, val, tuned)
        torch.manual_seed(3 + (rank or 0))
        seen: list[float] = []
        for t in range(self.steps):
            if t == self.resume:
                parts = self._resumed(parts, alone, val)
            self._step(t, rank, data[t], *parts)
            seen.append(float(parts[1].param_groups[0]["lr"]))
        module, _, tuner, *_ = parts
        module = getattr(module, "module", module)
        found = {"weights": torch.cat([p.detach().flatten() for p in module.parameters()]), "lr": torch.tensor(seen)}
        found["buffers"] = torch.cat([b.double().flatten() for b in (torch.zeros(1), *module.buffers())])
        if tuner is None:
            return found | {"ends at": float(val_loss(self.steps).detach())}
        with tuner.best():
            found["best"] = torch.cat([p.detach().flatten() for p in module.parameters()])
        with tuner.averaged():
            found["averaged"] = torch.cat([p.detach().flatten() for p in module.parameters()])
        found |= {f"value {name}": x for name, x in tuner.values.items()}
        found |= {f"d/d {name}": x for name, x in tuner.hypergradients.items()}
        tangent = tuner.state_dict()["tangents"]["theta"]
        if tangent is not None:
            found["tangent"] = tangent
        return found | {"stats": tuner.stats, "val_loss": tuner.val_loss}

    def _made(self, alone: bool, val: tuple[Tensor, Tensor], tuned: bool) -> Any:
        """Model, optimizer, tuner, scheduler and scaler; and the validation loss."""
        module = self.net()
        model = module if alone else DistributedDataParallel(module, **self.ddp)
        optimizer = self.optimizer(module)
        scheduler = self.scheduler(optimizer) if self.scheduler else None
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0) if self.scaler else None
        rank = None if alone or not self.sharded else dist.get_rank()
        rows = self.rows(rank)
        x, y = (z[2 * rows.start : 2 * rows.stop] for z in val)
        weight, called = self.weight(rank), module if self.inner else model

        def val_loss(t: int) -> Tensor:
            turned = y if not self.rising else y * (1 - 2 * min(t / self.steps, 1))
            if self.own_draws:
                torch.manual_seed(11)
            with self._arithmetic():
                return ((called(x) - turned) ** 2).mean() * weight

        given = {"warm_start": False, "every": 5, "clip_norm": self.clip_norm, "scaler": scaler, **self.tuner}
        tuner = hypergrad.Tuner(called, optimizer, val_loss, **given) if tuned else None
        if tuner is not None and self.frozen:
            tuner.freeze()
        return (model, optimizer, tuner, scheduler, scaler), val_loss

    def _arithmetic(self) -> Any:
        return torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext()

    def _resumed(self, parts: Any, alone: bool, val: tuple[Tensor, Tensor]) -> Any:
        old = [copy.deepcopy(x.state_dict()) for x in parts if x is not None]
        parts[2].close()
        new, _ = self._made(alone, val, True)
        for x, state in zip([x for x in new if x is not None], old, strict=True):
            x.load_state_dict(state)
        return new

    def _step(
        self,
        t: int,
        rank: int | None,
        batches: Any,
        model: Any,
        optimizer: Any,
        tuner: Any,
        scheduler: Any,
        scaler: Any,
    ) -> None:
        optimizer.zero_grad()
        for i, (x, y) in enumerate(batches):
            last = i + 1 == len(batches)
            rows = self.rows(rank)
            with nullcontext() if last or rank is None else model.no_sync():
                with self._arithmetic():
                    loss = ((model(x[rows]) - y[rows]) ** 2).mean() * self.weight(rank) / len(batches)
                if self.nan is not None and t in self.nan[0] and rank in (None, self.nan[1]):
                    loss = loss * float("nan")
                loss = loss if scaler is None else scaler.scale(loss)
                loss.backward() if tuner is None else tuner.backward(loss)
        if self.clip_norm is not None:
            if scaler is not None:
                scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), self.clip_norm)
        optimizer.step() if scaler is None else scaler.step(optimizer)
        if scaler is not None:
            scaler.update()
        if scheduler is not None:
            scheduler.step()


def run(loop: UnionLoop, alone: bool = False, tuned: bool = True, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    torch.set_default_dtype(dtype)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return loop.run(alone, tuned)
    finally:
        torch.set_default_dtype(torch.float32)
