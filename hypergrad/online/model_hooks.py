"""Hooks of a tuner around the calls of a user's model.

They do not keep what they belong to alive, and do nothing inside compiled code, whose outermost call has hooks of its own. Copies
and pickles of the model have hooks that do nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

DEPTH = 2  # a loop may call a model's parts instead of the model: so far below it


class ModelHook:
    """Calls a method of `owner`."""

    def __init__(self, owner: Any, method: str):
        self.owner, self.method = (None if owner is None else weakref.ref(owner)), method

    def __call__(self, *_: Any) -> None:
        owner = None if self.owner is None else self.owner()
        if owner is not None and not torch.compiler.is_compiling():
            getattr(owner, self.method)()

    def __deepcopy__(self, memo: Any) -> ModelHook:
        return ModelHook(None, self.method)

    def __reduce__(self) -> tuple[Callable[..., ModelHook], tuple[None, str]]:
        return ModelHook, (None, self.method)


def called(module: nn.Module, depth: int = DEPTH) -> list[nn.Module]:
    """A module and those below it, each before its own parts; one that cannot be called itself is no level."""
    if isinstance(module, torch.jit.ScriptModule):  # it takes no hooks
        return []
    whole = hasattr(module, "_orig_mod")  # torch.compile(module)
    own = "forward" in vars(module) or type(module).forward is not nn.Module.forward
    callable_itself = whole or (own and not isinstance(module, (nn.ModuleList, nn.ModuleDict)))
    found = {id(module): module} if callable_itself else {}
    if not whole and (depth or not callable_itself):
        for child in module.children():
            found |= {id(m): m for m in called(child, depth - callable_itself)}
    return list(found.values())


def hook_calls(owner: Any, modules: Sequence[nn.Module]) -> list[Any]:
    """Call `owner.enter()` before, and `owner.leave()` after every call of these modules, also one that raises."""
    enter, leave = ModelHook(owner, "enter"), ModelHook(owner, "leave")
    handles: list[Any] = [module.register_forward_pre_hook(enter, prepend=True) for module in modules]
    return handles + [module.register_forward_hook(leave, always_call=True) for module in modules]


def remove(handles: Sequence[Any]) -> None:
    for handle in handles:
        handle.remove()
