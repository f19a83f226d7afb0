"""Shapes of schedules on normalised time x = step/steps in [0, 1], differentiable in all that they are made of.

They are for `schedules` of `hypergrad.hypergradient`:

    schedules={"lr": lambda t, h: schedules.knots(t / steps, h["lr_knots"])}
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hypergrad.core.float64 import widest

Number = float | Tensor


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


def _tensor(x: Any) -> Tensor:
    return x if isinstance(x, Tensor) else torch.as_tensor(x, dtype=torch.float64)
