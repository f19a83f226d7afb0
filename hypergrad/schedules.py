"""Shapes of schedules: for `schedules` of `hypergrad.hypergradient`, and the one that `hypergrad.Tuner` gives lr.

`knots` and `warmup_decay` are functions of normalised time x = step/steps in [0, 1], differentiable in all that they are made of:

    schedules={"lr": lambda t, h: schedules.knots(t / steps, h["lr_knots"])}

`decay_to_zero` is the tuner's shape of lr where it knows the length of the run, `scheduler` the same as a scheduler of torch.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from hypergrad.core.float64 import widest

Number = float | Tensor
WARMUP_SHARE = 0.01  # of the steps, in `decay_to_zero`


def knots(x: Number, values: Any, times: Any = None) -> Tensor:
    """Interpolate linearly between knots (tᵢ, vᵢ).

        v(x) = vᵢ + (vᵢ₊₁ − vᵢ) (x − tᵢ)/(tᵢ₊₁ − tᵢ),  tᵢ ≤ x < tᵢ₊₁          v₀ before t₀, v_m−1 after t_m−1

    Args:
        x: a number, or a tensor of any shape.
        values: v, shape [m, …], m ≥ 2; differentiable.
        times: t, shape [m], increasing; differentiable (where x is a knot, from the right). None: evenly spaced over [0, 1].

    Returns:
        Tensor of shape [*x.shape, …].

    Raises:
        ValueError: fewer than two knots, another number of times than of values, times that do not increase.

    Example:
        >>> v = torch.tensor([1.0, 3.0, 2.0], requires_grad=True)
        >>> y = knots(0.125, v)
        >>> y.item(), torch.autograd.grad(y, v)[0].tolist()  # a quarter of the way to the second knot
        (1.5, [0.75, 0.25, 0.0])
        >>> t = torch.tensor([0.0, 0.25, 1.0], requires_grad=True)
        >>> y = knots(0.125, v, t)  # dv/dt₁ = −(v₁ − v₀) (x − t₀)/(t₁ − t₀)²
        >>> y.item(), torch.autograd.grad(y, t)[0].tolist()
        (2.0, [-4.0, -4.0, 0.0])
    """
    values = _tensor(values)
    m = len(values) if values.dim() else 0
    if m < 2:
        raise ValueError(f"knots needs at least two values, got shape {tuple(values.shape)}.")
    if times is None:
        times = torch.linspace(
            0, 1, m, dtype=torch.promote_types(values.dtype, widest(values.device)), device=values.device
        )
    times = _tensor(times).to(values.device)
    if times.shape != (m,):
        raise ValueError(f"knots has {m} values and times of shape {tuple(times.shape)}: one time for each value.")
    if not bool((times.diff() > 0).all()):
        raise ValueError(f"the times of knots must increase, got {times.tolist()}.")
    at = _tensor(x).to(times)
    i = (torch.searchsorted(times.detach(), at.detach(), right=True) - 1).clamp(0, m - 2)
    share = ((at - times[i]) / (times[i + 1] - times[i])).clamp(0, 1)
    return values[i] + share.view((*share.shape, *[1] * (values.dim() - 1))) * (values[i + 1] - values[i])


def warmup_decay(x: Number, peak: Number, warmup: Number, floor: Number = 0.0, power: Number | str = 1.0) -> Tensor:
    """Climb linearly from 0 to a peak, then decay to a floor.

        v(x) = peak x/w                                          x < w
        v(x) = floor + (peak − floor) s,                         x ≥ w
               s = ((1 − x)/(1 − w))^power    or "cosine":  s = (1 + cos π(x − w)/(1 − w))/2

    Args:
        x: a number or tensor, from 0 to 1.
        peak, floor: highest and last value; differentiable.
        warmup: w, length of the climb, 0 ≤ w < 1; differentiable.
        power: exponent of the decay (1 linear, 2 quadratic), above 0, differentiable; or "cosine".

    Returns:
        Tensor of the shape of x.

    Raises:
        ValueError: x outside [0, 1], w outside [0, 1), a power that is not above 0 or another word than "cosine".

    Example:
        >>> [round(warmup_decay(x, 1.0, 0.2, floor=0.1).item(), 3) for x in (0.0, 0.1, 0.2, 0.6, 1.0)]
        [0.0, 0.5, 1.0, 0.55, 0.1]
        >>> round(warmup_decay(0.6, 1.0, 0.2, floor=0.1, power="cosine").item(), 3)
        0.55
        >>> w = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
        >>> slopes = (torch.autograd.grad(warmup_decay(x, 1.0, w), w)[0].item() for x in (0.1, 0.6))
        >>> [round(slope, 3) for slope in slopes]  # −x/w² in the climb, (1 − x)/(1 − w)² in the decay
        [-2.5, 0.625]
    """
    at, w = _tensor(x), _tensor(warmup)
    if not bool(((at >= 0) & (at <= 1)).all()):
        raise ValueError(f"warmup_decay is a function of normalised time: x must be from 0 to 1, got {at.tolist()}.")
    if not bool((w >= 0) & (w < 1)):
        raise ValueError(f"warmup must be a share of the run, at least 0 and below 1, got {w.tolist()}.")
    climb = peak * at / torch.where(w > 0, w, 1)
    if isinstance(power, str):
        if power != "cosine":
            raise ValueError(f"power must be a number or 'cosine', got {power!r}.")
        share = (1 + torch.cos(math.pi * (at - w) / (1 - w))) / 2
    else:
        exponent = _tensor(power)
        if not bool(exponent > 0):
            raise ValueError(f"power must be above 0, got {exponent.tolist()}.")
        # not of the quotient, whose slope is infinite at x = 1 for a power below 1
        share = (1 - at) ** exponent / (1 - w) ** exponent
    return torch.where(at < w, climb, floor + (peak - floor) * share)


def decay_to_zero(t: int, total: int) -> float:
    """Linear warm-up over the first hundredth of the steps, then linear decay that would reach 0 after the last.

        w = ⌊total/100⌋        (t + 1)/(w + 1),  t < w        (total − t)/(total − w),  t ≥ w

    Args:
        t: steps done, 0 … total − 1; from `total` on the last value is kept.
        total: number of steps.

    Example:
        >>> [decay_to_zero(t, 4) for t in range(5)]
        [1.0, 0.75, 0.5, 0.25, 0.25]
    """
    warmup = int(WARMUP_SHARE * total)
    if t < warmup:
        return (t + 1) / (warmup + 1)
    return max(total - t, 1) / (total - warmup)


def scheduler(optimizer: Optimizer, total_steps: int, last_epoch: int = -1) -> LambdaLR:
    """The shape that `hypergrad.Tuner` gives lr, as a scheduler of torch: lr is that of the optimizer times `decay_to_zero`.

    Call its `step()` after every step of the optimizer, not once an epoch.

    Args:
        optimizer: its groups' lr, or `initial_lr` where they have one, are the peak.
        total_steps: training steps of the whole run: epochs * len(train_loader).
        last_epoch: as of torch's schedulers: steps done, less one.

    Raises:
        ValueError: total_steps is not a whole number above 0.

    Example:
        >>> sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.2)
        >>> linear, lrs = scheduler(sgd, total_steps=4), []
        >>> for _ in range(4):
        ...     lrs.append(sgd.param_groups[0]["lr"])
        ...     sgd.step()
        ...     linear.step()
        >>> lrs
        [0.2, 0.15000000000000002, 0.1, 0.05]
    """
    if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
        raise ValueError(
            f"total_steps is the number of training steps of the run, such as epochs * len(train_loader); got {total_steps!r}."
        )
    return LambdaLR(optimizer, partial(decay_to_zero, total=total_steps), last_epoch)


def _tensor(x: Any) -> Tensor:
    return x if isinstance(x, Tensor) else torch.as_tensor(x, dtype=torch.float64)
