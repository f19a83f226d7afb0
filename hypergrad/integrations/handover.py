"""How a framework's own `loss.backward()` becomes `tuner.backward(loss)`, without a change to the framework; its val_loss.

of_loss(loss, tuner)     this one tensor's `backward` is the tuner's; where the framework shows us its loss before backward
of_calls(tuner)          inside the `with`, every tensor's is; where the framework makes the loss that it differentiates itself
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from hypergrad.online.tuner import Tuner


def check_val_loss(val_loss: Any, argument: str) -> None:
    """Raise where it cannot be a function of the framework's model, which `argument` names."""
    if not callable(val_loss):
        raise TypeError(f"val_loss must be a function ({argument}) -> scalar tensor, got {type(val_loss).__name__}.")


def of_loss(loss: Tensor, tuner: Tuner) -> None:
    """Let the next `loss.backward()` be `tuner.backward(loss)`. It is an attribute of this tensor, and goes with it."""
    me = weakref.ref(loss)

    def backward(
        gradient: Any = None, retain_graph: bool | None = None, create_graph: bool = False, inputs: Any = None
    ) -> None:
        own = me()
        assert own is not None  # it is its attribute that is called
        del own.backward  # a closed tuner calls it
        _call(tuner, own, gradient, retain_graph, create_graph, inputs)

    loss.backward = backward  # type: ignore[method-assign]


class of_calls(TorchFunctionMode):
    """Inside the `with`, and in this thread, `loss.backward()` is `tuner.backward(loss)`."""

    def __init__(self, tuner: Tuner):
        super().__init__()
        self.tuner = tuner

    def __torch_function__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.backward:
            return _call(self.tuner, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _call(
    tuner: Tuner,
    loss: Tensor,
    gradient: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Any = None,
) -> None:
    refused = {"gradient": gradient} if gradient is not None else {}
    refused |= {"create_graph": True} if create_graph else {}
    tuner.backward(loss, inputs=inputs, retain_graph=bool(retain_graph), **refused)
