"""Tensors that a loss uses twice, with their graph and detached: what depends on them is then differentiated in part alone."""

from __future__ import annotations

from torch import Tensor, strided

from hypergrad.core.survey import nodes_of, saved_names

CUT = (
    "the training loss uses a tensor of its graph a second time, detached (.detach() or .data), as where weights of examples are "
    "computed from loss.detach(): hypergradients take it for a constant, though it changes with the weights. hypergrad.check "
    "tells how far off they are."
)


def is_cut(loss: Tensor) -> bool:
    """Whether the graph keeps one piece of memory both as a tensor with a history and as a constant, as `.detach()` leaves it.

    Seen is what the graph keeps as it is; a number computed from a detached tensor is a constant like others.
    """
    with_history: set[int] = set()
    constant: set[int] = set()
    for node in nodes_of(loss.grad_fn):
        for name in saved_names(type(node)):
            raw = getattr(node, name)
            if any(x.unpack_hook is not None for x in (raw if isinstance(raw, (list, tuple)) else (raw,))):
                continue
            found = getattr(node, name.replace("_raw_saved_", "_saved_"), None)  # a Function in Python has none
            for x in found if isinstance(found, (list, tuple)) else (found,):
                if isinstance(x, Tensor) and x.is_floating_point() and x.layout is strided and x.numel():
                    (with_history if x.requires_grad else constant).add(x.untyped_storage().data_ptr())
    return bool(with_history & constant)
