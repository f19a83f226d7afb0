"""A tuner in a loop of Hugging Face's accelerate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from hypergrad.differentiate.arguments import without_wrappers
from hypergrad.integrations.handover import of_calls
from hypergrad.online.tuner import Tuner

try:
    from accelerate import Accelerator, DistributedType
    from accelerate.scheduler import AcceleratedScheduler
    from accelerate.utils import extract_model_from_parallel
except ImportError as error:
    raise ImportError("this needs accelerate: pip install 'accelerate>=1'.") from error

REFUSED = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


def backward(accelerator: Accelerator, tuner: Tuner, loss: Tensor, **kwargs: Any) -> None:
    """What `accelerator.backward(loss)` does, by `tuner.backward`: the loss divided by the accumulation steps, and scaled where
    there is a GradScaler (make the tuner with `scaler=accelerator.scaler`).

    Args:
        kwargs: as of `accelerator.backward`.

    Raises:
        TypeError: where these are other objects, or in another order.
        NotImplementedError: with DeepSpeed and Megatron-LM.
    """
    given = accelerator, tuner, loss
    if not all(isinstance(x, kind) for x, kind in zip(given, (Accelerator, Tuner, Tensor), strict=True)):
        raise TypeError(f"call backward(accelerator, tuner, loss): got {', '.join(type(x).__name__ for x in given)}.")
    if accelerator.distributed_type in REFUSED:
        raise NotImplementedError(
            f"{accelerator.distributed_type.value} takes the backward pass and the steps into its own hands: hypergrad cannot "
            "differentiate them. Train without it, or without a tuner."
        )
    with of_calls(tuner):
        type(accelerator).backward(accelerator, loss, **kwargs)


@contextmanager
def backward_by(accelerator: Accelerator, tuner: Tuner) -> Iterator[None]:
    """Inside, this accelerator's `backward(loss)` is `backward(accelerator, tuner, loss)`: for a loop that is not yours."""

    def by_tuner(loss: Tensor, **kwargs: Any) -> None:
        backward(accelerator, tuner, loss, **kwargs)

    accelerator.backward = by_tuner  # type: ignore[method-assign]
    try:
        yield
    finally:
        del accelerator.backward


def unwrap(*prepared: Any) -> Any:
    """The torch objects inside what `accelerator.prepare` returned: one of them, or as many as were given.

    `hypergrad.Tuner` takes prepared models and optimizers as they are; this is for code that does not.

    Args:
        prepared: models, optimizers and schedulers; what is not wrapped is returned as it is.
    """
    found = tuple(_unwrapped(x) for x in prepared)
    return found[0] if len(found) == 1 else found


def _unwrapped(x: Any) -> Any:
    if isinstance(x, nn.Module):
        return extract_model_from_parallel(x)
    if isinstance(x, AcceleratedScheduler):
        return x.scheduler
    return without_wrappers(x) if isinstance(x, Optimizer) else x
