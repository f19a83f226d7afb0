"""What an update rule is: the algebra of one optimizer, with its two derivatives.

Legend, used in every rule file:

    p  parameters            p' the same after the step        g  gradient of the loss at p
    s  optimizer tensors     s' the same after the step        h  hyperparameters of the group, plus t
    dx tangent of x          λx adjoint of x (`lx` in code)    t  number of this step, from 1

A rule is a pure function of tensors of one shape. `step` computes in the order of operations of the optimizer, so that
it reproduces it bit for bit; `jvp` and `vjp` are derived by hand above the lines that implement them. No derivative
ever branches on the value of a hyperparameter, so a derivative at 0 (torch's default weight decay) is right.

A rule may have further attributes:

    slot_shapes(shape)   of a rule that is not elementwise: name → shape of each slot of a parameter of this shape
    first                name → value of a slot before the first step, where that is not 0 or is made in the constructor
    counts_groups        True where the optimizer counts a group's steps, not each parameter's
    averages             True where `momentum` averages gradients: one gradient moves p by lr in all, not by lr/(1 − momentum)
    decoupled            True where no fixed point is a minimum of the loss plus a penalty by weight decay
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Scalars = Mapping[str, float]
Shares = Mapping[str, Tensor | Callable[[], Tensor]]

# names in param_groups whose value is several numbers: name -> the rule's names of them
PARTS = {"betas": ("beta1", "beta2"), "ns_coefficients": ("ns_a", "ns_b", "ns_c")}


def parts(name: str) -> tuple[str, ...]:
    return PARTS.get(name, (name,))


class UpdateRule(Protocol):
    """The update rule of one param group. Implementations are frozen dataclasses of flags."""

    hyperparameters: ClassVar[tuple[str, ...]]  # the names in `h` it can be differentiated in
    elementwise: ClassVar[bool]  # True: parameters of a group may be joined into one flat vector; False: one at a time

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the optimizer's tensors, as in `optimizer.state[p]`; with the shape of p, where it has no slot_shapes."""
        ...

    @property
    def second_moment_of_decay(self) -> str | None:
        """The slot v if weight decay is added to a gradient that is divided by √v, else None."""
        ...

    @classmethod
    def from_group(cls, group: Mapping[str, Any], wrt: frozenset[str]) -> UpdateRule:
        """Read the flags of a live param group, over those of its optimizer (`optimizer.maximize` of third-party classes).

        Raise where a flag or a derivative in `wrt` is not supported.
        """
        ...

    def step(self, p: Tensor, g: Tensor, s: Tensors, h: Scalars) -> tuple[Tensor, Tensors]:
        """(p', s') of one step. Arguments are left unchanged."""
        ...

    def jvp(
        self, p: Tensor, g: Tensor, s: Tensors, h: Scalars, dp: Tensor, dg: Tensor, ds: Tensors, dh: Tensors
    ) -> tuple[Tensor, Tensors]:
        """(dp', ds'). Tangents have shape [k, *p.shape] for k directions; dh maps a name to [k, 1, …]; absent means 0."""
        ...

    def vjp(
        self, p: Tensor, g: Tensor, s: Tensors, h: Scalars, lp: Tensor, ls: Tensors
    ) -> tuple[Tensor, Tensor, Tensors, Shares]:
        """(λp, λg, λs, λh). λh maps a name to contributions, elementwise or summed, whose sum is the derivative in the group's
        scalar; or to a function that computes them, which is called where that derivative is wanted."""
        ...


def inner(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ of two tensors of one shape."""
    return torch.dot(a.reshape(-1), b.reshape(-1))


def along(dx: Tensor, x: Tensor) -> Tensor:
    """x·dx for each of k directions, [k, 1, …], to be broadcast against dx."""
    return (dx * x).reshape(len(dx), -1).sum(1).view((len(dx), *[1] * x.dim()))
