"""What a loss's graph holds: its leaves, what it keeps for the backward pass, and what cannot be differentiated twice."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hypergrad.core.second_order import ONCE

# Layers whose gradient differs in its last bits when its graph is kept.
_INEXACT = frozenset({"SiluBackward0", "MishBackward0", "NativeGroupNormBackward0", "MkldnnRnnLayerBackward0"})

_MARKED_ONCE = once_differentiable(lambda ctx: None).__code__  # all that it marks have this code


class Survey(NamedTuple):
    """What a loss's graph holds."""

    leaves: list[Tensor]
    exact: bool  # the gradient is the same bit for bit, with its graph kept or not
    once: bool  # it holds what `second_order.twice_differentiable` avoids
    compiled: bool  # among it a compiled module or function


def nodes_of(*roots: Any) -> Iterator[Any]:
    """The given autograd nodes and all that they depend on, each once."""
    seen, stack = set(), [root for root in roots if root is not None]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            yield node
            stack.extend(nxt for nxt, _ in node.next_functions if nxt is not None)


def survey(loss: Tensor, model: torch.nn.Module | None = None) -> Survey:
    """The leaves of a loss's graph. Raise where the graph holds something that cannot be differentiated twice."""
    leaves, exact, once, of_compiled = [], True, False, False
    for node in nodes_of(loss.grad_fn):
        variable = getattr(node, "variable", None)
        if variable is not None:
            leaves.append(variable)
        elif (name := node.name()) in _INEXACT:
            exact = False
        elif name.startswith(ONCE):
            once, of_compiled = True, of_compiled or name.startswith("CompiledFunction")
        elif node.name() == "WeightNormInterfaceBackward0":
            raise NotImplementedError(
                f"{_weight_norm_layers(model)} has a wrong second derivative in torch: remove it "
                "(torch.nn.utils.parametrize.remove_parametrizations, or torch.nn.utils.remove_weight_norm) and register "
                "a parametrization whose forward(g, v) returns v * (g / v.norm(dim=1, keepdim=True)) instead."
            )
        elif "SyncBatchNorm" in node.name():
            raise NotImplementedError(
                "nn.SyncBatchNorm has no second derivative: its backward pass communicates. Use nn.BatchNorm of each rank's own "
                "batch, or nn.GroupNorm."
            )
        elif "BackwardHookFunction" in node.name():
            raise NotImplementedError(
                "a module has a full backward hook: torch would call it again on every Hessian product. Remove the hook "
                "(register_full_backward_hook), or use a hook on a parameter (p.register_hook)."
            )
        elif node.name() == "EmbeddingBackward0":
            _check_embedding(node, model)
        elif isinstance(node, torch.autograd.function.BackwardCFunction):
            _check_twice_differentiable(node)
    return Survey(leaves, exact, once, of_compiled)


def _check_twice_differentiable(node: Any) -> None:
    cls = getattr(type(node), "_forward_cls", None)
    backward = getattr(cls, "backward", None)
    if getattr(backward, "__code__", None) is _MARKED_ONCE:
        raise NotImplementedError(
            f"the autograd Function {getattr(cls, '__qualname__', cls)} is marked @once_differentiable, so its second "
            "derivative would silently be 0: write its backward in differentiable torch operations, without that mark."
        )


def _check_embedding(node: Any, model: torch.nn.Module | None) -> None:
    if getattr(node, "_saved_scale_grad_by_freq", False):
        raise NotImplementedError(
            "an embedding with scale_grad_by_freq=True has a wrong second derivative in torch: build it with "
            "scale_grad_by_freq=False."
        )
    check_max_norm(model)


def check_max_norm(model: torch.nn.Module | None) -> None:
    """Raise where a model has an embedding that writes to its weight in the forward pass."""
    for name, module in model.named_modules() if model is not None else ():
        if isinstance(module, torch.nn.Embedding) and module.max_norm is not None and module.weight.requires_grad:
            raise NotImplementedError(
                f"nn.Embedding {name or 'of this model'!r} has max_norm: its forward pass writes to its weight, a step of "
                "training that has no derivative here; build it with max_norm=None, and normalise what it returns."
            )


def _weight_norm_layers(model: torch.nn.Module | None) -> str:
    names = []
    for name, module in model.named_modules() if model is not None else ():
        parametrized = getattr(module, "parametrizations", {})
        new = any("WeightNorm" in type(p).__name__ for plist in parametrized.values() for p in plist)
        old = any("WeightNorm" in type(h).__name__ for h in module._forward_pre_hooks.values())
        if new or old:
            names.append(name or type(module).__name__)
    return "weight_norm on " + (", ".join(names) if names else "a layer of this model")


@cache
def saved_names(node: type) -> list[str]:
    return [name for name in dir(node) if name.startswith("_raw_saved_")]


def saved_tensors(node: Any) -> list[Tensor]:
    """What a node has kept for its backward pass; what saved-tensor hooks keep, such as those of checkpointing, is left out."""
    found = [getattr(node, name) for name in saved_names(type(node))]
    flat = [x for item in found for x in (item if isinstance(item, (list, tuple)) else (item,))]
    tensors = [x.data for x in flat if x.unpack_hook is None] + list(getattr(node, "saved_tensors", ()))
    return [x for x in tensors if isinstance(x, Tensor)]


def saved_bytes(*roots: Tensor | None) -> int:
    """Bytes of all that graphs keep of intermediate results, each storage once, leaves (parameters, batches) left out.

    What saved-tensor hooks keep, such as those of checkpointing, is not counted.
    """
    sizes: dict[int, int] = {}
    for node in nodes_of(*(x.grad_fn for x in roots if x is not None)):
        for x in saved_tensors(node):
            if not (x.is_leaf or (x._base is not None and x._base.is_leaf)):
                sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return sum(sizes.values())
