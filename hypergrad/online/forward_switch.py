"""In a user's loop: the model's forward pass such that it can be differentiated twice, where a product is due.

The loop calls the model, or its parts, before it calls `tuner.backward`, so this is done around these calls, by forward hooks.
They are registered when a graph first shows what has no second derivative; other models are left alone. A module compiled by
`module.compile()` runs its hooks inside the compiled code: there the compiled call itself is wrapped, until `remove`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from torch import nn

from hypergrad.core.problem import Problem
from hypergrad.core.second_order import twice_differentiable
from hypergrad.online import model_hooks


class ForwardSwitch:
    """Runs the training calls of the model, and of its parts by themselves, under `twice_differentiable` where `due()`.

    Args:
        problem: with the model; it tells validation, which needs no product.
        due: a bound method; its object, which holds this one, is not kept alive.
    """

    def __init__(self, problem: Problem, due: Callable[[], bool]):
        self.problem, self.model, self._due = problem, problem.model, weakref.WeakMethod(due)
        self.allowed = True  # False where training is to be the same bit for bit
        self.open: list[ExitStack] = []  # of the calls under way, the outermost, which switches, first
        self._undo: Callable[[], object] | None = None  # takes off what `attach` put on, also when this is gone

    @property
    def attached(self) -> bool:
        return self._undo is not None

    def due(self) -> bool:
        due = self._due()
        return self.allowed and not self.problem.validating and due is not None and due()

    def attach(self) -> None:
        """Begin; a second call changes nothing."""
        if self.attached:
            return
        hooked, compiled, within = list[nn.Module](), list[tuple[nn.Module, Any]](), set[int]()
        for module in model_hooks.called(self.model):
            call = _compiled_call(module)
            if id(module) in within:
                continue
            if call is None:
                hooked.append(module)
                continue
            compiled.append((module, call))
            within |= {id(m) for m in module.modules()}
            module._compiled_call_impl = _switched(weakref.ref(self), module, call)  # type: ignore[assignment]
        self._undo = weakref.finalize(self, _detach, model_hooks.hook_calls(self, hooked), compiled)

    def check_compiled(self) -> None:
        """Raise where a graph has a compiled part, and the model has none: its call cannot be switched."""
        if not any(hasattr(x, "_orig_mod") or _compiled_call(x) is not None for x in self.model.modules()):
            raise NotImplementedError(
                "the loss went through code under torch.compile, which has no second derivative in torch, and the model that "
                "hypergrad was given is not compiled: give it the compiled module that the loss calls. A function that calls the "
                "model or the tuner may not be compiled."
            )

    def enter(self) -> None:
        call = ExitStack()
        if not self.open and self.due():
            call.enter_context(twice_differentiable())
        self.open.append(call)

    def leave(self) -> None:
        if self.open:
            self.open.pop().close()

    def settle(self) -> None:
        """No call is under way, whatever ended the last one."""
        while self.open:
            self.leave()

    def remove(self) -> None:
        """End; the model is as it was."""
        if self._undo is not None:
            self._undo()
            self._undo = None


def _detach(handles: Sequence[Any], compiled: Sequence[tuple[nn.Module, Any]]) -> None:
    model_hooks.remove(handles)
    for module, call in compiled:
        module._compiled_call_impl = call


def _switched(me: weakref.ref[ForwardSwitch], module: nn.Module, compiled: Any) -> Callable[..., Any]:
    """The compiled call of a module; the uncompiled one where a product is due."""

    def call(*args: Any, **kwargs: Any) -> Any:
        switch = me()
        if switch is None or not switch.due():
            return compiled(*args, **kwargs)
        with twice_differentiable():
            return module._call_impl(*args, **kwargs)

    return call


def _compiled_call(module: nn.Module) -> Any:
    """What `module.compile()` has made; None without."""
    return getattr(module, "_compiled_call_impl", None)
