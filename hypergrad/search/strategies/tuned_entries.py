"""Which entries of a space a hypergradient of a run moves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hypergrad.core.restore import as_found
from hypergrad.differentiate.arguments import as_optimizers
from hypergrad.optimizers.rule import PARTS
from hypergrad.optimizers.transition import Transition
from hypergrad.search.entries import Float
from hypergrad.search.objective import WrongType
from hypergrad.search.space import Space, Values
from hypergrad.search.training import hypers_of, loss_of, schedules_of
from hypergrad.whole_run.run import Run

FOLLOWS = 1e-6  # relative: a param group's number that keeps its ratio to the entry's value
_PART_OF = {part: (name, i) for name, names in PARTS.items() for i, part in enumerate(names)}  # beta1 -> (betas, 0)


@dataclass(frozen=True)
class TunedEntry:
    """An entry of the space that hypergradients move, as a hyperparameter of the run.

    Attributes:
        name: of the hyperparameter in the run.
        part: its index in a tuple, as of beta1 in betas; None: it is the whole value.
        ratios: the value in each param group over that of the entry; None: the loss or a schedule reads it.
    """

    name: str
    part: int | None = None
    ratios: tuple[float, ...] | None = None


class NotDifferentiated(UserWarning):
    """An entry of the space that hypergradients could move has no derivative in the run: it stays where a trial begins."""


def check_aliases(aliases: Any, space: Space) -> dict[str, str]:
    """Aliases, entry → hyperparameter of the run.

    Raises:
        TypeError: no dict of strings.
        ValueError: an entry that the space has not, or two of one hyperparameter.
    """
    if not isinstance(aliases, Mapping) or not all(isinstance(x, str) for pair in aliases.items() for x in pair):
        raise TypeError(
            f"aliases must be a dict of entry → hyperparameter, such as {{'wd': 'weight_decay'}}, got {aliases!r}."
        )
    for name in aliases:
        if name not in space:
            raise ValueError(f"aliases: the space has no entry {name!r}; it has {', '.join(space)}.")
    targets = [aliases.get(name, name) for name in space]
    if twice := next((x for x in targets if targets.count(x) > 1), None):
        raise ValueError(f"aliases: more than one entry of the space is {twice!r}.")
    return dict(aliases)


def not_moved(space: Space, values: Values, run: Run, tuned: Mapping[str, Any]) -> tuple[list[str], str]:
    """The entries that could be moved and are not, and a sentence about them, the same in every trial."""
    names = [name for name in space.active(values) if may_move(space[name]) and name not in tuned]
    there = ", ".join(repr(part) for name in sorted(columns_of(run)) for part in PARTS.get(name, (name,)))
    together = " beta1 and beta2 move together, or stay." if any(name in _PART_OF for name in names) else ""
    return names, (
        f"no hypergradient moves {', '.join(map(repr, names))}: each trial keeps the value that it begins with. The run's param "
        f"groups have {there}; its loss and schedules read no such entry.{together} What has another name there can be said, as "
        "in aliases={'wd': 'weight_decay'}; what is meant to stay has differentiable=False."
    )


def may_move(entry: Any) -> bool:
    return isinstance(entry, Float) and entry.step is None and entry.differentiable is not False


def columns_of(run: Run) -> dict[str, list[Any]]:
    """name → its value in each param group, of what an optimizer's rule can be differentiated in."""
    return dict(Transition(as_optimizers(run.optimizer), frozenset()).values())


def tuned_entries(
    run: Run, space: Space, values: Values, aliases: Mapping[str, str] | None = None
) -> dict[str, TunedEntry]:
    """The entries that a hypergradient of this run moves: names of its param groups, beta1 and beta2, and what its loss or its
    schedules read.

    Args:
        aliases: entry → name in the param groups.

    Raises:
        ValueError: an entry with differentiable=True that is none of these.
        WrongType: an alias for what the param groups have not.
    """
    group_of = {
        name: _PART_OF.get(target, (target, None)) for name in space for target in [(aliases or {}).get(name, name)]
    }
    columns, found = {n: c for n, c in columns_of(run).items() if n not in (run.schedules or ())}, {}
    candidates = [name for name in space.active(values) if may_move(space[name])]
    for name in candidates:
        if name in (aliases or {}) and group_of[name][0] not in columns:
            raise WrongType(
                f"aliases: {name!r} cannot be {(aliases or {})[name]!r}, as the run's param groups have {sorted(columns)}."
            )
    read = _read_by_the_run(run, values, [name for name in candidates if group_of[name][0] not in columns])
    for name in candidates:
        group_name, part = group_of[name]
        if group_name in columns:
            numbers = [x if part is None or x is None else x[part] for x in columns[group_name]]
            found[name] = TunedEntry(
                group_name, part, tuple(0.0 if x is None else _ratio(x, values[name]) for x in numbers)
            )
        elif name in read:
            found[name] = TunedEntry(name)
        elif space[name].differentiable:  # type: ignore[union-attr]
            raise ValueError(
                f"{name!r} is differentiable=True, but the run's param groups have {sorted(columns)} and its loss does not "
                "read it."
            )
    return found


def _ratio(x: float, value: float) -> float:
    return x / value if value else float(x == 0)


def _read_by_the_run(run: Run, values: Values, names: list[str]) -> set[str]:
    """Those that the training loss depends on, through its third argument, or a schedule at its first, middle or last step."""
    hypers = hypers_of(run, values)
    if not hypers or not names:
        return set()
    items = list(run.batches)
    leaves = {name: x.clone().requires_grad_(name in names) for name, x in hypers.items()}
    schedules, _ = schedules_of(run, leaves)
    with as_found(run.model, as_optimizers(run.optimizer)):
        outputs = [loss_of(run, items[0], leaves)]
        outputs += [schedules.at(n, t).sum() for n in run.schedules or () for t in (0, len(items) // 2, len(items) - 1)]
        total = torch.stack([x.double() for x in outputs]).sum()
        grads = torch.autograd.grad(total, [leaves[name] for name in names], allow_unused=True)
    return {name for name, g in zip(names, grads) if g is not None}


def unchanged(now: dict[str, TunedEntry], before: dict[str, TunedEntry]) -> dict[str, TunedEntry]:
    """The same entries, with the ratios they had: else their derivative was of something else."""
    for name, old in before.items():
        new = now.get(name)
        kept = new is not None and (old.ratios is None) == (new.ratios is None)
        close = (
            kept
            and new is not None
            and all(abs(a - b) <= FOLLOWS * max(abs(a), 1.0) for a, b in zip(new.ratios or (), old.ratios or ()))
        )
        if not close:
            raise ValueError(
                f"{name!r} does not move in proportion with the param groups' {old.name}: let the objective put its value there, "
                "or a multiple of it, or set differentiable=False."
            )
    return {name: now[name] for name in before}
