"""A user's loop as a row: how it is built, what is expected of it under a tuner, and what came of it.

The oracle is the same loop with torch alone, in float64: its central differences, and its weights bit for bit.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.online.live_loops import FD_RTOL, Backward, as_given, slope

SUPPORTED, AS_PLAIN, SAID, REFUSED, UNSEEN = "supported", "trains as plain", "warning", "refused", "not seen"
N = 6  # training steps


@dataclass
class Live:
    """A loop that is ready to run.

    Args:
        model: what the tuner is given.
        optimizers: one, or several.
        train: the whole loop, with what it calls in place of `loss.backward()`.
        val_loss: of the model.
        scaler: the loop's GradScaler.
        also: tensors beside those of model and optimizers that must come out bit for bit.
    """

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    train: Callable[[Backward], None]
    val_loss: Callable[[], Tensor]
    scaler: Any = None
    also: Callable[[], list[Tensor]] = list


@dataclass(frozen=True)
class Row:
    """A loop and what is expected of it.

    Args:
        build: the loop, from scratch.
        status: supported: hypergradients are the finite differences, and a frozen tuner changes no bit;
            trains as plain: the latter alone, where precision is too low for differences;
            warning: the latter, and a warning says what hypergradients do not know;
            refused: an error, before any weight changes;
            not seen: it trains as plain, but hypergradients are off and nothing tells: part of what the next step depends on
            is in no graph.
        how: what a user has to do, for the page.
        says: of the warning or the error, as a regular expression. A loop that is supported may be warned of too.
        wrt: what is tuned.
        options: more arguments of the tuner.
        scheduled: a scheduler writes lr: what is tuned is the scale of what it writes, over the group's initial lr.
        rtol: of the hypergradients.
        slow: takes more than about a second.
    """

    build: Callable[[], Live]
    status: str = SUPPORTED
    how: str = ""
    says: str = ""
    wrt: tuple[str, ...] = ("lr", "weight_decay")
    options: Mapping[str, Any] = field(default_factory=dict)
    scheduled: bool = False
    rtol: float = FD_RTOL
    slow: bool = False


def seed(number: int) -> None:
    """All global generators."""
    torch.manual_seed(number)
    np.random.seed(number)  # noqa: NPY002
    random.seed(number)


def seeded(val_loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """With the same random numbers at every call."""

    def validate() -> Tensor:
        seed(11)
        return val_loss()

    return validate


def run(live: Live, backward: Backward) -> None:
    seed(7)
    live.train(backward)


def steps_of(row: Row) -> int:
    """How many steps the optimizer that steps last takes."""
    live, calls = row.build(), list[int]()
    live.optimizers[-1].register_step_post_hook(lambda *_: calls.append(0))
    run(live, Tensor.backward)
    return len(calls)


def tuner_of(row: Row, live: Live, **options: Any) -> Any:
    options = {"average": False, "scaler": live.scaler, **row.options, **options}
    return as_given(live.model, live.optimizers, seeded(live.val_loss), tune=row.wrt, **options)


def stock(row: Row, name: str, group: int, delta: float) -> float:
    """The validation loss after the loop with torch alone, with one number of one group moved by delta."""
    live = row.build()
    here, opt = [(g, opt) for opt in live.optimizers for g in opt.param_groups][group]
    if row.scheduled and name == "lr":
        written, base = list[float](), here.get("initial_lr", here["lr"])

        def multiply(*_: Any) -> None:
            written.append(here["lr"])
            here["lr"] *= 1 + delta / base

        opt.register_step_pre_hook(multiply)
        opt.register_step_post_hook(lambda *_: here.update(lr=written[-1]))
    else:
        here[name] = here[name] + delta
    run(live, Tensor.backward)
    return float(seeded(live.val_loss)().detach())


def check_hypergradients(row: Row) -> None:
    """Assert that every hypergradient is the finite difference of the loop with torch alone."""
    live, steps = row.build(), steps_of(row)
    tuner = tuner_of(row, live, **{"every": steps, **row.options})
    with warned(row):
        run(live, tuner.backward)
    stats = tuner.stats
    assert stats["plain_steps"] == stats["changed_gradients"] == stats["capped"] == 0
    assert tuner.hypergradients, "no hyperparameter step was taken"
    errors = errors_of(row, tuner.hypergradients)
    if row.status == UNSEEN:
        assert row.rtol < max(errors.values()), errors
    else:
        assert all(e <= row.rtol for e in errors.values()), errors


def errors_of(row: Row, hypergradients: Mapping[str, Tensor]) -> dict[tuple[str, int], float]:
    """Relative errors against finite differences; a group whose number is 0 beside others that are not is not tuned."""
    errors, groups = {}, [g for opt in row.build().optimizers for g in opt.param_groups]
    for name, found in hypergradients.items():
        for i, got in enumerate(found.tolist()):
            if not groups[i][name] and any(g[name] for g in groups):
                assert got == 0
                continue
            want = slope(lambda x, name=name, i=i: stock(row, name, i, x))
            errors[name, i] = abs(got - want) / abs(want)
    return errors


def warned(row: Row) -> Any:
    return pytest.warns(UserWarning, match=row.says) if row.says else nullcontext()


def held_by(optimizers: Sequence[torch.optim.Optimizer]) -> list[Tensor]:
    """Parameters and state."""
    params = [p.detach() for opt in optimizers for group in opt.param_groups for p in group["params"]]
    states = [x for opt in optimizers for s in opt.state.values() for x in s.values() if isinstance(x, Tensor)]
    return [*params, *states]


def tensors_of(live: Live) -> list[Tensor]:
    return [*live.model.state_dict().values(), *held_by(live.optimizers), *live.also()]


def numbers_of(live: Live) -> list[dict[str, Any]]:
    return [{k: v for k, v in g.items() if k != "params"} for opt in live.optimizers for g in opt.param_groups]


def check_bit_identical(row: Row) -> None:
    """Assert that the loop ends at the same bits with a frozen tuner as with torch alone."""
    plain, tuned = row.build(), row.build()
    tuner = tuner_of(row, tuned, **{"every": 3, **row.options})
    tuner.freeze()
    run(plain, Tensor.backward)
    after_plain = torch.rand(3)
    with warned(row):
        run(tuned, tuner.backward)
    assert torch.equal(after_plain, torch.rand(3)), "random numbers went another way"
    pairs = zip(tensors_of(plain), tensors_of(tuned), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert numbers_of(plain) == numbers_of(tuned)


def check_said(row: Row) -> None:
    """Assert that it is bit-identical, and that a tuner that is not frozen warns too."""
    assert row.says
    live = row.build()
    with warned(row):
        run(live, tuner_of(row, live, every=3).backward)
    check_bit_identical(row)


def check_refused(row: Row) -> None:
    """Assert the error, before any step: what the optimizers hold is as it was."""
    live = row.build()
    before = [x.clone() for x in held_by(live.optimizers)]
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=row.says):
        run(live, tuner_of(row, live, every=3).backward)
    assert all(torch.equal(a, b) for a, b in zip(before, held_by(live.optimizers), strict=True))
