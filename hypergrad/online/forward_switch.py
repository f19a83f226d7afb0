"""In a user's loop: the model's forward pass such that it can be differentiated twice, where a product is due.

The loop calls the model before it calls `tuner.backward`, so this is done around the model's own call, by forward hooks. They are
registered when a graph first shows what has no second derivative; other models are left alone. A model compiled by
`model.compile()` runs its hooks inside the compiled code: there the compiled call itself is wrapped, until `detach`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from hypergrad.core.problem import Problem
from hypergrad.core.second_order import twice_differentiable


class ForwardSwitch:
    """Runs the model's training calls under `twice_differentiable` where `due()`.

    Args:
        problem: with the model; it tells validation, which needs no product.
        due: a bound method; its object is not kept alive.
    """

    def __init__(self, problem: Problem, due: Callable[[], bool]):
        self.problem, self.model, self._due = problem, problem.model, weakref.WeakMethod(due)
        self.allowed = True  # False where training is to be the same bit for bit
        self.handles: list[Any] | None = None
        self.compiled: Any = None  # of model.compile()
        self.open: list[ExitStack] = []  # of the calls under way, a call within a call last

    @property
    def attached(self) -> bool:
        return self.handles is not None

    def due(self) -> bool:
        due = self._due()
        return self.allowed and not self.problem.validating and due is not None and due()

    def attach(self) -> None:
        """Begin; a second call changes nothing."""
        if self.attached:
            return
        self.handles = []
        if isinstance(self.model, torch.jit.ScriptModule):  # it takes no hooks
            return
        if _compiled_call(self.model) is not None:
            self._wrap_compiled_call()
            return
        enter: Any = torch.compiler.disable(self._enter)
        leave: Any = torch.compiler.disable(self._leave)
        self.handles = [
            self.model.register_forward_pre_hook(enter),
            self.model.register_forward_hook(leave, always_call=True),
        ]

    def check_compiled(self) -> None:
        """Raise where a graph has a compiled part, and the model has none: its call cannot be switched."""
        if not any(hasattr(x, "_orig_mod") or _compiled_call(x) is not None for x in self.model.modules()):
            raise NotImplementedError(
                "the loss went through code under torch.compile, which has no second derivative in torch, and the model that "
                "hypergrad was given is not compiled: give it the compiled module that the loss calls. A function that calls the "
                "model or the tuner may not be compiled."
            )

    def _wrap_compiled_call(self) -> None:
        model, self.compiled = self.model, _compiled_call(self.model)

        def call(*args: Any, **kwargs: Any) -> Any:
            if not self.due():
                return self.compiled(*args, **kwargs)
            with twice_differentiable():
                return model._call_impl(*args, **kwargs)

        model._compiled_call_impl = call  # type: ignore[assignment]

    def _enter(self, *_: Any) -> None:
        call = ExitStack()
        if self.due():
            call.enter_context(twice_differentiable())
        self.open.append(call)

    def _leave(self, *_: Any) -> None:
        if self.open:
            self.open.pop().close()

    def detach(self) -> None:
        """End; the model is as it was."""
        for handle in self.handles or ():
            handle.remove()
        if self.compiled is not None:
            self.model._compiled_call_impl = self.compiled
        self.handles = self.compiled = None


def _compiled_call(module: torch.nn.Module) -> Any:
    """What `module.compile()` has made; None without."""
    return getattr(module, "_compiled_call_impl", None)
