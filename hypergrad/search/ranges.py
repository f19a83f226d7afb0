r"""`suggest_space`: ranges of lr and weight decay from the data, by slope and curvature along the optimizer's own step.

For pairs of batches (i, j), d_i = −dθ/dη is the direction that the optimizer takes on batch i without decay, g its gradient and
H its Hessian. Means over the pairs of

    S = g_iᵀ d_i      slope along d of the batch that made it: signal and noise
    A = g_jᵀ d_i      slope of a fresh batch: signal alone
    B = d_iᵀ H_j d_i  curvature

give what bounds lr. A step η d changes the loss by −η A + η² B/2, so

    best      η* = A/B                            the most that one step descends, noise included (McCandlish et al. 2018, arXiv
                                                  1812.06162: η* falls with the noise in d)
    edge      η₊ = 2 S/B                          above it a step along d overshoots: d = P g, and dᵀHd/dᵀP⁻¹d = B/S is the
                                                  curvature that P leaves; heavy-ball momentum m raises it by 1 + m
    idle      η₋ = S/(B T)                        below it T steps do not come to the minimum along d

d is what the optimizer comes to on a steady gradient: RMSprop's first step is 1/√(1 − α) times as long. (Momentum is 0 in this; a
steady gradient under heavy-ball momentum counts 1/(1 − m) times, so η* and η₋ are 1 − m times as large.)

On a quadratic with H = h I and no noise, gradient descent has η* = 1/h and η₊ = 2/h. lr is searched from the larger of η₋ and
η*/SPAN to HEADROOM η₊: the loss flattens along the way, and stays sharp where it was steep.

Weight decay w takes the share 1 − exp(−D), D = η w T/(1 − m), of the weights in T steps. It is searched where D at η* goes from
`WeightDecaySizing.least` to `most`: below, it does nothing in this run; above, the run forgets where it came from. An optimizer
that divides decay by √v with the gradient (Adam, RMSprop; not AdamW) feels w against the gradient: there it is searched from
RARELY to OFTEN times ‖g‖/‖θ‖.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hypergrad.checks.stock_run import twin
from hypergrad.core.restore import as_found
from hypergrad.differentiate.arguments import Optimizers, as_optimizers
from hypergrad.online.policies.momentum_start import largest_momentum
from hypergrad.online.policies.weight_decay_sizing import WeightDecaySizing
from hypergrad.optimizers.transition import Transition
from hypergrad.search.entries import Float
from hypergrad.search.space import Space

PAIRS = 8  # of batches that are measured
SPAN, HEADROOM = 1e3, 4.0
RARELY, OFTEN = 1e-4, 1.0
SIZING = WeightDecaySizing()
WIDER = 3.0  # than its least to its most: the lr that is found need not be η*
STEADY, LONGEST = 1e-3, 500  # relative change of ‖d‖ from step to step at which it is constant; steps at most
NARROWEST = 30.0  # a range's ends are at least this factor apart


class Measurement(NamedTuple):
    """What a pair of batches shows: S, A, B, ‖g‖, ‖θ‖, and ‖d‖ on a steady gradient over that of the first step."""

    own: float
    fresh: float
    curvature: float
    gradient: float
    weights: float
    growth: float


def suggest_space(
    model: torch.nn.Module,
    optimizer: Optimizers,
    batches: Iterable[Any],
    loss: Callable[..., Tensor],
    steps: int | None = None,
) -> Space:
    """Suggest log ranges of lr and, where the optimizer has it, weight decay.

    Args:
        model, optimizer, loss: as of `hypergrad.hypergradient`; left as they were found.
        batches: a loader, or a list of batches; the first 9 are used.
        steps: T, of the runs to be searched; None: ten times through `batches`.

    Returns:
        Space with "lr", starting at η*, and "weight_decay". With several param groups lr is that of the largest; give the others
        the ratios to it that they have now.

    Raises:
        ValueError: fewer than 2 batches, or no slope or curvature in what they show.

    Example:
        Gradient descent on 4 θ²/2 from θ = 1: the best step is 1/4, and 2/4 is the edge.

        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, 1.0)
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> lr = suggest_space(model, sgd, [None] * 4, lambda model, batch: 2 * (model.weight ** 2).sum(), steps=100)["lr"]
        >>> lr.start, lr.high / HEADROOM
        (0.25, 0.5)
    """
    if steps is not None and (isinstance(steps, bool) or steps != int(steps) or steps < 1):
        raise ValueError(f"steps must be a whole number from 1, got {steps!r}.")
    optimizers = as_optimizers(optimizer)
    transition = Transition(optimizers, frozenset())
    with as_found(model, optimizers):
        source = batches if hasattr(batches, "__len__") else list(batches)
        items = list(itertools.islice(iter(source), PAIRS + 1))
        if len(items) < 2:
            raise ValueError(f"batches has {len(items)}: at least 2 are needed, to tell signal from noise.")
        found = _mean([_measure(model, optimizers, loss, i, j) for i, j in itertools.pairwise(items)])
    if not (all(map(math.isfinite, found)) and found.own > 0 and found.curvature > 0):
        raise ValueError(
            f"no ranges can be read from these batches: slope {found.own:.3g}, curvature {found.curvature:.3g} along the "
            "optimizer's step. Is the model at a minimum, or the loss not finite?"
        )
    T = steps or 10 * len(source)  # type: ignore[arg-type]
    momentum = largest_momentum(transition.values(), transition.rules)
    unit = 1 / found.growth
    signal = max(found.fresh, found.own / len(items))  # so few batches show no smaller signal than that
    best = unit * signal / found.curvature
    edge = unit * 2 * (1 + momentum) * found.own / found.curvature
    low = max(unit * found.own / found.curvature / T, best / SPAN) * (1 - momentum)
    lr = _range(low, HEADROOM * edge, best * (1 - momentum))
    decay = transition.values().get("weight_decay", [])
    if all(w is None for w in decay):
        return Space({"lr": lr})
    if any(rule.second_moment_of_decay for rule in transition.rules):
        size = found.gradient / found.weights if found.weights else 1.0
        return Space({"lr": lr, "weight_decay": _range(RARELY * size, OFTEN * size, 1e-2 * size)})
    rate = best * T  # η* T: D for w = 1
    return Space(
        {
            "lr": lr,
            "weight_decay": _range(SIZING.least / WIDER / rate, WIDER * SIZING.most / rate, SIZING.little / rate),
        }
    )


def _range(low: float, high: float, start: float) -> Float:
    """A log range whose ends are at least NARROWEST apart."""
    low = min(low, high / NARROWEST)
    return Float(low, high, "log", start=min(max(start, low), high))


def _mean(measurements: list[Measurement]) -> Measurement:
    return Measurement(*(sum(column) / len(measurements) for column in zip(*measurements)))


def _measure(
    model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], loss: Callable[..., Tensor], i: Any, j: Any
) -> Measurement:
    """One pair of batches; the caller puts buffers, gradients and random numbers back."""
    params = [p for opt in optimizers for group in opt.param_groups for p in group["params"] if p.requires_grad]
    g = torch.autograd.grad(loss(model, i), params, allow_unused=True)
    for p, x in zip(params, g):
        p.grad = x
    d, growth = _direction(params, optimizers)
    fresh = torch.autograd.grad(loss(model, j), params, create_graph=True, allow_unused=True)
    slope = sum(((x * y).sum() for x, y in zip(fresh, d) if x is not None), torch.zeros(()))
    product = torch.autograd.grad(slope, params, allow_unused=True) if slope.requires_grad else [None] * len(params)
    return Measurement(
        _dot(g, d),
        float(slope.detach()),
        abs(_dot(product, d)),
        _dot(g, g) ** 0.5,
        _dot(params, params) ** 0.5,
        growth,
    )


def _direction(params: list[Tensor], optimizers: list[torch.optim.Optimizer]) -> tuple[list[Tensor], float]:
    """d = −dθ/dη at the present gradients, and how much longer it is once they have been the same for long.

    d is read off a step about as long as θ: the difference of weights that hardly move is rounding.
    """
    norm = _dot(params, params) ** 0.5
    first = next(_steps(params, optimizers, 1.0))
    length = _dot(first, first) ** 0.5
    lr = max(float(group["lr"]) for opt in optimizers for group in opt.param_groups)
    larger = norm / (lr * length) if norm > 0 and 0 < length < math.inf else 1.0
    lengths: list[float] = []
    for d in itertools.islice(_steps(params, optimizers, larger), LONGEST):
        first = d if not lengths else first
        lengths.append(_dot(d, d) ** 0.5)
        if len(lengths) > 1 and not abs(lengths[-1] - lengths[-2]) > STEADY * lengths[-1]:
            break
    return first, lengths[-1] / lengths[0] if lengths[0] > 0 else 1.0


def _steps(params: list[Tensor], optimizers: list[torch.optim.Optimizer], larger: float) -> Iterator[list[Tensor]]:
    """d of one step after the other from the same weights and gradients, without decay and momentum.

    Args:
        larger: a factor on every lr.
    """
    twins = [twin(opt) for opt in optimizers]
    groups = [group for opt in twins for group in opt.param_groups]
    still = {"weight_decay": 0.0, "momentum": 0.0, "dampening": 0.0, "nesterov": False}
    for group in groups:
        group |= {name: x for name, x in still.items() if name in group} | {"lr": larger * group["lr"]}
    scale = max(float(group["lr"]) for group in groups)
    if not scale > 0:
        raise ValueError("lr is 0 in every param group: set it to any positive number; its value does not matter here.")
    while True:
        before = [p.detach().clone() for p in params]
        for opt in twins:
            opt.step()
        d = [(old - p.detach()) / scale for old, p in zip(before, params)]
        with torch.no_grad():
            for p, old in zip(params, before):
                p.copy_(old)
        yield d


def _dot(xs: Iterable[Tensor | None], ys: Iterable[Tensor | None]) -> float:
    return sum(float((x.detach() * y.detach()).sum()) for x, y in zip(xs, ys) if x is not None and y is not None)
