"""Hooks of a tuner on its optimizers: they do not keep it alive, and go when it goes."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

_TUNED: weakref.WeakKeyDictionary[Any, weakref.ref[Any]] = weakref.WeakKeyDictionary()  # optimizer → its tuner


def check_free(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Raise where an optimizer has a tuner already: each would take the other's writes for a scheduler's."""
    if any(opt in _TUNED and _TUNED[opt]() is not None for opt in optimizers):
        raise ValueError("this optimizer has a tuner already: call its close() before you make another one.")


def attach(
    tuner: Any,
    optimizers: Sequence[torch.optim.Optimizer],
    before: str,
    after: str,
    loaded: str,
    within: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Callable[[], object]:
    """Call `tuner.before(i)` and `tuner.after(i)` around every step of optimizer i, and `tuner.loaded(i)` after its
    `load_state_dict`. Returns what takes the hooks off.

    The hooks are also taken off when the tuner is gone.

    within: gives the context in which `before` and `after` are called; it must not keep the tuner alive.
    """
    me, handles = weakref.ref(tuner), []
    for i, opt in enumerate(optimizers):
        handles.append(opt.register_step_pre_hook(_before(me, before, i, within)))
        handles.append(opt.register_step_post_hook(_after(me, after, i, within)))
        handles.append(opt.register_load_state_dict_post_hook(_after(me, loaded, i, nullcontext)))
        _TUNED[opt] = me
    return weakref.finalize(tuner, _detach, handles, [weakref.ref(opt) for opt in optimizers])


def leave_uncompiled(cls: type, *methods: str) -> None:
    """Let torch.compile leave these methods alone; done when a tuner is made: its optimizer has loaded the compiler by then."""
    for name in methods:
        method = vars(cls)[name]
        if not getattr(method, "_torchdynamo_disable", False):
            setattr(cls, name, torch.compiler.disable(method))


def _detach(handles: Sequence[Any], optimizers: Sequence[weakref.ref[Any]]) -> None:
    for handle in handles:
        handle.remove()
    for ref in optimizers:
        if ref() is not None:
            _TUNED.pop(ref(), None)


def _before(me: weakref.ref[Any], method: str, i: int, within: Callable[[], AbstractContextManager[None]]) -> Any:
    """A hook that calls `method(i)` of the tuner before a step. A closure given to `step` is called first, once."""
    tried = False  # whether a step with a closure has been taken

    @torch.compiler.disable  # a compiled step leaves it alone
    def hook(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal tried
        tuner = me()
        if tuner is None or _within_its_own_step(optimizer):
            return None
        changed = _closure(optimizer, args, kwargs, keep=not tried)
        tried = tried or changed is not None
        with torch.no_grad(), within():
            getattr(tuner, method)(i)
        return changed

    return hook


def _after(me: weakref.ref[Any], method: str, i: int, within: Callable[[], AbstractContextManager[None]]) -> Any:
    """A hook that calls `method(i)` of the tuner after a step, or after a state was loaded."""

    @torch.compiler.disable
    def hook(optimizer: Any, *_: Any) -> None:
        tuner = me()
        if tuner is not None and not _within_its_own_step(optimizer):
            with torch.no_grad(), within():
                getattr(tuner, method)(i)

    return hook


# step(closure) calls the closure, which zeroes gradients, calls tuner.backward and returns the loss, and then steps. Gradients
# have to be there before the step, so the closure is called here, and the step is given a function that returns its loss.
def _closure(
    optimizer: Any, args: Any, kwargs: dict[str, Any], keep: bool
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Call the closure that `step` was given. The arguments that step is to have in its place; None: there was none.

    Args:
        keep: the weights, until the step has shown that it calls its closure once.
    """
    named = "closure" in kwargs
    closure = kwargs["closure"] if named else (args[1] if len(args) > 1 else None)
    if not callable(closure):
        return None
    with torch.enable_grad():
        loss = closure()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in params] if keep else None
    calls = 0

    def computed() -> Any:
        nonlocal calls
        calls += 1
        if calls > 1:
            if before is not None:
                with torch.no_grad():
                    for p, old in zip(params, before, strict=True):
                        p.copy_(old)
            raise NotImplementedError(
                f"{type(optimizer).__name__}.step calls its closure more than once, at other weights: hypergrad differentiates "
                "optimizers that need one gradient a step. Train with another optimizer, or without a tuner (tuner.close())."
            )
        return loss

    return (args, {**kwargs, "closure": computed}) if named else ((args[0], computed, *args[2:]), kwargs)


def _within_its_own_step(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step of this optimizer has called another one: torch runs the hooks of `super().step()` too."""
    code, frame, found = getattr(type(optimizer).step, "__code__", None), sys._getframe(), 0
    while frame is not None:
        found += frame.f_code is code and frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return found > 1
