"""What arguments a user's function takes."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple


class Positional(NamedTuple):
    """What a function takes by position."""

    parameters: list[inspect.Parameter]
    variadic: bool  # and *args

    @property
    def required(self) -> list[inspect.Parameter]:
        return [p for p in self.parameters if is_required(p)]


def positional(function: Callable[..., Any]) -> Positional | None:
    """The arguments a function takes by position; None where Python cannot tell its signature."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    variadic = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters)
    return Positional([p for p in parameters if p.kind in kinds], variadic)


def is_required(parameter: inspect.Parameter) -> bool:
    return parameter.default is inspect.Parameter.empty


_TAKES_STEP: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()  # a signature takes a while to read


def takes_step(val_loss: Callable[..., Any]) -> bool:
    """Whether a validation loss wants the step number: it has a required positional argument, or `t=None`."""
    with suppress(KeyError, TypeError):  # TypeError: it cannot be hashed, or not be held weakly
        return _TAKES_STEP[val_loss]
    taken = positional(val_loss)
    found = taken.parameters if taken is not None else []
    answer = any(is_required(p) or (p.name == "t" and p.default is None) for p in found)
    with suppress(TypeError):
        _TAKES_STEP[val_loss] = answer
    return answer


def call_val_loss(val_loss: Callable[..., Any], t: int) -> Any:
    """A validation loss after t steps. What it raises over its argument says what that is, and so where its batches end."""
    try:
        return val_loss(t) if takes_step(val_loss) else val_loss()
    except StopIteration as error:
        raise ValueError(
            "val_loss raised StopIteration: the batches that it takes one after the other have ended. It is called again and "
            "again: take the same batch each time, or make it by hypergrad.validation(model, loader, criterion), which draws "
            "without end."
        ) from error
    except (TypeError, AttributeError) as error:
        if not takes_step(val_loss):
            raise
        hint = (
            "val_loss has an argument without a default, so hypergrad called val_loss(t), with t the number of steps done. If "
            "it is to be the model, write val_loss without an argument, and use the model by its name."
        )
        error.args = (f"{error}\n{hint}",)
        raise


def takes_hypers(loss: Callable[..., Any]) -> bool:
    """Whether a loss takes hypers beside model and batch: a third positional argument that is required, `None` or a dict by
    default; or *args."""
    taken = positional(loss)
    if taken is None or taken.variadic:
        return True
    third = taken.parameters[2:3]
    return any(is_required(p) or p.default is None or isinstance(p.default, Mapping) for p in third)
