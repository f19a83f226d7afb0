"""One step of any optimizer's own, unmodified code, as a function of what it depends on, and its derivatives.

    (params', reals') = step(params, gradients, reals, values)          of an optimizer assembled for this one call

The Jacobian J is that of autograd through the step (see tracing.py): λ J by one backward pass. λ J is linear in λ, so that
J z = ∂(λ J z)/∂λ: one more backward pass for each z, without running the optimizer's Python again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hypergrad.optimizers.registry import unhooked_step
from hypergrad.optimizers.traced.memory import Memory, assembled, split
from hypergrad.optimizers.traced.traced_float import TracedFloat
from hypergrad.optimizers.traced.tracing import Promoted, tracing

# without kernels that autograd cannot differentiate; operations on lists are split up by the mode
_PLAIN_KERNELS = {"fused": False, "capturable": False, "differentiable": False}

# ("param", i), ("grad", i), ("real", name), ("value", group, part's number)
Key = tuple[Any, ...]


@dataclass
class Inputs:
    """The arguments of a step, which does not change them.

    Args:
        cls: the optimizer's class.
        live: the live parameters, whose attributes an optimizer may read (`p.use_muon`).
        grads: None where a parameter has no gradient.
        values: (group, name) -> float or tuple of floats.
        names: the names of hyperparameters.
    """

    cls: type[torch.optim.Optimizer]
    live: Sequence[Tensor]
    params: Sequence[Tensor]
    grads: Sequence[Tensor | None]
    memory: Memory
    values: Mapping[tuple[int, str], Any]
    names: frozenset[str]

    def like(self, x: Tensor, i: int) -> Tensor:
        """x with the attributes of live parameter i."""
        vars(x).update(vars(self.live[i]))
        return x


@dataclass
class Outcome:
    params: list[Tensor]
    memory: Memory
    written: set[str]  # names in param_groups that the step wrote to


def own_step(inputs: Inputs) -> Outcome:
    """The step as it is, to the last bit."""
    return _step(inputs)


def unrounded_step(inputs: Inputs) -> Outcome:
    """The step without casts to a lower precision than its parameters': what `trace` differentiates."""
    with Promoted(inputs.params[0].dtype):
        return _step(inputs)


def _step(inputs: Inputs) -> Outcome:
    params = [
        inputs.like(torch.nn.Parameter(x.detach().clone(), live.requires_grad), i)
        for i, (x, live) in enumerate(zip(inputs.params, inputs.live, strict=True))
    ]
    for p, g in zip(params, inputs.grads, strict=True):
        p.grad = None if g is None else g.detach().clone()
    reals = {k: x.detach().clone() if isinstance(x, Tensor) else x for k, x in inputs.memory.reals.items()}
    outcome = _run(inputs, params, reals, dict(inputs.values))
    return Outcome([p.detach() for p in outcome.params], outcome.memory, outcome.written)


def _run(
    inputs: Inputs, params: list[Any], reals: Mapping[str, Any], values: Mapping[Any, Any], **flags: Any
) -> Outcome:
    optimizer = assembled(inputs.cls, inputs.memory.rest, params, reals, lambda g, name: values[g, name])
    for place in (*optimizer.param_groups, vars(optimizer)):
        place.update({k: x for k, x in flags.items() if k in place})
    groups = [_Recording(group) for group in optimizer.param_groups]
    optimizer.param_groups = list[dict[str, Any]](groups)
    unhooked_step(inputs.cls)(optimizer)  # without hooks for all optimizers
    written = set().union(*(group.written for group in groups))
    return Outcome(params, split(optimizer, inputs.names), written)


class _Recording(dict):  # type: ignore[type-arg]
    """A param group that records which names are written to."""

    def __init__(self, group: Mapping[str, Any]):
        super().__init__(group)
        self.written: set[str] = set()

    def __setitem__(self, name: str, x: Any) -> None:
        self.written.add(name)
        super().__setitem__(name, x)

    def update(self, *args: Any, **kw: Any) -> None:  # type: ignore[override]
        for name, x in dict(*args, **kw).items():
            self[name] = x


@dataclass
class Traced:
    """A step with its graph: the derivatives of its outputs in its inputs."""

    inputs: dict[Key, Tensor]
    outputs: dict[Key, Tensor]

    def vjp(self, cotangents: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
        """λ J, for the inputs on which anything depends."""
        used = {key: x for key, x in self.outputs.items() if x.requires_grad and key in cotangents}
        return self._vjp(used, [cotangents[key].to(x).view(x.shape) for key, x in used.items()], False)

    def jvp(self, k: int, tangents: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
        """J z for k directions at once; tangents are [k, …], absent ones 0."""
        used = {key: x for key, x in self.outputs.items() if x.requires_grad}
        lam = {key: torch.zeros_like(x, requires_grad=True) for key, x in used.items()}
        vjp = {key: x for key, x in self._vjp(used, list(lam.values()), True).items() if key in tangents}
        out = {key: x.new_zeros(k, *x.shape) for key, x in self.outputs.items()}
        vjp = {key: x for key, x in vjp.items() if x.requires_grad}
        for j in range(k) if vjp else ():
            z = [tangents[key][j].to(x).view(x.shape) for key, x in vjp.items()]
            rows = torch.autograd.grad(list(vjp.values()), list(lam.values()), z, retain_graph=True, allow_unused=True)
            for key, row in zip(used, rows, strict=True):
                if row is not None:
                    out[key][j] = row
        return out

    def _vjp(self, used: dict[Key, Tensor], cotangents: list[Tensor], create_graph: bool) -> dict[Key, Tensor]:
        if not used:
            return {}
        grads = torch.autograd.grad(
            list(used.values()),
            list(self.inputs.values()),
            cotangents,
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
        )
        return {key: g for key, g in zip(self.inputs, grads, strict=True) if g is not None}


def trace(inputs: Inputs, tuned: Collection[str]) -> tuple[Traced, Outcome]:
    """The step with its graph. Random numbers are the same as those of the step itself, and put back.

    Args:
        tuned: names of hyperparameters to differentiate in.
    """
    leaves: dict[Key, Tensor] = {}
    device = inputs.params[0].device

    def leaf(key: Key, x: Any, above_zero: bool = False) -> Any:
        if isinstance(x, Tensor):
            leaves[key] = x.detach().clone().requires_grad_()
            with torch.enable_grad():
                return leaves[key].clone()
        leaves[key] = torch.tensor(float(x), dtype=torch.float64, device=device, requires_grad=True)
        return TracedFloat(float(x), leaves[key], above_zero)

    params = []
    for i, (p, g) in enumerate(zip(inputs.params, inputs.grads, strict=True)):
        params.append(inputs.like(p.detach().clone() if g is None else leaf(("param", i), p), i))
        params[i].grad = None if g is None else leaf(("grad", i), g)
    wide = params[0].dtype  # state of a lower precision is widened: see tracing.py on casts
    reals = {name: leaf(("real", name), _at_least(x, wide)) for name, x in inputs.memory.reals.items()}
    values = dict(inputs.values)
    for (g, name), x in inputs.values.items():
        if name in tuned and x is not None:
            many = isinstance(x, tuple)
            new = [leaf(("value", g, name, j), y, True) for j, y in enumerate(x if many else (x,))]
            values[g, name] = tuple(new) if many else new[0]
    with torch.random.fork_rng([device] if device.type == "cuda" else []), tracing(wide):
        outcome = _run(inputs, params, reals, values, **_PLAIN_KERNELS)
    outputs = {("param", i): p for i, p in enumerate(outcome.params)}
    outputs |= {("real", name): _tensor(x).to(device) for name, x in outcome.memory.reals.items()}
    return Traced(leaves, outputs), outcome


def _at_least(x: Any, dtype: torch.dtype) -> Any:
    return x.to(torch.promote_types(x.dtype, dtype)) if isinstance(x, Tensor) else x


def _tensor(x: Any) -> Tensor:
    if isinstance(x, TracedFloat):
        return x.t
    return x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64)
