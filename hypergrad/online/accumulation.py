"""Gradients into `.grad` by autograd's own accumulation, so that whatever hangs on it runs: as after `loss.backward()`.

That is DistributedDataParallel's communication, hooks of `register_post_accumulate_grad_hook` (an optimizer that steps in the
backward pass is one), and hooks on AccumulateGrad nodes. Hooks of `Tensor.register_hook` do not: the gradients went through them.

What DistributedDataParallel leaves in `.grad` is the mean of the ranks'. Whether it is, is seen from a few sums of elements.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hypergrad.core.graph import without_hooks
from hypergrad.core.multi_tensor import copies
from hypergrad.core.processes import Processes, column_sums, is_mean
from hypergrad.core.readout import Readout
from hypergrad.online.gradient_changes import Pending, any_of_each
from hypergrad.optimizers.transition import Transition


class _Hand(torch.autograd.Function):
    """A node whose backward pass hands given gradients to leaves.

    It keeps none of them: autograd takes a gradient that nobody else holds for `.grad` as it is, and copies it otherwise, tensor
    by tensor.
    """

    @staticmethod
    def forward(ctx: Any, grads: list[Tensor], *leaves: Tensor) -> Tensor:
        ctx.grads = grads
        return leaves[0].new_empty(())

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        grads = tuple(ctx.grads)
        ctx.grads.clear()
        return (None, *grads)


def accumulate(inputs: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    """Add gradients to what is in `.grad`. What is there afterwards shares no memory with them."""
    pairs = [(x, g.detach()) for x, g in zip(inputs, grads, strict=True) if g is not None]
    leaves = [x for x, _ in pairs if x.is_leaf]
    if leaves:
        first = [g for x, g in pairs if x.is_leaf and x.grad is None]
        each = iter(copies(first))
        fresh = [next(each) if x.grad is None else g for x, g in pairs if x.is_leaf]
        del each
        with torch.enable_grad():
            root = _Hand.apply(fresh, *leaves)
        with without_hooks(leaves):
            torch.autograd.backward([root], [root.detach()])
    for x, g in pairs:
        if not x.is_leaf:  # of backward(inputs=...)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's own: that such a tensor mostly has no .grad
                x.grad = g.clone() if x.grad is None else x.grad + g


def expected(new: Pending, old: Pending | None, transition: Transition, processes: Processes) -> Pending:
    """What `accumulate` is about to leave, where `new.left` is the gradient alone.

    What is in `.grad` and did not come from earlier calls, `old`, is no part of it: it shows as a change, in one process from
    the values. In several it is noted here, and `left` is known afterwards alone (`found`).
    """
    grads, before = [p.grad for p in transition.params], [False] * len(transition.params)
    before = before if old is None else list(old.has)
    left = new.left
    assert left is not None
    if old is not None:
        mine = [g if h else None for g, h in zip(grads, before, strict=True)]
        left = left + transition.flatten(mine)
    new = replace(new, left=left)
    if processes.alone:
        return new
    foreign = [None if h else g for g, h in zip(grads, before, strict=True)]
    if any(g is not None for g in foreign):
        others = transition.flatten(foreign)
        left = left + others
        new = replace(new, left=left, changed=any_of_each((others != 0)[None], transition.sizes)[0])
    return replace(new, own=column_sums(left))


def found(new: Pending, transition: Transition) -> Pending:
    """What is left of several processes' gradients."""
    grads = [p.grad for p in transition.params]
    return replace(new, left=transition.flatten(grads), has=tuple(g is not None for g in grads))


def ask_whether_mean(pending: Pending | None, readout: Readout) -> None:
    """Ask whether what several processes left is the mean of their gradients, for `check_mean`."""
    if pending is not None and pending.own is not None and pending.left is not None:
        readout.ask("processes' gradients", pending.own)
        readout.ask_own("their mean", column_sums(pending.left))


def check_mean(read: Mapping[str, list[float]], dtype: torch.dtype) -> None:
    """Raise where it is not: weights, and tangents, would part."""
    if "their mean" in read and not is_mean(read["their mean"], read["processes' gradients"], dtype):
        raise RuntimeError(
            "the gradients of this step are not the mean of the ranks' gradients, with which DistributedDataParallel trains: "
            "compute the training loss by calling the DistributedDataParallel module, not the module inside it; leave the last "
            "of the accumulated losses outside no_sync(); and let no hook on a parameter's .grad change it."
        )
