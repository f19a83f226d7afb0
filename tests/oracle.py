"""The oracle: central finite differences of the stock `torch.optim` loop, in float64, extrapolated.

Ridders' tableau: central differences at h, h/2, h/4, … are an even power series in h, whose first terms are eliminated
one after the other. The answer with the smallest estimate of its own error is taken, and an answer that is not good to
`ORACLE` is an error of the test, not of the library.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

import hypergrad
from hypergrad import Result
from tests.cases import Case
from tests.problems import Setup

ORACLE = 2e-7  # relative error that the finite difference estimates of itself: well below what it is compared to
AGREE = 1e-6  # relative, hypergradient against finite difference: what design.md asks
MODES_AGREE = 1e-9  # relative, mode against mode: rounding of some 10⁴ float64 operations, amplified by training
ROUNDING = 1e-10  # absolute, where the derivative is 0 or next to it: losses of size 1 divided by steps of size 1e-5
LEVELS = 6

# Largest step of a difference, times max(|value|, 0.02): small against the distance to the next kink or the next
# singularity (eps, and 1 − beta) of the problems of problems.py, large against rounding.
WIDTH = {"betas": 2e-3, "alpha": 2e-3, "momentum": 2e-3, "rho": 2e-3, "ns_coefficients": 1e-3}
DEFAULT_WIDTH = 1e-2


def derivative(f: Callable[[float], float], h: float, one_sided: bool = False, what: str = "") -> float:
    """f'(0), or the derivative to the right, with the error estimate checked."""

    def difference(h: float) -> float:
        return (f(h) - f(0.0)) / h if one_sided else (f(h) - f(-h)) / (2 * h)

    ratio = 2.0 if one_sided else 4.0
    best, error = float("nan"), float("inf")
    row: list[float] = []
    for i in range(LEVELS):
        new = [difference(h / 2**i)]
        for j, above in enumerate(row):
            better = new[j] + (new[j] - above) / (ratio ** (j + 1) - 1)
            estimate = max(abs(better - new[j]), abs(better - above))
            if estimate < error:
                best, error = better, estimate
            new.append(better)
        row = new
        if error <= 1e-9 * abs(best):
            break
    if not error <= ORACLE * abs(best) + ROUNDING:  # also NaN
        raise AssertionError(
            f"the finite difference of {what} does not converge, {best} ± {error}: choose another case."
        )
    return best


def shifted(value: Any, index: tuple[int, ...], delta: float) -> Any:
    """A number, pair or tensor with one element moved."""
    if isinstance(value, Tensor):
        value = value.clone()
        value[index] += delta
        return value
    if isinstance(value, tuple):
        return tuple(x + delta * (i == index[-1]) for i, x in enumerate(value))
    return value + delta


def train(
    setup: Setup,
    clip: dict[str, float],
    move: Callable[[int, dict[str, Any], dict[str, float], dict[str, Tensor] | None], Any] = lambda *_: None,
    validate: Callable[[int], None] = lambda t: None,
) -> None:
    """The stock loop. `move(t, groups, clip, hypers)` is called before step t, `validate(t)` after t steps."""
    params = [p for group in setup.optimizer.param_groups for p in group["params"]]
    validate(0)
    for t, batch in enumerate(setup.batches):
        hypers = dict(setup.hypers) if setup.hypers else None
        threshold = dict(clip)
        undo = move(t, setup.optimizer.param_groups, threshold, hypers)
        setup.optimizer.zero_grad()
        (setup.loss(setup.model, batch, hypers) if hypers else setup.loss(setup.model, batch)).backward()
        if "clip_norm" in threshold:
            torch.nn.utils.clip_grad_norm_(params, threshold["clip_norm"])
        if "clip_value" in threshold:
            torch.nn.utils.clip_grad_value_(params, threshold["clip_value"])
        setup.optimizer.step()
        if undo:
            undo()
        validate(t + 1)


def stock(case: Case, name: str = "", index: tuple[int, ...] = (), delta: float = 0.0) -> float:
    """The validation loss of the stock loop with one number moved by delta (at one step, with per_step)."""
    setup = case.build()
    with case.arithmetic():
        return _stock(case, setup, name, index, delta)


def _stock(case: Case, setup: Setup, name: str, index: tuple[int, ...], delta: float) -> float:
    when = index[0] if case.per_step and index else None
    index = index[1:] if case.per_step else index
    val_steps = case.val_steps or (len(setup.batches),)
    values = []

    def move(t: int, groups: Any, clip: dict[str, float], hypers: dict[str, Tensor] | None) -> Any:
        if not name or when not in (None, t):
            return None
        if name in clip:
            clip[name] += delta
        elif hypers and name in hypers:
            hypers[name] = shifted(hypers[name], index, delta)
        elif name == "initial_accumulator_value":  # torch reads it in the constructor
            for p in groups[index[0]]["params"] if t == 0 else ():
                state = setup.optimizer.state[p]
                state["sum"] += delta * (state["step"] == 0)
        else:
            group = groups[index[0]]
            before = group[name]
            group[name] = shifted(before, index, delta)
            return lambda: group.__setitem__(name, before)
        return None

    def validate(t: int) -> None:
        if t in val_steps:
            rng, buffers = torch.get_rng_state(), [b.clone() for b in setup.model.buffers()]
            with torch.no_grad():
                values.extend([float(setup.val_loss())] * val_steps.count(t))
                for b, saved in zip(setup.model.buffers(), buffers, strict=True):
                    b.copy_(saved)
            torch.set_rng_state(rng)

    train(setup, case.clip, move, validate)
    return sum(values) / len(values)


def present(case: Case, name: str, index: tuple[int, ...]) -> float:
    setup = case.build()
    if name in case.clip:
        return case.clip[name]
    if setup.hypers and name in setup.hypers:
        return float(setup.hypers[name][index[1:] if case.per_step else index])
    value = setup.optimizer.param_groups[index[1 if case.per_step else 0]][name]
    return value[index[-1]] if isinstance(value, tuple) else float(value)


@cache
def finite_difference(case: Case, name: str, index: tuple[int, ...]) -> float:
    value = present(case, name, index)
    h = WIDTH.get(name, DEFAULT_WIDTH) * max(abs(value), 0.02)
    # torch.optim.RMSprop ignores a momentum below 0, so at 0 there is a derivative to the right only
    one_sided = name == "momentum" and value == 0 and case.optimizer.startswith("rmsprop")
    return derivative(lambda d: stock(case, name, index, d), h, one_sided, f"{name}{list(index)} in {case}")


def hypergradient(case: Case, **options: Any) -> Result:
    setup = case.build()
    with case.arithmetic():
        return hypergrad.hypergradient(
            setup.model,
            setup.optimizer,
            setup.loss,
            setup.batches,
            setup.val_loss,
            wrt=case.names,
            hypers=setup.hypers,
            per_step=case.per_step,
            val_steps=case.val_steps,
            **case.clip,
            **options,
        )


def assert_matches(result: Result, case: Case) -> None:
    """Every number of a hypergradient against the finite difference of the stock loop."""
    assert abs(float(result.value) - stock(case)) <= MODES_AGREE * abs(stock(case))
    for name in case.names:
        array = result.gradients[name].cpu()
        for index in product(*map(range, array.shape)):
            got, want = float(array[index]), finite_difference(case, name, index)
            assert abs(got - want) <= AGREE * abs(want) + ROUNDING, f"d/d {name}{list(index)}: {got}, should be {want}"


def assert_same(a: Result, b: Result, tolerance: float = MODES_AGREE) -> None:
    """Two results agree, relative to the largest element of each array."""
    assert a.gradients.keys() == b.gradients.keys()
    for name, x in a.gradients.items():
        y = b.gradients[name]
        assert x.shape == y.shape
        worst, size = (x - y).abs().max().item(), y.abs().max().item()
        assert worst <= tolerance * size, f"{name} differs by {worst:.3g} of {size:.3g}"
