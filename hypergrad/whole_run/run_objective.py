"""The objective of `tune_run`: the mean over seeds of the validation loss of a run, and its hypergradient in φ."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hypergrad.core.data_parallel import processes_of
from hypergrad.core.float64 import on_host
from hypergrad.core.hyperparameters import as_hyperparameter
from hypergrad.core.loss_tensors import LossTensors, set_free
from hypergrad.core.signatures import is_required, positional, takes_hypers
from hypergrad.differentiate.arguments import Optimizers, as_optimizers
from hypergrad.differentiate.hypergradient import hypergradient
from hypergrad.online.hyper_vector import HyperVector
from hypergrad.optimizers.group_values import plain, replaced
from hypergrad.optimizers.transition import CLIPS, Transition
from hypergrad.whole_run.run import COST_OF_PRODUCT, Run


class Evaluation(NamedTuple):
    """The objective at one φ: mean value, value of each seed, dL/dφ [k], and the cost in gradients and Hessian products."""

    value: float
    seed_values: list[float]
    gradient: Tensor
    gradients: int
    products: int


class WholeRunObjective:
    """The mean validation loss of the runs of all seeds, as a function of φ.

    Args:
        build: `build(seed)` or `build(seed, horizon)` → Run.
        hypers: name → what the user wrote for it.
        seeds: of the runs that are averaged over.
        options: further arguments of `hypergradient`.
    """

    def __init__(
        self, build: Callable[..., Run], hypers: Mapping[str, Any], seeds: Sequence[int], options: Mapping[str, Any]
    ):
        self.build, self.seeds, self.options = build, tuple(seeds), dict(options)
        self.takes_horizon = _takes_horizon(build)
        with seeded(self.seeds[0]):
            whole = self._built(self.seeds[0], 1.0)
            batches = whole.batches if isinstance(whole.batches, Sized) else list(whole.batches)
        self.steps = len(batches)
        if not self.steps:
            raise ValueError("build(seed) gave a run without batches: give one batch a step.")
        optimizers = as_optimizers(whole.optimizer)
        self.processes = processes_of(whole.model, optimizers)
        transition = Transition(optimizers, frozenset(hypers))
        self.n, self.names = len(transition.params), set(hypers)
        in_groups = {name: as_hyperparameter(name, x) for name, x in hypers.items() if name in transition.values()}
        self.in_loss = LossTensors({name: x for name, x in hypers.items() if name not in in_groups})
        self.in_loss.check_movable()
        self.given = {name: x for name, x in self.in_loss.given.items() if name not in CLIPS}
        if "lr" in in_groups and any("initial_lr" in group for group in transition.groups):
            raise ValueError(
                "a scheduler is attached to the optimizer, and its steps are no part of a run here: leave it out of build()."
            )
        self._check_known(whole, list(transition.values()))
        thresholds = {name: as_hyperparameter(name, x) for name, x in hypers.items() if name in CLIPS}
        self.hyper_vector = HyperVector(transition, in_groups, self.in_loss.specs | thresholds, self.in_loss.leaves)
        self.start = self.hyper_vector.phi, self.hyper_vector.value

    def _check_known(self, run: Run, groups: list[str]) -> None:
        for name in run.schedules or ():
            if name in groups and name in self.names:
                raise ValueError(f"{name!r} has a schedule: tune what the schedule reads, under another name.")
        for name in self.given.keys() - self.in_loss.own:
            if not takes_hypers(run.loss) and not run.schedules:
                raise ValueError(
                    f"{name!r} is no number of the param groups, which have {groups}, and loss(model, batch) takes no third "
                    "argument `hypers` to read it from, nor is there a schedule that does."
                )

    def _built(self, seed: int, horizon: float) -> Run:
        run = self.build(seed, horizon) if self.takes_horizon else self.build(seed)
        if not isinstance(run, tuple) and all(hasattr(run, name) for name in Run._fields[:5]):
            run = Run(*(getattr(run, name, None) for name in Run._fields))  # type: ignore[arg-type]
        if not isinstance(run, Run):
            raise TypeError(
                f"build must return hypergrad.Run(model, optimizer, batches, loss, val_loss), got {type(run).__name__}."
            )
        return run

    def _shortened(self, seed: int, horizon: float) -> Run:
        """The run of that seed, or its first share."""
        run = self._built(seed, horizon)
        if self.takes_horizon or horizon == 1:
            return run
        steps = max(1, round(horizon * self.steps))
        when = run.val_steps and ([t for t in run.val_steps if t <= steps] or [steps])
        return run._replace(batches=list(islice(run.batches, steps)), val_steps=when)

    # L(φ) = 1/S Σ_s L_s(x(φ)),   dL/dφ = dL/dx · dx/dφ
    def evaluate(self, phi: Tensor, horizon: float, below: float | None = None) -> Evaluation:
        """Value and hypergradient at φ [k]. `below`: where the value is above it, no hypergradient is needed."""
        self._set(phi)
        seed_values, total, gradients, products = [], torch.zeros_like(phi), 0, 0
        for seed in self.seeds:
            with seeded(seed):
                run = self._shortened(seed, horizon)
                last = len(seed_values) == len(self.seeds) - 1  # the bound on its value follows from the others' values
                rest = None if below is None or not last else below * len(self.seeds) - sum(seed_values)
                with self._values_written(run.optimizer):
                    result = self._hypergradient(run, rest)
            seed_values.append(float(result.value))
            total += self._flat(result.gradients)
            gradients += result.stats["gradient_evaluations"]
            products += result.stats["hessian_products"]
        mean = sum(seed_values) / len(seed_values)
        return Evaluation(mean, seed_values, total / len(seed_values) * self.hyper_vector.slope(), gradients, products)

    def _hypergradient(self, run: Run, below: float | None) -> Any:
        c = self.hyper_vector
        options: dict[str, Any] = self.options | {
            name: float(x.detach()) for name, x in c.hypers.items() if name in CLIPS
        }
        if below is not None and self.options["mode"] == "unrolled":
            options["below"] = below
        return hypergradient(
            run.model,
            run.optimizer,
            run.loss,
            run.batches,
            run.val_loss,
            wrt=c.directions.wrt,
            hypers=self.given or None,
            val_steps=run.val_steps,
            schedules=run.schedules,
            **options,
        )

    def _flat(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """The gradient arrays as a vector [k]."""
        arrays = {name: on_host(g.detach()).numpy() for name, g in gradients.items()}
        return torch.tensor([arrays[e.name][e.index] for e in self.hyper_vector.entries], dtype=torch.float64)

    def cost(self, gradients: int, products: int) -> float:
        """In plain whole runs."""
        return (gradients + COST_OF_PRODUCT * products) / self.steps

    # ---- values

    @contextmanager
    def own_tensors_put_back(self) -> Iterator[None]:
        """Within this context tensors of the user's own hold the values of φ; afterwards, what they held before."""
        before = {name: x.detach().clone() for name, x in self.in_loss.leaves.items()}
        put_back = self.in_loss.require_gradients()
        try:
            yield
        finally:
            set_free(put_back)
            for name, x in self.in_loss.leaves.items():
                x.data.copy_(before[name])

    def _set(self, phi: Tensor) -> None:
        """Set φ from the start: the values are a function of φ alone, not of the φ before it."""
        self.hyper_vector.reset()
        self.hyper_vector.apply(phi)
        self.hyper_vector.write_hypers()

    def clip(self, phi: Tensor) -> Tensor:
        """φ between its bounds."""
        return phi.clamp(self.hyper_vector.low, self.hyper_vector.high)

    def values(self, phi: Tensor) -> dict[str, Tensor]:
        """The values at φ by name, in the shapes of the gradients."""
        self._set(phi)
        c = self.hyper_vector
        out = {
            name: torch.zeros(shape, dtype=torch.float64) if name not in c.hypers else c.hypers[name].detach().clone()
            for name, shape in c.directions.shapes.items()
        }
        for entry, x in zip(c.entries, c.value.tolist(), strict=True):
            out[entry.name][entry.index] = x
        return out

    @contextmanager
    def _values_written(self, optimizer: Optimizers) -> Iterator[None]:
        """Within this context the param groups hold the values of φ; afterwards, what they held before."""
        groups = [group for opt in as_optimizers(optimizer) for group in opt.param_groups]
        if len(groups) != len(self.hyper_vector.transition.groups):
            raise ValueError(
                "build() gave optimizers of another number of param groups than before: let it make the same groups for every "
                "seed and horizon."
            )
        before = [dict(group) for group in groups]
        try:
            for entry, x in zip(self.hyper_vector.entries, self.hyper_vector.value.tolist(), strict=True):
                if entry.group is not None:
                    group = groups[entry.group]
                    group[entry.name] = replaced(plain(group[entry.name]), entry.name, entry.part, x)
            yield
        finally:
            for group, old in zip(groups, before, strict=True):
                group.update(old)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within this context torch's generators are seeded; afterwards they are as before."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _takes_horizon(build: Callable[..., Any]) -> bool:
    takes = positional(build)
    second = None if takes is None else next(iter(takes.parameters[1:]), None)
    return second is not None and (is_required(second) or second.name == "horizon")
